"""The exact effects of edges: each edge patched alone, with everything after its reader computed anew.

A patched edge changes what one reader reads: the residual stream of the base run plus ``r[u] - a[u]``, where writer
``u`` writes ``a[u]`` in the base run and ``r[u]`` in its replacement. So one edge is one row of the sweep engine
(``docs/how_a_sweep_works.md``), which enters at the reader's layer and at the first position where the two differ.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import typed
from tljax.circuits.graph import ResidualGraph
from tljax.circuits.scores.edge_edits import EdgeEdits, ReaderGroup, base_points, flops_saved, groups_of, make_edits
from tljax.circuits.writers import outputs_of, writer_points
from tljax.errors import InputError
from tljax.memory import how_many
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.engine.base_run import BaseRun
from tljax.patching.engine.engine import Engine, Reach, reach_of
from tljax.patching.engine.report import SweepReport, blocks_flops, forward_flops
from tljax.patching.engine.run import batch_limits, measure_rows, prepare_metric
from tljax.patching.metrics.evaluation import Measure, PositionNotKept
from tljax.patching.paths import added_by_attention, refuse_paths
from tljax.processes import as_numpy
from tljax.progress import Progress

_MOST_WRITERS = 64
"""Most writers whose edges are patched together: more would not fill packed batches better."""


@dataclasses.dataclass(frozen=True, eq=False)
class ExactEffects:
    """Exact effects of edges.

    Attributes:
        values: metric with the edge patched minus metric of the base run, ``[writer, reader]`` or ``[writer, reader,
            batch]``; zero where there is no edge, NaN for edges that were not asked for.
        baseline: the metric of the base run, ``[]`` or ``[batch]``.
        report: FLOPs spent, and the least possible.
    """

    values: np.ndarray
    baseline: np.ndarray
    report: SweepReport


def exact_points(graph: ResidualGraph) -> tuple[str, ...]:
    """Returns full names of the hook points that a base run must keep for :func:`exact_edge_effects`."""
    return tuple(dict.fromkeys((*writer_points(graph), *base_points(graph))))


@typed
def exact_edge_effects(
    model: HookedTransformer,
    base: BaseRun,
    graph: ResidualGraph,
    replacement: Mapping[str, Any],
    metric: Any,
    edges: Any = None,
    *,
    max_batch: int | Literal["auto"] = "auto",
    progress: bool | None = None,
) -> ExactEffects:
    """Computes the effect of patching each edge alone, with everything after its reader computed anew.

    It equals :func:`~tljax.patching.path_patch` with ``freeze_mlps=True`` and one receiver, for each writer and reader.

    Args:
        model: the model, without hooks.
        base: its unpatched run, which keeps :func:`exact_points`.
        graph: its graph.
        replacement: what patched edges carry: activations by full name at the points of
            :func:`~tljax.circuits.writers.writer_points`, ``[batch or 1, padded_pos or 1, ...]``.
        metric: takes logits and returns one number, or one for each prompt, as in :func:`~tljax.patching.sweep`.
        edges: the edges to measure, a mask ``[writer, reader]``; all by default.
        max_batch, progress: as in :func:`~tljax.patching.sweep`.

    Raises:
        InputError: another model's graph, a model that carries hooks, a mask of another shape or with pairs that are no
            edges.
    """
    refuse_paths(model)
    graph.check(model.cfg)
    wanted = graph.edges if edges is None else checked_edges(graph, edges)
    measure = prepare_metric(metric, model, base)
    effects = _Effects(model, base, graph, replacement, measure, wanted)
    positions = measure.positions
    try:
        values, *flops = effects.measure(reach_of(model.cfg, base.length, positions), max_batch, progress)
    except PositionNotKept:
        positions = None
        values, *flops = effects.measure(reach_of(model.cfg, base.length, None), max_batch, progress)
    return ExactEffects(values, as_numpy(measure.baseline), _report(effects, positions, *flops))


def checked_edges(graph: ResidualGraph, edges: Any) -> np.ndarray:
    """Checks a mask of edges and returns it, boolean ``[writer, reader]``.

    Raises:
        InputError: it has another shape, no edge, or pairs that are no edges.
    """
    mask = np.asarray(edges)
    if mask.shape != graph.shape or mask.dtype != bool:
        raise InputError(
            f"edges= has shape {mask.shape} and dtype {mask.dtype}; give a boolean mask [writer, reader] of shape "
            f"{graph.shape}, such as graph.mask(['input->logits'])."
        )
    if (wrong := np.argwhere(mask & ~graph.edges)).size:
        name = graph.edge_name(*map(int, wrong[0]))
        raise InputError(
            f"edges= is true for {len(wrong)} pairs that are no edges, such as {name}: the reader does not come after "
            "the writer. Take mask & graph.edges."
        )
    if not mask.any():
        raise InputError("edges= has no edge: give a mask that is true somewhere, or none for all edges.")
    return mask


@dataclasses.dataclass(frozen=True)
class _Effects:
    """What the effects of edges are computed from."""

    model: HookedTransformer
    base: BaseRun
    graph: ResidualGraph
    replacement: Mapping[str, Any]
    measured_by: Measure
    edges: np.ndarray

    def measure(
        self, reach: Reach, max_batch: int | Literal["auto"], progress: bool | None
    ) -> tuple[np.ndarray, float, float]:
        """Returns the effects, the FLOPs that blocks spent, and the least that they could."""
        cfg, base, graph = self.model.cfg, self.base, self.graph
        baseline = as_numpy(self.measured_by.baseline)
        effects = np.zeros((*graph.shape, *baseline.shape), np.result_type(baseline, np.float32))
        effects[graph.edges & ~self.edges] = np.nan
        flops = floor = 0.0
        with Progress(int(self.edges.sum()) * base.batch, progress, "edges") as bar:
            engine = Engine(self.model, base, reach, batch_limits(cfg, self.model.params, base, max_batch), bar.advance)
            for edits, group, edges in self._edits():
                rows = edits.rows(cfg, reach)
                run = functools.partial(engine.run, edits=edits)
                measured = measure_rows(run, rows, len(edges), {"": self.measured_by}, base, reach)[""]
                effects[tuple(edges.T)] = measured - baseline
                bar.advance(len(edges) * base.batch - len(rows))
                narrow = reach.only is not None and edits.layer >= cfg.n_layers - 1
                tokens = int((reach.end - rows.start).sum())
                saved = flops_saved(cfg, group, edits.layer, tokens, len(rows) if narrow else tokens)
                flops, floor = flops - saved, floor - (0 if narrow else saved)
        return effects, flops + engine.spent.flops, floor + engine.spent.floor

    def _edits(self) -> Iterator[tuple[EdgeEdits, ReaderGroup, np.ndarray]]:
        """Yields edits, the group of their readers, and their edges ``[site, 2]`` (writer, reader).

        The last layer comes first: its readers have the most edges, and smaller batches fit into larger ones' programs.
        """
        for first, changes in self._chunks():
            for layer in reversed(range(self.graph.n_layers + 1)):
                for group, columns in groups_of(self.graph, layer).items():
                    edges = np.argwhere(self.edges[first : first + len(changes[1]), columns])
                    if len(edges):
                        edges[:, 1] += columns.start
                        edits = make_edits(self.model, self.base, self.graph, group, layer, changes, edges)
                        yield edits, group, np.add(edges, [first, 0])

    def _chunks(self) -> Iterator[tuple[int, tuple[jax.Array, np.ndarray]]]:
        """Yields chunks of writers with edges: the first one's number, what edges from each add, and where.

        All chunks have the same size, for which there are programs; the last one is filled up with zeros.
        """
        base, graph = self.base, self.graph
        size = min(how_many(5 * base.final.nbytes), _MOST_WRITERS, graph.n_writers)
        text = np.zeros((base.batch, base.padded_length), bool)
        text[:, : base.length] = True if base.text is None else base.text
        for first in range(0, graph.n_writers, size):
            if not self.edges[first : first + size].any():
                continue
            parts = []
            for layer in range(-1, graph.n_layers):
                own = graph.writers_of(layer)
                start, stop = max(own.start, first), min(own.stop, first + size)
                if start < stop:
                    parts.append(self._changes(layer)[start - own.start : stop - own.start])
            filled = sum(map(len, parts))
            if filled < size:
                parts.append(jnp.zeros((size - filled, *base.final.shape), base.final.dtype))
            change = jnp.where(text[None, :, :, None], jnp.concatenate(parts), 0)
            yield first, (change, as_numpy((change != 0).any(axis=-1)))

    def _changes(self, layer: int) -> jax.Array:
        """Computes what edges from a layer's writers add if patched, ``[writer, batch, padded_pos, d_model]``."""
        cfg, params, graph = self.model.cfg, self.model.params, self.graph
        before = {name: self.base.activations[name] for name in writer_points(graph, (layer,))}
        difference = {name: self.replacement[name] - value for name, value in before.items()}
        change = jnp.moveaxis(outputs_of(cfg, params, graph, difference, layer), 2, 0)
        if layer < 0 or not cfg.has_norms_after:
            return change
        z = before[f"blocks.{layer}.attn.hook_z"]
        heads = added_by_attention(self.model, layer, "attn.hook_z", z, change[: graph.n_heads])
        return jnp.concatenate([heads, change[graph.n_heads :]])


def _report(effects: _Effects, positions: tuple[int, ...] | None, flops: float, floor: float) -> SweepReport:
    cfg, base, count = effects.model.cfg, effects.base, int(effects.edges.sum())
    reductions = ["layer skip", "only the reader's part of its own block"]
    if cfg.attention_dir == "causal":
        reductions.append("causal suffix")
    if positions is not None and len(positions) == 1:
        reductions.append("one position unembedded")
    flops += blocks_flops(cfg, base.batch, base.padded_length) + count * effects.measured_by.flops
    naive = float(count * forward_flops(cfg, base.batch, base.length))
    return SweepReport(count, 0, tuple(reductions), effects.measured_by.how, flops, floor, naive)
