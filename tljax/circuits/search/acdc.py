"""ACDC: removes edges one by one, from the logits down, while the metric stays (Conmy et al. 2023).

"Towards Automated Circuit Discovery for Mechanistic Interpretability", arXiv 2304.14997. Each decision depends on those
before it. To run several circuits at once all the same, a batch is run as if the next edges were all removed (or all
kept), and counts as far as that turns out true: the decisions are those of one evaluation after another.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from tljax.checks import typed
from tljax.circuits.circuit import Circuit
from tljax.circuits.graph import ResidualGraph
from tljax.circuits.replacement import Ablation
from tljax.circuits.running import CircuitRuns, prepare_runs
from tljax.circuits.scores.edge_edits import groups_of
from tljax.circuits.search.suffix import SuffixRuns
from tljax.circuits.selection import By, reads_of
from tljax.errors import InputError
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.metrics.metrics import KL
from tljax.patching.metrics.reads import unembed
from tljax.progress import Progress

Order = Literal["reverse", "normal"]
_REMEMBERED = 8
"""The number of last decisions that the next ones are expected to be like."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ACDCResult:
    """The circuit that ACDC found, and how.

    Attributes:
        circuit: the edges that were kept.
        effect: by how much the metric changed when each edge was removed from the circuit of that moment, ``[writer,
            reader]``; NaN where there is no edge.
        order: the edges in the order of the decisions, ``[decision, 2]`` (writer, reader).
        baseline: the metric of the whole model, averaged over prompts.
        final: the metric of the circuit, before any pruning.
        evaluations: decisions for which the metric was evaluated. The others are about readers whose writer is not
            read any more, so that nothing they read has an effect.
        runs: circuits that were run; more than ``evaluations``, because some ran on a wrong guess.
        tau, by: as they were given.
    """

    circuit: Circuit
    effect: np.ndarray
    order: np.ndarray
    baseline: float
    final: float
    evaluations: int
    runs: int
    tau: float
    by: By

    def __repr__(self) -> str:
        return (
            f"ACDCResult({self.circuit.n_edges} of {self.circuit.graph.n_edges} edges kept at tau={self.tau:g}; metric "
            f"{self.baseline:.4g} -> {self.final:.4g}; {self.evaluations} evaluations, {self.runs} runs)"
        )


@typed
def acdc(
    model: HookedTransformer,
    prompt: Any,
    source: Any = None,
    metric: Any = None,
    *,
    tau: float,
    by: By | None = None,
    order: Order = "reverse",
    prune: bool = False,
    graph: ResidualGraph | None = None,
    ablation: Ablation = "patching",
    align: Any = None,
    batch_size: int | Literal["auto"] = "auto",
    max_batch: int | Literal["auto"] = "auto",
    progress: bool | None = None,
) -> ACDCResult:
    """Finds a circuit by removing edges one at a time, as ACDC does.

    Readers are gone through from the logits down, and the writers of each in turn. An edge is removed, so that it
    carries the replacement; it stays removed unless that changes the metric by ``tau`` or more in the direction of
    ``by``. No edge is visited twice.

    Args:
        model: the model, without hooks.
        prompt, source, ablation, align: as in :meth:`~tljax.circuits.Circuit.run`.
        metric: takes logits and returns one number, or one for each prompt, which are averaged. By default the KL
            divergence of the circuit's next-token distribution from the whole model's, at each prompt's last token.
        tau: the least change for which an edge is kept.
        by: which change keeps an edge: ``"raises"``, for a metric that rises as the circuit gets worse (KL, a loss);
            ``"lowers"``, for one that falls (``LogitDiff``, a probability); ``"absolute"``, either. The default metric
            rises; for another one, say it.
        order: the order of a reader's writers: ``"reverse"`` from the last one down, ``"normal"`` from the first one
            up.
        prune: whether edges on no way from the token embedding to the logits are removed in the end
            (:meth:`~tljax.circuits.Circuit.prune`).
        graph: the graph, by default that of the model.
        batch_size, max_batch: as in :meth:`~tljax.circuits.Circuit.run`; the decisions do not depend on them.
        progress: whether to show a progress bar.

    Raises:
        InputError: a threshold that is negative or no number, a metric without ``by``, a metric that is not finite.

    Example:
        >>> import tljax
        >>> model = tljax.HookedTransformer.from_pretrained("tljax-tiny")
        >>> clean = "When John and Mary went to the store, John gave a drink to"
        >>> corrupted = "When John and Mary went to the store, Mary gave a drink to"
        >>> found = acdc(model, clean, corrupted, tau=0.3)
        >>> found.circuit.n_edges < found.circuit.graph.n_edges
        True
    """
    by = _checked(tau, by, metric)
    graph = ResidualGraph.of(model) if graph is None else graph
    runs = prepare_runs(
        model, graph, prompt, source, ablation=ablation, align=align, batch_size=batch_size, max_batch=max_batch
    )
    measure = runs.measure(divergence(runs) if metric is None else metric)
    search = _Search(SuffixRuns.of(runs, measure), tau, by)
    with Progress(graph.n_edges, progress, "acdc", "edge") as bar:
        for layer, edges in _edges_by_group(graph, order):
            for decided in search.decide(layer, edges):
                bar.advance(decided)
    circuit = Circuit(search.mask, graph, name=f"ACDC, tau={tau:g}")
    return ACDCResult(
        circuit.prune() if prune else circuit, search.effect, np.asarray(search.order), search.baseline,
        search.current, search.evaluations, search.runs, tau, by,
    )  # fmt: skip


def _checked(tau: float, by: By | None, metric: Any) -> By:
    if not (math.isfinite(tau) and tau >= 0):
        raise InputError(f"tau={tau} must be a number from 0 on: the least change of the metric that keeps an edge.")
    if metric is None:
        if by == "lowers":
            raise InputError(
                'by="lowers" keeps edges whose removal lowers the metric, and the default metric, the divergence from '
                'the whole model, rises as a circuit gets worse: leave by= out, or take "absolute".'
            )
        return "raises" if by is None else by
    if by is None:
        raise InputError(
            'Say which change of the metric keeps an edge: by="lowers" for a metric that falls as the circuit gets '
            'worse (LogitDiff, a probability), by="raises" for one that rises (KL, a loss), or by="absolute".'
        )
    return by


def divergence(runs: CircuitRuns) -> KL:
    """Returns the KL divergence from the unpatched run of the prompts, at each prompt's last token."""
    base, text, cfg = runs.base, runs.text, runs.model.cfg
    last = text.shape[1] - 1 - text[:, ::-1].argmax(axis=1)
    head = {name: runs.model.params[name] for name in ("ln_final", "unembed") if name in runs.model.params}
    logits = unembed(cfg.computation, head, jnp.asarray(base.final)[np.arange(base.batch), last])
    return KL(logits, attention_mask=None if text.all() else text)


def _edges_by_group(graph: ResidualGraph, order: Order) -> Iterator[tuple[int, np.ndarray]]:
    """Yields a layer and edges ``[edge, 2]`` (writer, reader) in order, readers from the last one down.

    The edges of a group end at readers that cannot read each other's writers.
    """
    for layer in reversed(range(graph.n_layers + 1)):
        for columns in reversed(groups_of(graph, layer).values()):
            edges = []
            for reader in reversed(range(graph.n_readers)[columns]):
                writers = np.flatnonzero(graph.edges[:, reader])
                edges += [(writer, reader) for writer in (writers[::-1] if order == "reverse" else writers)]
            yield layer, np.asarray(edges)


class _Search:
    """A search under way: the mask of the edges present, its metric, and what was decided."""

    def __init__(self, runs: SuffixRuns, tau: float, by: By) -> None:
        self.suffix, self.tau, self.by = runs, tau, by
        graph = runs.graph
        self.mask = graph.edges.copy()
        self.effect = np.where(graph.edges, 0.0, np.nan)
        self.order: list[tuple[int, int]] = []
        self.baseline = self.current = float(np.asarray(runs.measure.baseline, np.float64).mean())
        if not math.isfinite(self.baseline):
            raise InputError(f"The metric of the whole model is {self.baseline}: no edge can be judged by it.")
        self.evaluations = self.runs = 0
        self._size = runs.sizes[0]
        self._last = [True]

    def decide(self, layer: int, edges: np.ndarray) -> Iterator[int]:
        """Decides about edges to readers of one group, in order, and yields after each batch how many it decided.

        An edge to a reader whose writers are not read by any present edge changes nothing, and is not evaluated.
        """
        reads = reads_of(self.suffix.graph)
        read = self.mask.any(axis=1) @ reads
        read[-1] = True  # the logits
        self.order += [(int(writer), int(reader)) for writer, reader in edges]
        live = read[edges[:, 1]]
        for edge in edges[~live]:
            self.mask[tuple(edge)] = self._keeps(0.0)
        yield len(edges) - int(live.sum())
        pending = edges[live]
        while len(pending):
            decided = self._try(layer, pending[: self._size])
            pending = pending[decided:]
            yield decided

    def _keeps(self, change: float) -> bool:
        """Whether a change of the metric keeps an edge."""
        return {"raises": change, "lowers": -change, "absolute": abs(change)}[self.by] >= self.tau

    def _try(self, layer: int, edges: np.ndarray) -> int:
        """Runs circuits for some edges and decides about those whose circuit turned out right; returns how many."""
        removes = sum(self._last) * 2 >= len(self._last)
        absent = np.zeros((len(edges), *self.mask.shape), bool)
        absent[np.arange(len(edges)), edges[:, 0], edges[:, 1]] = True
        if removes:
            absent = np.logical_or.accumulate(absent)
        metrics = self.suffix.metrics(self.mask & ~absent, layer)
        self.runs += len(edges)
        decided = 0
        for edge, value in zip(edges, metrics, strict=True):
            change = float(value) - self.current
            removed = not self._keeps(change)
            self.effect[tuple(edge)] = change
            if removed:
                self.mask[tuple(edge)], self.current = False, float(value)
            self._last = [*self._last, removed][-_REMEMBERED:]
            decided += 1
            if removed != removes:
                break
        self.evaluations += decided
        alike = len(self._last) == _REMEMBERED and len(set(self._last)) == 1
        self._size = self.suffix.sizes[alike]
        return decided
