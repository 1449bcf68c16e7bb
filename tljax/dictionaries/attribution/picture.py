"""Pictures of feature circuits: a row for each point with a dictionary, the metric on top."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from tljax.checks import whole
from tljax.circuits.parts import Box, Join
from tljax.circuits.picture import READABLE, CircuitPicture, diagram_of
from tljax.errors import InputError
from tljax.hooks.points import layer_of, stage_of

if TYPE_CHECKING:
    from tljax.dictionaries.attribution.circuit import FeatureCircuit

_MOST = 1000
_LONGEST = 14


def draw_feature_circuit(
    circuit: "FeatureCircuit", *, k: int | None, title: str | None, names: Mapping[str, str] | None
) -> CircuitPicture:
    """Draws a circuit; see :meth:`FeatureCircuit.picture`.

    Raises:
        InputError: no edges, or too many to read.
    """
    order = np.argsort(np.abs(circuit.weight), kind="stable")  # the strongest are drawn last, over the others
    order = order if k is None else order[-whole(k, "k", at_least=1) :]
    if not len(order):
        raise InputError("The circuit has no edges, so that there is nothing to draw: lower edge_threshold.")
    if len(order) > _MOST:
        raise InputError(
            f"A picture of {len(order)} edges cannot be read; up to {READABLE} can. Draw the strongest, picture(k="
            f"{READABLE}), or raise the thresholds with select(...)."
        )
    shown = np.unique(np.concatenate([circuit.source[order], circuit.target[order]]))
    box_of = {int(node): number for number, node in enumerate(shown)}
    boxes = [_box(circuit, int(node), number, names or {}) for number, node in enumerate(shown)]
    every = [node.name for node in circuit.nodes] + ["metric"]
    joins = [
        Join(
            box_of[int(circuit.source[n])], box_of[int(circuit.target[n])], "",
            f"{every[circuit.source[n]]} -> {every[circuit.target[n]]}", float(circuit.weight[n]),
        )
        for n in order
    ]  # fmt: skip
    rows = sorted({box.row for box in boxes})
    boxes = [Box(box.name, box.kind, rows.index(box.row), box.layer, box.number) for box in boxes]
    bands = {number: _short(point) for number, point in enumerate(circuit.points)} | {len(circuit.points): ""}
    whole_count = circuit.n_edges
    note = f"{whole_count} edges" if len(order) == whole_count else f"the {len(order)} strongest of {whole_count} edges"
    diagram = diagram_of(boxes, joins, [], signed=True, bands=bands, score_name="effect", title=title or "", note=note)
    return CircuitPicture(diagram, tuple(join.name for join in joins))


def _box(circuit: "FeatureCircuit", node: int, number: int, names: Mapping[str, str]) -> Box:
    if node == circuit.n_nodes:
        return Box("metric", "logits", len(circuit.points), len(circuit.points), number)
    one, point = circuit.node(node), int(circuit.point[node])
    is_error = one.feature < 0
    text = names.get(one.name, ("error" if is_error else str(one.feature)) + (f"@{one.pos}" if one.pos >= 0 else ""))
    return Box(text[:_LONGEST], "error" if is_error else "feature", point, point, number)


def _short(point: str) -> str:
    layer = layer_of(point)
    return stage_of(point)[1].rpartition(".")[2].removeprefix("hook_") + ("" if layer is None else f" {layer}")
