"""Gradients of a metric at features and error terms: at a run, or averaged on the way to the values of a patch."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from tljax.attribution.backward import Trajectory, follow, pull_back, trajectory_of
from tljax.attribution.contraction import changed
from tljax.attribution.cotangents import check_separate, check_slopes, cotangents
from tljax.attribution.integrated import Completeness, nodes_of_grid
from tljax.attribution.options import Grid
from tljax.dictionaries.attribution.nodes import Nodes, SplicedPoint
from tljax.hooks.dictionary import HookEntry
from tljax.hooks.interventions import Replace
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.engine.run import measure_run
from tljax.patching.metrics.evaluation import Measure

Gradients = dict[str, np.ndarray]
"""For each point, the metric's gradient there, ``[batch, length, ...]``."""


def gradients_at_run(model: HookedTransformer, nodes: Nodes, measure: Measure) -> Gradients:
    """Differentiates the metric, summed over prompts, at the points of all nodes.

    Raises:
        InputError: the metric has no gradient, or mixes prompts.
    """
    base, measures = nodes.base, {"metric": measure}
    run = trajectory_of(model, base)
    slopes = cotangents(measures, run, base.length)
    check_slopes(measures, run, base.length, slopes)
    check_separate(measures, run, base.length, slopes)
    shapes = {name: base.activations[name].shape for name in nodes.names}
    return {name: np.asarray(found[0])[:, : base.length] for name, found in pull_back(run, slopes, shapes)}


def integrated_gradients(
    model: HookedTransformer, nodes: Nodes, measure: Measure, steps: int, grid: Grid
) -> tuple[Gradients, Completeness]:
    """Averages gradients on the way of one dictionary after another from the run to the values of the patch.

    Features and error term of a dictionary move together, all positions at once, and the others follow (Marks et al.
    2024; they take 10 points at left ends, 0/10 to 9/10).
    """
    base, measures = nodes.base, {"metric": measure}
    origin = trajectory_of(model, base)
    check_separate(measures, origin, base.length, cotangents(measures, origin, base.length))
    start, found = np.asarray(measure.baseline), {}
    attributed, exact = [], []
    for point in nodes.points:
        shapes = {name: base.activations[name].shape for name in point.written}
        total = dict.fromkeys(point.written, np.zeros((), np.float32))
        for place, weight in zip(*nodes_of_grid(grid, steps), strict=True):
            run = _moved(model, nodes, origin, point, place)
            slopes = cotangents(measures, run, base.length)
            for name, gradients in pull_back(run, slopes, shapes):
                part = np.asarray(gradients[0])[:, : base.length]
                total[name] = total[name] + part * np.asarray(weight, part.dtype)
        found |= total
        attributed.append(sum(float((total[name] * nodes.delta(name)).sum()) for name in point.written))
        final = np.asarray(_moved(model, nodes, origin, point, 1.0).final)[:, : base.length]
        exact.append(float(np.sum(measure_run(measure, final) - start)))
    count = max(1, start.size)
    names = tuple(point.name for point in nodes.points)
    return found, Completeness(names, np.asarray([attributed]) / count, np.asarray([exact]) / count)


def _moved(model: HookedTransformer, nodes: Nodes, origin: Trajectory, point: SplicedPoint, place: float) -> Trajectory:
    """Runs the model with a dictionary's features and error a share of the way to the values of the patch."""
    base = nodes.base
    entries = [
        HookEntry(name, Replace(_between(base.activations[name], nodes.values[name], place))) for name in point.written
    ]
    if point.layer is None:
        return follow(model, base, entries)
    after = follow(model, base, entries, point.layer, origin.streams[point.layer])
    streams: Mapping[int, jax.Array] = {**origin.streams, **after.streams}
    return Trajectory(after.cfg, after.params, after.tokens, after.context, after.hooks, streams, after.final)


@jax.jit
def _between(old: jax.Array, new: jax.Array, place: jax.Array) -> jax.Array:
    return old + changed(new, old).astype(old.dtype) * jnp.asarray(place, old.dtype)
