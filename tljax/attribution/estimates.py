"""Estimates the effects of a sweep's sites from gradients."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

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
from tljax.hooks.points import layer_of
from tljax.memory import how_many
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.engine.base_run import BaseRun
from tljax.patching.engine.sites import Sites
from tljax.patching.metrics.evaluation import Measure
from tljax.processes import as_numpy


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
    kinds: Sequence[Sites],
    measures: Mapping[str, Measure],
    how: Estimate,
    *,
    values: Values,
    at_run: BaseRun | None = None,
    at_measures: Mapping[str, Measure] | None = None,
    each_prompt: bool = False,
) -> list[Estimated]:
    """Estimates the sites of some activations; all from one backward pass, if there is no path and no fix.

    Args:
        model, base: the model and its unpatched run.
        kinds: the sites of each activation, which take the first variant of the values.
        measures: the metrics.
        how: the method and its options.
        values: function from any point to the values that a patch writes there.
        at_run: the run whose gradient is taken; by default ``base``.
        at_measures: the metrics, prepared for that run.
        each_prompt: whether each prompt's own metric is estimated, and not only the mean.

    Raises:
        InputError: a point without a gradient, or a metric without one.
    """
    for sites in kinds:
        _check_points(base, sites)
    there = measures if at_measures is None else at_measures
    run = trajectory_of(model, base if at_run is None else at_run)
    slopes = cotangents(there, run, base.length, constant_norm=isinstance(how.rule, RelP))
    if how.method == "attribution":
        check_slopes(there, run, base.length, slopes)
    if each_prompt:
        check_separate(there, run, base.length, slopes)
    passes, completeness = 3.0, [None] * len(kinds)
    if how.method == "ig":
        found = [integrated.integrate(model, base, sites, measures, how, values) for sites in kinds]
        products, completeness, spent = (list(parts) for parts in zip(*found, strict=True))
        passes = sum(spent)
    elif how.drops and model.cfg.n_layers > 1:
        products = _dropped(model, run, base, kinds, slopes, how)
        passes = 1.0 + 2.0 * model.cfg.n_layers
    else:
        rules = relevance_rules(model.cfg, how.rule) if isinstance(how.rule, RelP) else None
        products = first_order(model, run, base, kinds, slopes, how, rules=rules)
    estimated = []
    for sites, product, complete in zip(kinds, products, completeness, strict=True):
        change = {
            name: each if measure.baseline.ndim else each.sum(axis=-1)
            for (name, measure), each in zip(measures.items(), product, strict=True)
        }
        convention = how.convention(atp_star.fixes(sites, how), model.cfg.n_layers)
        estimated.append(Estimated(change, convention, complete, passes))
    return estimated


def first_order(
    model: HookedTransformer,
    run: Trajectory,
    base: BaseRun,
    kinds: Sequence[Sites],
    slopes: jax.Array,
    how: Estimate,
    *,
    rules: Mapping[int, BlockRule] | None = None,
    dropped: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Estimates the sites of each activation, ``[n, site, batch]``, from ``n`` gradients of the final stream."""
    found: list[dict[int, jax.Array]] = [{} for _ in kinds]
    plain = [number for number, sites in enumerate(kinds) if not atp_star.fixes(sites, how)]
    shapes = {name: shape for number in plain for name, shape in shapes_at(base, kinds[number]).items()}
    for name, gradients in pull_back(run, slopes, shapes, rules, dropped) if plain else ():
        for number in plain:
            sites, layer = kinds[number], layer_of(name) or 0
            if layer in sites.values and sites.full_name(layer) == name:
                found[number][layer] = site_products(sites, base.activations[name], layer, gradients)
    return [
        of_sites(sites, base, found[number])
        if number in plain
        else atp_star.fixed_products(model, run, base, sites, slopes, dropped)
        for number, sites in enumerate(kinds)
    ]


def shapes_at(base: BaseRun, sites: Sites) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the patched activations, by full name."""
    return {name: base.activations[name].shape for name in map(sites.full_name, sites.values)}


def _dropped(
    model: HookedTransformer,
    run: Trajectory,
    base: BaseRun,
    kinds: Sequence[Sites],
    slopes: jax.Array,
    how: Estimate,
) -> list[np.ndarray]:
    """Sums the estimates' sizes over dropped layers, divided by ``n_layers - 1``, ``[metric, site, batch]`` each."""
    n_layers, metrics = model.cfg.n_layers, len(slopes)
    largest = max(base.activations[name].nbytes for sites in kinds for name in shapes_at(base, sites))
    at_once = max(1, how_many(4 * max(largest, run.final.nbytes)) // metrics)
    totals: list[Any] = [0.0] * len(kinds)
    for first in range(0, n_layers, at_once):
        layers = np.arange(first, min(first + at_once, n_layers))
        repeated = jnp.repeat(slopes, len(layers), axis=0)
        found = first_order(model, run, base, kinds, repeated, how, dropped=np.tile(layers, metrics))
        for number, part in enumerate(found):
            sizes = np.abs(part.reshape(metrics, len(layers), *part.shape[1:]))
            totals[number] = totals[number] + sizes.sum(axis=1)
    return [as_numpy(total / (n_layers - 1)) for total in totals]


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
