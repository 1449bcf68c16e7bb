"""``FeatureCircuit``: a sparse feature circuit, features and error terms of dictionaries and the edges between them."""

import dataclasses
import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from tljax.checks import typed, whole
from tljax.circuits.picture import CircuitPicture
from tljax.dictionaries.attribution.circuit_files import read_fields, write_fields
from tljax.dictionaries.attribution.edges import ERROR_NODE, EVERY_POS
from tljax.dictionaries.attribution.nodes import dictionary_samples, plain_fingerprint
from tljax.dictionaries.attribution.picture import draw_feature_circuit
from tljax.errors import CheckpointError, InputError, nearest
from tljax.fingerprint import Fingerprint, WeightSample
from tljax.model.hooked_transformer import HookedTransformer

METRIC = "metric"
"""Name of the node that all paths lead to."""


class CircuitNode(NamedTuple):
    """A node of a feature circuit.

    Attributes:
        name: such as ``"blocks.2.hook_resid_pre:17"``, ``"blocks.2.hook_resid_pre:error"``, with ``@3`` behind it for
            position 3 of a circuit by position.
        point: the point of its dictionary.
        feature: its number; -1 for the error term.
        pos: its position; -1 for all together.
        effect: its effect on the metric.
    """

    name: str
    point: str
    feature: int
    pos: int
    effect: float


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FeatureCircuit:
    """A sparse feature circuit (Marks et al. 2024, arXiv 2403.19647).

    Nodes are features and error terms of the dictionaries of a model, one for all positions together or one for each
    position. Effects are patched minus baseline, averaged over prompts. An edge's effect is what its source does to the
    metric directly through its target; edges into the metric meet no other dictionary on the way.

    Attributes:
        points: the points with dictionaries, in firing order.
        widths: number of features of each.
        point: which point each node belongs to, ``[node]``.
        feature: number of the feature, -1 for an error term, ``[node]``.
        pos: position in the prompts' text; -1 for all positions together, ``[node]``.
        effect: effect on the metric, ``[node]``.
        source: node that each edge leaves, ``[edge]``.
        target: node that it enters, ``[edge]``; the number of nodes stands for the metric.
        weight: effect of the edge, ``[edge]``.
        by_position: whether nodes are told apart by position.
        node_threshold, edge_threshold: the least size of an effect.
        convention: what effects are, in words.
        model: fingerprint of the model without its dictionaries; ``None`` if unknown.
        dictionaries: a sample of the weights of each point's dictionary, or ``None``.
    """

    points: tuple[str, ...]
    widths: tuple[int, ...]
    point: np.ndarray
    feature: np.ndarray
    pos: np.ndarray
    effect: np.ndarray
    source: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    by_position: bool
    node_threshold: float
    edge_threshold: float
    convention: str
    model: Fingerprint | None = None
    dictionaries: tuple[WeightSample | None, ...] = ()

    def __post_init__(self) -> None:
        if self.dictionaries == ():
            object.__setattr__(self, "dictionaries", (None,) * len(self.points))
        count = len(self.point)
        for name in ("feature", "pos", "effect"):
            if len(getattr(self, name)) != count:
                raise InputError(f"{name} has {len(getattr(self, name))} entries for {count} nodes.")
        if not len(self.source) == len(self.target) == len(self.weight):
            raise InputError("source, target and weight need one entry for each edge.")
        ends = np.concatenate([self.source, self.target])
        if count and ((self.point < 0) | (self.point >= len(self.points))).any():
            raise InputError(f"A node belongs to a point that is not there: there are {len(self.points)}.")
        width = np.asarray(self.widths)[self.point] if count else np.zeros(0, int)
        if len(wrong := np.flatnonzero((self.feature < ERROR_NODE) | (self.feature >= width))):
            node = int(wrong[0])
            raise InputError(
                f"There is no feature {self.feature[node]} at {self.points[self.point[node]]}: its dictionary has "
                f"{width[node]}."
            )
        if len(ends) and (ends.min() < 0 or ends.max() > count or self.source.max() >= count):
            raise InputError(f"An edge joins nodes that are not there: there are {count}, and the metric is {count}.")

    @property
    def n_nodes(self) -> int:
        """Number of nodes, error terms among them."""
        return len(self.point)

    @property
    def n_edges(self) -> int:
        """Number of edges, those into the metric among them."""
        return len(self.source)

    def node(self, number: int) -> CircuitNode:
        """Returns a node by number; the number of nodes stands for the metric."""
        if number == self.n_nodes:
            return CircuitNode(METRIC, METRIC, ERROR_NODE, EVERY_POS, float("nan"))
        point, feature, pos = self.points[self.point[number]], int(self.feature[number]), int(self.pos[number])
        name = f"{point}:{'error' if feature == ERROR_NODE else feature}" + (f"@{pos}" if self.by_position else "")
        return CircuitNode(name, point, feature, pos, float(self.effect[number]))

    @property
    def nodes(self) -> tuple[CircuitNode, ...]:
        """The nodes, by point, position and feature."""
        return tuple(map(self.node, range(self.n_nodes)))

    @property
    def edges(self) -> Mapping[tuple[str, str], float]:
        """The effect of each edge, by the names of its ends, largest first; the metric's name is ``"metric"``."""
        names = [node.name for node in self.nodes] + [METRIC]
        order = np.argsort(-np.abs(self.weight), kind="stable")
        return {(names[self.source[n]], names[self.target[n]]): float(self.weight[n]) for n in order}

    @typed
    def top(self, k: int = 10) -> list[CircuitNode]:
        """Returns the ``k`` nodes with the largest effects in size."""
        order = np.argsort(-np.abs(self.effect), kind="stable")[: whole(k, "k", at_least=1)]
        return [self.node(int(number)) for number in order]

    @typed
    def select(self, *, node_threshold: float | None = None, edge_threshold: float | None = None) -> "FeatureCircuit":
        """Returns the circuit at higher thresholds.

        Raises:
            InputError: a threshold below that of the circuit, whose smaller effects it does not know.
        """
        nodes = self.node_threshold if node_threshold is None else node_threshold
        edges = self.edge_threshold if edge_threshold is None else edge_threshold
        if nodes < self.node_threshold or edges < self.edge_threshold:
            raise InputError(
                f"This circuit was found with node_threshold={self.node_threshold:g} and edge_threshold="
                f"{self.edge_threshold:g}; below these it knows nothing. Find it anew with lower ones."
            )
        kept = np.flatnonzero(np.abs(self.effect) >= nodes)
        number = np.full(self.n_nodes + 1, -1)
        number[kept], number[-1] = np.arange(len(kept)), len(kept)
        on = (number[self.source] >= 0) & (number[self.target] >= 0) & (np.abs(self.weight) >= edges)
        return dataclasses.replace(
            self, point=self.point[kept], feature=self.feature[kept], pos=self.pos[kept], effect=self.effect[kept],
            source=number[self.source[on]], target=number[self.target[on]], weight=self.weight[on],
            node_threshold=nodes, edge_threshold=edges,
        )  # fmt: skip

    def mask(self, point: str, length: int | None = None) -> np.ndarray:
        """Returns which features of a point are nodes, ``[d_sae + 1]``, the error term last.

        Args:
            point: the point.
            length: of a circuit by position, the number of positions; the mask is then ``[length, d_sae + 1]``.
        """
        if point not in self.points:
            known = ", ".join(self.points)
            raise InputError(f"There is no point {point!r} in this circuit, but {known}.{nearest(point, self.points)}")
        number = self.points.index(point)
        own = self.point == number
        width = self.widths[number]
        feature = np.where(self.feature[own] == ERROR_NODE, width, self.feature[own])
        if not self.by_position:
            mask = np.zeros(width + 1, bool)
            mask[feature] = True
            return mask
        mask = np.zeros((whole(length, "length", at_least=1), width + 1), bool)
        if own.any() and self.pos[own].max() >= len(mask):
            raise InputError(
                f"This circuit has nodes up to position {self.pos[own].max()}, the prompts {len(mask)} tokens."
            )
        mask[self.pos[own], feature] = True
        return mask

    def check(self, model: HookedTransformer) -> None:
        """Checks that the circuit belongs to a model and its dictionaries.

        Raises:
            InputError: it does not.
        """
        there = {splice.writes: splice for splice in model.cfg.splices}
        for point, width in zip(self.points, self.widths, strict=True):
            if point not in there:
                raise InputError(
                    f"The circuit has features of a dictionary at {point}, and this model carries none there."
                )
            if there[point].d_sae != width:
                raise InputError(
                    f"The circuit's dictionary at {point} has {width} features, the model's {there[point].d_sae}."
                )
        if self.model is not None and (differing := self.model.differences(plain_fingerprint(model))):
            raise InputError(f"The circuit belongs to another model: {'; '.join(differing)}.")
        for point, own, here in zip(
            self.points, self.dictionaries, dictionary_samples(model, self.points), strict=True
        ):
            if own is not None and here is not None and not own.is_of_the_same(here):
                raise InputError(
                    f"The circuit belongs to another dictionary at {point}: the weights are other numbers."
                )

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Writes the circuit to a file; :meth:`from_json` reads it."""
        write_fields(path, {field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    @classmethod
    def from_json(cls, path: str | os.PathLike[str], model: HookedTransformer | None = None) -> "FeatureCircuit":
        """Reads a circuit.

        Args:
            path: the file.
            model: the model that it must belong to, if any.

        Raises:
            CheckpointError: there is no such file, it is damaged, or belongs to another model.
        """
        circuit = cls(**read_fields(path))
        if model is not None:
            try:
                circuit.check(model)
            except InputError as error:
                raise CheckpointError(f"{path}: {error}") from error
        return circuit

    @typed
    def picture(
        self, *, k: int | None = None, title: str | None = None, names: Mapping[str, str] | None = None
    ) -> CircuitPicture:
        """Draws the circuit: a row for each point, the metric on top, edges blue above zero and vermilion below.

        Args:
            k: how many edges to draw, the strongest; all by default.
            title: a heading.
            names: what to call nodes, by name.

        Raises:
            InputError: no edges, or too many to read.
        """
        return draw_feature_circuit(self, k=k, title=title, names=names)

    def __repr__(self) -> str:
        errors = int((self.feature == ERROR_NODE).sum())
        best = ", ".join(f"{node.name} {node.effect:+.3g}" for node in self.top(2)) if self.n_nodes else "none"
        return (
            f"FeatureCircuit({self.n_nodes - errors} features and {errors} error terms at {len(self.points)} points, "
            f"{self.n_edges} edges; largest {best}; {self.convention})"
        )
