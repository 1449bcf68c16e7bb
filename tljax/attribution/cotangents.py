"""The gradient of metrics with respect to the final residual stream, from which a backward pass starts."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.attribution.backward import Trajectory
from tljax.errors import InputError
from tljax.forward.forward import run_forward
from tljax.hooks.dictionary import HookDictionary, HookEntry
from tljax.hooks.interventions import Zero
from tljax.hooks.points import head_points
from tljax.modules.context import AttentionContext
from tljax.patching.metrics.evaluation import Measure
from tljax.patching.metrics.metrics import DeclaredMetric
from tljax.text.padding import pad_axis

_FLAT = 1e-4
"""A gradient smaller than this share of what it is nearby counts as zero by construction."""
_NUDGE = 0.1


def cotangents(
    measures: Mapping[str, Measure], run: Trajectory, length: int, *, constant_norm: bool = False
) -> jax.Array:
    """Differentiates each metric, summed over prompts, with respect to a run's final stream.

    Args:
        measures: the metrics.
        run: the run.
        length: the prompts' length; positions from there on are padding.
        constant_norm: whether the final norm divides by a constant.

    Returns:
        ``[metric, batch, padded_pos, d_model]``.
    """
    final = run.final[:, :length]
    found = [
        _under_constant_norm(one, run, final) if constant_norm else one.gradient(final) for one in measures.values()
    ]
    return jnp.stack([pad_axis(one, run.final.shape[1]) for one in found])


def _under_constant_norm(measure: Measure, run: Trajectory, final: jax.Array) -> jax.Array:
    jax.eval_shape(measure.traced, final)  # its error says what a metric must not do
    norms = [point.name for point in head_points(run.cfg) if point.name.endswith("hook_scale")]
    hooks = HookDictionary(tuple(HookEntry(name, Zero(), "bwd") for name in norms))
    metric, only = measure.metric, measure.positions
    alone = metric.of_one_position() if only and len(only) == 1 and isinstance(metric, DeclaredMetric) else None
    used: Any = metric if alone is None else alone
    kept = slice(None) if alone is None or not only else slice(only[0], only[0] + 1)

    def total(rows: jax.Array) -> jax.Array:
        logits, _ = run_forward(run.cfg, run.params, rows, AttentionContext(), hooks=hooks, start=run.cfg.n_layers)
        return jnp.asarray(used(logits)).sum()

    return jnp.zeros_like(final).at[:, kept].set(jax.grad(total)(final[:, kept]))


def check_slopes(measures: Mapping[str, Measure], run: Trajectory, length: int, found: jax.Array) -> None:
    """Refuses metrics without a gradient.

    Args:
        measures, run, length: as in :func:`cotangents`.
        found: the gradients at the run.

    Raises:
        InputError: a metric's gradient is zero everywhere, or at this very run.
    """
    final = run.final[:, :length]
    noise = np.random.default_rng(0).standard_normal(final.shape).astype(np.float32)
    wide = final.astype(jnp.float32)
    nearby = (wide + _NUDGE * jnp.sqrt(jnp.square(wide).mean()) * noise).astype(final.dtype)
    limit = max(_FLAT, 4 * float(jnp.finfo(final.dtype).eps))
    for number, (name, measure) in enumerate(measures.items()):
        here = found[number]  # an array over several processes cannot be iterated
        there = _size(measure.gradient(nearby))
        if there == 0 and _size(here) == 0:
            raise InputError(
                f"The gradient of {_named(name)} is zero everywhere: it counts, compares or rounds, or does not read "
                "the logits. Take a smooth one, such as LogitDiff or LogProb, or sweep exactly: method='exact'."
            )
        if _size(here) <= limit * there:
            raise InputError(
                f"The gradient of {_named(name)} is zero at this run, because the metric is smallest or largest there: "
                "a distance such as KL from the run itself changes only to second order. Take the gradient at the "
                "other run, gradient_at='source', or integrate it, method='ig', or estimate LogitDiff."
            )


def check_separate(measures: Mapping[str, Measure], run: Trajectory, length: int, found: jax.Array) -> None:
    """Refuses metrics that mix prompts where each prompt's estimate is asked for.

    Raises:
        InputError: a prompt's metric depends on another prompt's logits.
    """
    batch = found.shape[1]
    signs = (np.arange(batch) % 2 * 2 - 1).astype(np.float32)
    for number, (name, measure) in enumerate(measures.items()):
        gradient = found[number]
        if isinstance(measure.metric, DeclaredMetric) or measure.baseline.ndim == 0 or batch == 1:
            continue
        here = gradient[:, :length]
        signed = measure.gradient(run.final[:, :length], signs)
        if _size(signed - here * signs[:, None, None].astype(here.dtype)) > 1e-3 * _size(here):
            raise InputError(
                f'reduce="none" estimates each prompt\'s {_named(name)} from its own gradient, and this metric of a '
                'prompt depends on other prompts\' logits: average over prompts, reduce="mean", or run them one by one.'
            )


def _named(name: str) -> str:
    return "the metric" if name == "metric" else f"the metric {name!r}"


def _size(array: Any) -> float:
    return float(jnp.sqrt(jnp.square(array.astype(jnp.float32)).sum()))
