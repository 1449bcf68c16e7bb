"""Estimates the effects of a sweep's sites from gradients."""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from tljax.attribution import atp_star, integrated
from tljax.attribution.backward import BlockRule, Trajectory, pull_back, trajectory_of
from tljax.attribution.contraction import of_sites, site_products
from tljax.attribution.convention import Convention
from tljax.attribution.cotangents import check_separate, check_slopes, cotangents
from tljax.attribution.integrated import Completeness, Values
from tljax.attribution.options import Estimate, RelP
from tljax.attribution.relevance import relevance_rules
from tljax.errors import InputError
from tljax.memory import how_many
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.engine.base_run import BaseRun
from tljax.patching.engine.sites import Sites
from tljax.patching.metrics.evaluation import Measure


@dataclasses.dataclass(frozen=True)
class Estimated:
    """Estimated effects of some sites.

    Attributes:
        change: for each metric, ``[site]``, or ``[site, batch]`` if it is one number a prompt.
        convention: what they mean.
        completeness: for integrated gradients, how well they add up.
        passes: forward passes that were spent, a backward pass counting as two.
    """

    change: dict[str, np.ndarray]
    convention: Convention
    completeness: Completeness | None
    passes: float


def estimate_sites(
    model: HookedTransformer,
    base: BaseRun,
    sites: Sites,
    measures: Mapping[str, Measure],
    how: Estimate,
    *,
    values: Values,
    at_run: BaseRun | None = None,
    at_measures: Mapping[str, Measure] | None = None,
    each_prompt: bool = False,
) -> Estimated:
    """Estimates every site.

    Args:
        model, base, sites: the model, its unpatched run and the sites, which take the first variant of the values.
        measures: the metrics.
        how: the method and its options.
        values: function from any point to the values that a patch writes there.
        at_run: the run whose gradient is taken; by default ``base``.
        at_measures: the metrics, prepared for that run.
        each_prompt: whether each prompt's own metric is estimated, and not only the mean.

    Raises:
        InputError: a point without a gradient, or a metric without one.
    """
    _check_points(base, sites)
    run_at = base if at_run is None else at_run
    run, there = trajectory_of(model, run_at), measures if at_measures is None else at_measures
    fixed = atp_star.fixes(sites, how)
    convention, completeness = how.convention(fixed, model.cfg.n_layers), None
    slopes = cotangents(there, run, base.length, constant_norm=isinstance(how.rule, RelP))
    if how.method == "attribution":
        check_slopes(there, run, base.length, slopes)
    if each_prompt:
        check_separate(there, run, base.length, slopes)
    passes = 3.0
    if how.method == "ig":
        products, completeness, passes = integrated.integrate(model, base, sites, measures, how, values)
    elif how.drops and model.cfg.n_layers > 1:
        products = _dropped(model, run, run_at, base, sites, slopes, how)
        passes = 1.0 + 2.0 * model.cfg.n_layers
    else:
        rules = relevance_rules(model.cfg, how.rule) if isinstance(how.rule, RelP) else None
        products = first_order(model, run, run_at, base, sites, slopes, how, rules=rules)
    change = {
        name: found if measure.baseline.ndim else found.sum(axis=-1)
        for (name, measure), found in zip(measures.items(), products, strict=True)
    }
    return Estimated(change, convention, completeness, passes)


def first_order(
    model: HookedTransformer,
    run: Trajectory,
    run_at: BaseRun,
    base: BaseRun,
    sites: Sites,
    slopes: jax.Array,
    how: Estimate,
    *,
    rules: Mapping[int, BlockRule] | None = None,
    dropped: np.ndarray | None = None,
) -> np.ndarray:
    """Estimates every site from one backward pass, ``[n, site, batch]``, for ``n`` gradients of the final stream."""
    if atp_star.fixes(sites, how):
        return atp_star.fixed_products(model, run, run_at, base, sites, slopes, dropped)
    shapes = shapes_at(base, sites, sites.values)
    layers = {sites.full_name(layer): layer for layer in sites.values}
    found = {
        layers[name]: site_products(sites, base.activations[name], layers[name], gradients)
        for name, gradients in pull_back(run, slopes, shapes, rules, dropped)
    }
    return of_sites(sites, base, found)


def shapes_at(base: BaseRun, sites: Sites, layers: Iterable[int]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the patched activations at some layers, by full name."""
    return {name: base.activations[name].shape for name in map(sites.full_name, layers)}


def _dropped(
    model: HookedTransformer,
    run: Trajectory,
    run_at: BaseRun,
    base: BaseRun,
    sites: Sites,
    slopes: jax.Array,
    how: Estimate,
) -> np.ndarray:
    """Sums the estimates' sizes over dropped layers, divided by ``n_layers - 1``, ``[metric, site, batch]``."""
    n_layers, metrics = model.cfg.n_layers, len(slopes)
    largest = max(base.activations[name].nbytes for name in shapes_at(base, sites, sites.values))
    at_once = max(1, how_many(4 * max(largest, run.final.nbytes)) // metrics)
    total = 0.0
    for first in range(0, n_layers, at_once):
        layers = np.arange(first, min(first + at_once, n_layers))
        repeated = jnp.repeat(slopes, len(layers), axis=0)
        found = first_order(model, run, run_at, base, sites, repeated, how, dropped=np.tile(layers, metrics))
        total = total + np.abs(found.reshape(metrics, len(layers), *found.shape[1:])).sum(axis=1)
    return np.asarray(total / (n_layers - 1))


def _check_points(base: BaseRun, sites: Sites) -> None:
    name, row = sites.row.name, sites.row
    if row.holds_numbers:
        raise InputError(f"{name} holds whole numbers, which have no gradient: sweep it exactly, method='exact'.")
    if not sites.enter_stream:
        raise InputError(
            f"{name} is read by every layer, and an estimate differentiates layer by layer: sweep it exactly, "
            "method='exact'."
        )
    if any(base.activations[sites.full_name(layer)].ndim != len(row.axes) for layer in sites.values):
        raise InputError(f"{name} fires several times in a block, once for each of q, k and v: it has no one gradient.")
