"""Scores of one batch of prompts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.circuits.graph import ResidualGraph
from tljax.circuits.replacement import Replacement, read_replacement
from tljax.circuits.scores.batches import Pairs, PerBatch, SomePrompts, run_pairs
from tljax.circuits.scores.contraction import Gradients, edge_products
from tljax.circuits.scores.exact import exact_edge_effects, exact_points
from tljax.circuits.scores.flow_routes import flow_points, flow_shares
from tljax.circuits.scores.gradients import final_slope, layer_slopes
from tljax.circuits.scores.integrated import Ends, Step, input_path, mixed_path
from tljax.circuits.scores.plan import Plan
from tljax.circuits.writers import writer_points
from tljax.errors import InputError
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.engine.base_run import BaseRun
from tljax.patching.metrics.evaluation import Measure
from tljax.patching.metrics.metrics import KL
from tljax.processes import as_numpy
from tljax.text import positions


@dataclasses.dataclass(frozen=True)
class BatchScores:
    """Scores of one batch.

    Attributes:
        values: scores, kept for each prompt or summed over them.
        baseline, source_metric: metric of both runs, one number or one for each prompt.
        completeness: what scores miss of the sum that they should have, likewise.
        per_prompt: whether each prompt has a metric of its own, so that sums become means.
    """

    values: np.ndarray
    baseline: np.ndarray | None = None
    source_metric: np.ndarray | None = None
    completeness: np.ndarray | None = None
    per_prompt: bool = True


def score_batch(
    model: HookedTransformer,
    graph: ResidualGraph,
    plan: Plan,
    pairs: Pairs,
    metrics: PerBatch | None,
    rows: slice,
    advance: Callable[[float], None],
) -> BatchScores:
    """Scores the edges for some of the prompts.

    Args:
        model, graph, plan: the model, its graph and what to compute.
        pairs: all prompts.
        metrics: their metric; ``None`` if the method has none.
        rows: the prompts of this batch.
        advance: called after each run.

    Raises:
        InputError: see :func:`~tljax.circuits.edge_scores`.
    """
    own, longest = pairs.rows(rows), pairs.n_positions
    if metrics is None:
        return _flow(model, graph, plan, own, longest)
    base = run_pairs(model, own.base, writer_points(graph))
    measure = metrics.measure(base, rows)
    baseline = as_numpy(measure.baseline)
    _check_baseline(baseline, plan, rows.start)
    replacement = read_replacement(model, base, graph, own.source, plan.ablation, align=own.align)
    source = _at_own_positions(base, replacement, own)
    ends = Ends.of(model, graph, base, replacement.activations, source, plan.through_norms)
    _check_changes(ends, pairs, rows)
    source_metric = _source_metric(measure, metrics, base, replacement.run, source, rows)
    values: Any = 0.0
    for step in plan.runs(ends):
        slopes = [final_slope(measure, step.path.final[run], base.length, weight)[1]
                  for run, weight in zip(step.paths(), step.weights, strict=True)]  # fmt: skip
        slope = jnp.concatenate(slopes) if len(slopes) > 1 else slopes[0]
        if plan.convention.method == "eap":
            _check_slope(slope, base, baseline, source_metric, metrics.metric, rows.start)
        values = values + _step_scores(plan, ends, step, slope)
        advance(len(step.weights))
    _check_scores(values, plan, rows.start)
    completeness = _missed(plan, ends, measure, values, baseline, source_metric)
    if plan.by_position:
        values = values[..., :longest, :, :]
    return BatchScores(values, baseline, source_metric, completeness, bool(baseline.ndim))


def score_exactly(
    model: HookedTransformer,
    graph: ResidualGraph,
    plan: Plan,
    pairs: Pairs,
    metrics: PerBatch,
    edges: Any,
    progress: bool | None,
) -> BatchScores:
    """Measures the exact effects of edges on all prompts; arguments as for :func:`score_batch`."""
    rows = slice(0, len(pairs))
    base = run_pairs(model, pairs.base, exact_points(graph))
    measure = metrics.measure(base, rows)
    baseline = as_numpy(measure.baseline)
    _check_baseline(baseline, plan, 0)
    replacement = read_replacement(model, base, graph, pairs.source, plan.ablation, align=pairs.align)
    _check_changes(Ends.of(model, graph, base, replacement.activations, None, False), pairs, rows)
    source = _at_own_positions(base, replacement, pairs)
    source_metric = _source_metric(measure, metrics, base, replacement.run, source, rows)
    found = exact_edge_effects(
        model, base, graph, replacement.activations, metrics.metric, edges, progress=progress
    )  # fmt: skip
    values = np.moveaxis(found.values, 2, 0) if baseline.ndim else found.values
    asked = values if edges is None else values[..., np.asarray(edges)]
    _check_scores(asked, plan, 0)
    values = values if plan.by_prompt or not baseline.ndim else values.sum(axis=0)
    return BatchScores(values, baseline, source_metric, per_prompt=bool(baseline.ndim))


def _flow(model: HookedTransformer, graph: ResidualGraph, plan: Plan, own: Pairs, longest: int) -> BatchScores:
    base = run_pairs(model, own.base, (*writer_points(graph), *flow_points(graph)))
    text = np.zeros((base.batch, base.padded_length), bool)
    text[:, : base.length] = True if base.text is None else base.text
    values = flow_shares(
        model.cfg, model.params, graph, base, text,
        by_prompt=plan.by_prompt, by_position=plan.by_position, through_norms=plan.through_norms,
    )  # fmt: skip
    return BatchScores(values[..., :longest, :, :] if plan.by_position else values)


def _step_scores(plan: Plan, ends: Ends, step: Step, slope: jax.Array) -> np.ndarray:
    """Contracts what writers change by with the gradients at readers in the runs of a step."""
    cfg, params, context, runs = ends.cfg, ends.params, ends.context_of(len(step.weights)), len(step.weights)
    layers, _ = layer_slopes(cfg, params, context, step.path, slope)
    heads_now = {name: step.path.activations[name] for name in ends.heads} if plan.through_norms else None
    changes, gradients = step.changes, Gradients(step.path.streams, tuple(layers), slope)
    if plan.by_position:
        changes, heads_now = _in_text(ends, (changes, heads_now))
        gradients = _in_text(ends, gradients, runs)
    return edge_products(
        cfg, params, ends.graph, ends.context, changes, gradients,
        by_prompt=plan.by_prompt, by_position=plan.by_position, runs=runs, heads_now=heads_now,
    )  # fmt: skip


def _in_text(ends: Ends, tree: Any, copies: int = 1) -> Any:
    """Moves arrays ``[copies * batch, pos, ...]`` so that every prompt's text begins at position 0."""
    if ends.text[:, 0].all():
        return tree
    text = np.tile(ends.text, (copies, 1))
    places, there = positions.find(text, np.arange(text.shape[1]))

    def moved(array: jax.Array) -> jax.Array:
        shape = *places.shape, *(1,) * (array.ndim - 2)
        taken = jnp.take_along_axis(array, places.reshape(shape), axis=1)
        return jnp.where(there.reshape(shape), taken, 0)

    return jax.tree.map(moved, tree)


def _at_own_positions(base: BaseRun, replacement: Replacement, own: Pairs) -> BaseRun | None:
    """Returns the source's run if its tokens stand where the base's do."""
    run = replacement.run
    if run is None or own.align is not None or run.padded_length != base.padded_length or run.length != base.length:
        return None
    same = run.text is None if base.text is None else run.text is not None and (run.text == base.text).all()
    return run if same else None


def _source_metric(
    measure: Measure | SomePrompts,
    metrics: PerBatch,
    base: BaseRun,
    run: BaseRun | None,
    source: BaseRun | None,
    rows: slice,
) -> np.ndarray | None:
    if source is not None:
        return as_numpy(measure.traced(source.final[:, : base.length]))
    value = None if run is None else metrics.of_source(run, rows)
    return None if value is None else as_numpy(value)


def _missed(
    plan: Plan,
    ends: Ends,
    measure: Measure | SomePrompts,
    values: np.ndarray,
    baseline: np.ndarray,
    source_metric: np.ndarray | None,
) -> np.ndarray | None:
    """Returns what scores miss of the effect that they should add up to."""
    if plan.adds_up is None:
        return None
    if plan.adds_up == "all":
        end = measure.traced(mixed_path(ends, 1.0).final[:, : ends.base.length])
    elif ends.source is not None and source_metric is not None:
        end = source_metric
    else:
        end = measure.traced(input_path(ends, 1.0).final[:, : ends.base.length])
    effect = as_numpy(end) - baseline
    edges = values if plan.adds_up == "all" else values[..., :1, :]
    whole = edges.sum(axis=(-2, -1))
    whole = whole.sum(axis=-1) if plan.by_position else whole
    if plan.by_prompt or not effect.ndim:
        return whole - effect
    return (whole - effect.sum())[None] / len(effect) * np.ones_like(effect)


def _check_baseline(baseline: np.ndarray, plan: Plan, first: int) -> None:
    if plan.by_prompt and not baseline.ndim:
        raise InputError(
            'reduce="none" keeps scores for each prompt, and the metric returns one number for all. Index all prompts, '
            "logits[:, -1, token], instead of logits[0, -1, token]."
        )
    if (wrong := np.flatnonzero(~np.isfinite(np.atleast_1d(baseline)))).size:
        value = np.atleast_1d(baseline)[wrong[0]]
        raise InputError(
            f"The metric is {value} on the base run{_of_prompt(baseline, first + wrong[0])}: scores need a finite one. "
            "Are the model's parameters and the metric's numbers finite?"
        )


def _check_changes(ends: Ends, pairs: Pairs, rows: slice) -> None:
    """Refuses a source that equals the prompts."""
    if any(bool(change.any()) for change in ends.changes.values()) or rows.stop - rows.start < len(pairs):
        return
    raise InputError(
        "The replacement equals the base run everywhere, so no edge has an effect. Are prompt and source the same, or "
        "does align= leave every token as it is?"
    )


def _check_slope(
    slope: jax.Array, base: BaseRun, baseline: np.ndarray, source: np.ndarray | None, metric: Any, first: int
) -> None:
    """Refuses a metric that has no gradient at the base run because it is at its minimum there."""
    sizes = jnp.linalg.norm(slope.astype(jnp.float32), axis=-1) * jnp.linalg.norm(
        base.final.astype(jnp.float32), axis=-1
    )
    reach = as_numpy(sizes.sum(axis=1))  # how far the metric could move, to first order, if the stream doubled
    reach = reach if baseline.ndim else reach.sum()
    scale = np.abs(baseline) if source is None else np.maximum(np.abs(baseline), np.abs(source))
    inner = getattr(metric, "metric", metric)
    flat = (reach <= 1e-4 * scale) | (isinstance(inner, KL) & (np.abs(baseline) < 1e-6))
    if np.all(flat):
        raise InputError(
            f"The metric has no gradient at the base run (metric {float(np.mean(baseline)):.3g}): it is at a minimum "
            "or does not depend on the logits there, as KL to the base run itself. Measure the distance from the "
            'source\'s logits, KL(model(source)), or take LogitDiff; or a method with a path: method="eap-ig".'
        )


def _check_scores(values: np.ndarray, plan: Plan, first: int) -> None:
    finite = np.isfinite(values)
    if finite.all():
        return
    where = ""
    if plan.by_prompt:
        where = f" for prompt {first + int(np.flatnonzero(~finite.reshape(len(values), -1).all(axis=1))[0])}"
    raise InputError(
        f"Scores are not finite{where}: an activation, or the metric's gradient, is NaN or infinite there. Look at "
        "model.run_with_cache(prompt), and at the metric's derivative."
    )


def _of_prompt(baseline: np.ndarray, number: int) -> str:
    return f" for prompt {number}" if baseline.ndim else ""
