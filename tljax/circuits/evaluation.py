"""How much of a behaviour circuits carry: faithfulness, completeness, minimality, curves over the size, stability."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, Unpack, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import is_traced, typed
from tljax.circuits.circuit import Circuit
from tljax.circuits.evaluation_result import CircuitResult
from tljax.circuits.graph import ResidualGraph
from tljax.circuits.running import CircuitRuns, RunOptions, prepare_runs
from tljax.circuits.selection import By, edges_in, read_scores, select
from tljax.errors import InputError
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.metrics.evaluation import Measure
from tljax.patching.sources import rounding
from tljax.patching.statistics import resampling_weights
from tljax.processes import as_numpy

MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The shares of edges at which the MIB circuit track evaluates (Mueller et al. 2025)."""


@runtime_checkable
class Scored(Protocol):
    """Scores of the edges of a graph, such as :func:`~tljax.circuits.edge_scores` returns."""

    graph: ResidualGraph
    values: Any
    axis_names: tuple[str, ...]


@typed
def faithfulness(
    model: HookedTransformer,
    circuit: Circuit,
    prompt: Any,
    source: Any,
    metric: Any,
    **options: Unpack[RunOptions],
) -> CircuitResult:
    """Measures how much of the model's behaviour circuits carry, all circuits of a stack together.

    Args:
        model: the model, without hooks.
        circuit: a circuit or a stack of them.
        prompt: the prompts.
        source: where the values of absent edges come from, as in :meth:`Circuit.run`; ``None`` for kinds without one.
        metric: a function of the logits.
        **options: as in :meth:`Circuit.run`.

    Raises:
        InputError: the metric is the same with all edges and with none, so that there is nothing to explain.

    Example:
        >>> model = HookedTransformer.from_pretrained("tljax-tiny")
        >>> clean, corrupted = "When John and Mary went home, John gave", "When John and Mary went home, Mary gave"
        >>> from tljax.patching import LogitDiff
        >>> metric = LogitDiff(*(model.to_single_token(name) for name in (" Mary", " John")))
        >>> result = faithfulness(model, Circuit.full(model), clean, corrupted, metric)
        >>> float(result.faithfulness())
        1.0
    """
    runs, measure = _prepared(model, circuit.graph, prompt, source, metric, options)
    return _evaluated(runs, measure, circuit, options)


@typed
def completeness(
    model: HookedTransformer,
    circuit: Circuit,
    prompt: Any,
    source: Any,
    metric: Any,
    **options: Unpack[RunOptions],
) -> CircuitResult:
    """Measures how much of the behaviour is left without the circuit: the faithfulness of its complement.

    Near 0, the circuit holds all that matters (Marks et al. 2024); high values show what it lacks, or a backup of it.

    Args:
        model, circuit, prompt, source, metric, options: as in :func:`faithfulness`.
    """
    runs, measure = _prepared(model, circuit.graph, prompt, source, metric, options)
    found = _evaluated(runs, measure, circuit.complement(), options)
    return dataclasses.replace(found, measured="completeness")


@typed
def minimality(
    model: HookedTransformer,
    circuit: Circuit,
    prompt: Any,
    source: Any,
    metric: Any,
    edges: Sequence[str] | Mapping[str, Sequence[str]] | Literal["classes"] | None = None,
    **options: Unpack[RunOptions],
) -> CircuitResult:
    """Measures the circuit without each of its edges: ``result.drop()`` says what each is worth.

    Args:
        model, prompt, source, metric, options: as in :func:`faithfulness`.
        circuit: one circuit, which may differ by prompt and position. Each edge takes a run of it, many at a time.
        edges: the edges to leave out, by name; by default each of the circuit's. A mapping from labels to edges leaves
            those of a label out together. ``"classes"`` does so with all edges into queries and keys (``"into_qk"``),
            into values (``"into_v"``), into MLPs (``"into_mlp"``) and into the logits (``"into_logits"``): the classes
            of TransformerLens 4.3's ``edge_class_recovered``.

    Returns:
        A result with an ``"edge"`` axis, whose labels are the edges' names, or the mapping's labels.

    Raises:
        InputError: a stack of circuits, an empty circuit, or an edge that it lacks.
    """
    if circuit.stack_axes:
        raise InputError(f"Edges are left out of one circuit, and this is a stack with axes {circuit.axes}.")
    apart = tuple(range(len(circuit.axes)))  # prompts and positions
    present = np.asarray(np.asarray(circuit.mask).any(axis=apart))
    groups = _left_out(circuit.graph, present, edges)
    masks = np.repeat(np.asarray(circuit.mask)[None], len(groups) + 1, axis=0)
    for number, mask in enumerate(groups.values()):
        masks[number][..., mask] = 0
    runs, measure = _prepared(model, circuit.graph, prompt, source, metric, options)
    found = _evaluated(runs, measure, Circuit(masks, circuit.graph, ("edge", *circuit.axes)), options)
    return dataclasses.replace(
        found, values=found.values[:-1], circuit=found.values[-1], n_edges=found.n_edges[:-1], measured="minimality",
        labels={"edge": list(groups)},
    )  # fmt: skip


_CLASSES = {"into_qk": ("q", "k"), "into_v": ("v",), "into_mlp": ("mlp",), "into_logits": ("logits",)}
"""Kinds of readers by class of edges."""


def _left_out(
    graph: ResidualGraph, present: np.ndarray, edges: Sequence[str] | Mapping[str, Sequence[str]] | str | None
) -> dict[str, np.ndarray]:
    """Returns masks ``[writer, reader]`` of the edges to leave out together, by label.

    Raises:
        InputError: there are none, or the circuit lacks one.
    """
    if not present.any() and (edges is None or edges == "classes"):
        raise InputError("The circuit has no edges to leave out.")
    if edges == "classes":
        kinds = np.asarray([reader.kind for reader in graph.readers])
        return {label: present & np.isin(kinds, chosen) for label, chosen in _CLASSES.items()}
    if isinstance(edges, str):
        raise InputError(
            f'edges is a list of names, such as [{edges!r}], a mapping from labels to lists, or "classes".'
        )
    if not isinstance(edges, Mapping):
        edges = {name: [name] for name in (graph.names(present) if edges is None else edges)}
    if not edges:
        raise InputError(
            "edges= is empty: name the edges to leave out, or leave edges= away for each of the circuit's."
        )
    if absent := [name for names in edges.values() for name in names if not present[graph.edge(name)]]:
        raise InputError(f"The circuit lacks the edge {absent[0]!r}, so it cannot be left out.")
    return {label: graph.mask(names) for label, names in edges.items()}


@typed
def faithfulness_curve(
    model: HookedTransformer,
    scores: Any,
    prompt: Any,
    source: Any,
    metric: Any,
    *,
    fractions: Sequence[float] = MIB_FRACTIONS,
    by: By = "absolute",
    greedy: bool = False,
    prune: bool = True,
    **options: Unpack[RunOptions],
) -> CircuitResult:
    """Measures the circuits of the best edges at several sizes, in one call.

    With the default fractions, ``result.cpr()`` and ``result.cmd()`` are the numbers of the MIB circuit track, which
    takes CPR of ``by="lowers"`` (edges whose patching lowers the metric most) and CMD of ``by="absolute"``, both with
    ``ablation="patching"`` whatever the scores were made with.

    Args:
        model, prompt, source, metric, options: as in :func:`faithfulness`.
        scores: scores of edges ``[writer, reader]``, or several ``[..., writer, reader]``: a curve each.
        fractions: shares of all edges, increasing, in (0, 1]. Each keeps ``int(fraction * n_edges)`` edges.
        by: which edges are preferred: large effects, or those that lower or raise the metric.
        greedy: whether edges are found from the logits up, rather than the best of all.
        prune: whether to remove edges on no way from the token embedding to the logits.

    Returns:
        A result whose last axis before ``batch`` is ``"fraction"``.

    Raises:
        InputError: fractions outside (0, 1] or not increasing, scores of prompts or positions apart, NaN.
    """
    graph, values = _scores_of(model, scores)
    sizes = tuple(float(fraction) for fraction in fractions)
    for fraction in sizes:
        edges_in(fraction, graph)
    if not sizes or any(late <= early for early, late in itertools.pairwise(sizes)):
        raise InputError(f"fractions={list(sizes)} must be increasing shares of all edges, such as [0.01, 0.1, 1].")
    masks = [select(values, graph, fraction=size, by=by, greedy=greedy, prune=prune) for size in sizes]
    stack = np.stack(masks, axis=-3)
    names = tuple(f"scores_{number}" if number else "scores" for number in range(stack.ndim - 3))
    runs, measure = _prepared(model, graph, prompt, source, metric, options)
    found = _evaluated(runs, measure, Circuit(stack, graph, (*names, "fraction")), options)
    return dataclasses.replace(found, fractions=sizes, labels={"fraction": [f"{size:g}" for size in sizes]})


@dataclasses.dataclass(frozen=True, eq=False)
class Stability:
    """How alike the circuits are that resamples of the prompts give.

    Attributes:
        circuits: one for each resample, a stack.
        jaccard: share of common edges of each two, ``[resample, resample]``.
        frequency: share of resamples whose circuit has each edge, ``[writer, reader]``.
    """

    circuits: Circuit
    jaccard: np.ndarray
    frequency: np.ndarray

    @property
    def mean_jaccard(self) -> float:
        """Mean over pairs of different resamples."""
        return float(self.jaccard[np.triu_indices(len(self.jaccard), 1)].mean())

    def __repr__(self) -> str:
        always = int((self.frequency == 1).sum())
        return (
            f"Stability({len(self.jaccard)} resamples; mean Jaccard {self.mean_jaccard:.3g}; {always} edges in all "
            f"circuits, {int((self.frequency > 0).sum())} in any)"
        )


@typed
def stability(
    scores: Any,
    graph: ResidualGraph | None = None,
    *,
    top: int | None = None,
    fraction: float | None = None,
    threshold: float | None = None,
    by: By = "absolute",
    greedy: bool = False,
    prune: bool = True,
    n_resamples: int = 100,
    seed: int = 0,
    clusters: Any = None,
) -> Stability:
    """Chooses circuits by the scores of resampled prompts, and compares them edge by edge.

    Args:
        scores: scores of each prompt, ``[batch, writer, reader]``.
        graph: their graph, if the scores do not bring it.
        top, fraction, threshold, by, greedy, prune: how a circuit is chosen, as in ``EdgeScores.circuit``.
        n_resamples: how often prompts are drawn with replacement.
        seed: seed of the draws.
        clusters: a number for each prompt, such as its template's: then whole clusters are drawn.

    Raises:
        InputError: no axis of prompts, or an argument out of range.
    """
    if isinstance(scores, Scored):
        if scores.axis_names != ("batch", "writer", "reader"):
            raise InputError(f"Give scores of each prompt, with axes batch, writer, reader; got {scores.axis_names}.")
        graph, scores = scores.graph, scores.values
    if graph is None:
        raise InputError("An array of scores does not say whose they are: give graph=ResidualGraph.of(model).")
    values = read_scores(scores, graph)
    if values.ndim != 3:
        raise InputError(f"Give scores of each prompt, [batch, writer, reader]; got shape {values.shape}.")
    weights = resampling_weights(len(values), n_resamples=n_resamples, seed=seed, clusters=clusters)
    how = {"top": top, "fraction": fraction, "threshold": threshold, "by": by, "greedy": greedy, "prune": prune}
    flat = values.reshape(len(values), -1)
    masks = np.stack([select((row @ flat).reshape(graph.shape), graph, **how) for row in weights])
    edges = masks[:, graph.edges].astype(np.float32)
    common, sizes = edges @ edges.T, edges.sum(axis=1)
    either = sizes[:, None] + sizes[None] - common
    jaccard = np.where(either > 0, common / np.maximum(either, 1), 1.0)
    return Stability(Circuit(masks, graph, ("resample",)), jaccard, masks.mean(axis=0))


def _scores_of(model: HookedTransformer, scores: Any) -> tuple[ResidualGraph, Any]:
    """Returns the graph and the values of scores; an array belongs to the model's graph, or to that with experts."""
    if isinstance(scores, Scored):
        apart = [axis for axis in scores.axis_names if axis in ("batch", "pos")]
        if apart:
            raise InputError(
                f"These scores have an axis {apart[0]!r}, and a circuit for all prompts is chosen by one number an "
                "edge: take their mean over prompts (scores.mean()) and sum over positions (scores.sum_positions())."
            )
        return scores.graph, scores.values
    graph = ResidualGraph.of(model)
    if np.shape(scores)[-2:] != graph.shape and any(model.cfg.layer_kind(n).experts for n in range(graph.n_layers)):
        graph = ResidualGraph.of(model, experts=True)
    return graph, scores


def _prepared(
    model: HookedTransformer, graph: ResidualGraph, prompt: Any, source: Any, metric: Any, options: RunOptions
) -> tuple[CircuitRuns, Measure]:
    given: dict[str, Any] = {name: option for name, option in options.items() if name != "progress"}
    runs = prepare_runs(model, graph, prompt, source, **given)
    return runs, runs.measure(metric)


def _evaluated(runs: CircuitRuns, measure: Measure, circuit: Circuit, options: RunOptions) -> CircuitResult:
    """Measures circuits, and the empty one beside them."""
    graph, axes = circuit.graph, circuit.stack_axes
    masks = runs.laid_out(circuit.mask, circuit.axes)
    progress = options.get("progress")
    if is_traced(masks):
        found = runs.metrics(jnp.concatenate([masks, jnp.zeros_like(masks[:1])]), measure)
    else:
        every = np.concatenate([np.asarray(masks), np.zeros_like(masks[:1])])
        found = _measured_once(runs, measure, every, progress)
    values, empty = found[:-1], found[-1]
    _check_gap(runs.model, measure.baseline, empty)
    counts = circuit.mask.sum(axis=(-2, -1))
    ablation = options.get("ablation", "patching")
    return CircuitResult(
        values.reshape(*circuit.mask.shape[: len(axes)], *values.shape[1:]), measure.baseline, empty,
        counts.reshape(*counts.shape[: len(axes)], -1).mean(axis=-1), axes, graph.n_edges,
        ablation=ablation if isinstance(ablation, str) else "given values",
    )  # fmt: skip


def _measured_once(runs: CircuitRuns, measure: Measure, masks: np.ndarray, progress: bool | None) -> jax.Array:
    """Measures masks, equal ones once; the mask of all edges is the base run."""
    keys = [mask.tobytes() for mask in masks]
    whole = np.broadcast_to(runs.graph.edges, masks.shape[1:]).astype(masks.dtype).tobytes()
    first = {key: number for number, key in reversed(list(enumerate(keys))) if key != whole}
    numbers = sorted(first.values())
    found = as_numpy(runs.metrics(masks[numbers], measure, progress))
    place = {keys[number]: place for place, number in enumerate(numbers)}
    baseline = as_numpy(measure.baseline)
    return jnp.asarray(np.stack([baseline if key == whole else found[place[key]] for key in keys]))


def _check_gap(model: HookedTransformer, full: jax.Array, empty: jax.Array) -> None:
    """Refuses a metric that is the same with all edges and with none.

    Raises:
        InputError: it is, up to rounding.
    """
    if is_traced(full, empty):
        return
    ends = np.asarray(full, np.float64), np.asarray(empty, np.float64)
    gap, size = abs(ends[0].mean() - ends[1].mean()), max(np.abs(end).max() for end in ends)
    if not gap > rounding(model.cfg) * size:
        raise InputError(
            f"The metric is {ends[0].mean():.4g} with all edges and {ends[1].mean():.4g} with none: there is nothing "
            "that a circuit could carry. Use prompts whose corruption changes the metric, or another ablation."
        )
