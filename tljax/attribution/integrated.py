"""Integrated gradients: the gradient averaged on the way from the base run's values to the source's.

Sundararajan et al. 2017 (arXiv 1703.01365); along the inputs or along each activation as in Hanna et al. 2024 (EAP-IG,
arXiv 2403.17806) and Marks et al. 2024 (sparse feature circuits, arXiv 2403.19647).
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from tljax.attribution.backward import Trajectory, follow, pull_back, trajectory_of
from tljax.attribution.contraction import changed, of_sites, site_products
from tljax.attribution.cotangents import cotangents
from tljax.attribution.options import Along, Estimate, Grid
from tljax.hooks.dictionary import HookEntry
from tljax.hooks.interventions import Replace
from tljax.hooks.points import HookPointSpec, layer_of, point_table
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.engine.base_run import BaseRun
from tljax.patching.engine.run import measure_run
from tljax.patching.engine.sites import Sites
from tljax.patching.metrics.evaluation import Measure
from tljax.processes import as_numpy

Values = Callable[[HookPointSpec], jax.Array]
"""Function from a hook point to the values that a patch writes there, ``[batch, padded_pos, ...]``."""

INPUT = "hook_embed"


@dataclasses.dataclass(frozen=True)
class Completeness:
    """How well integrated gradients add up: over all entries of what was moved, they sum to the effect of moving it.

    Attributes:
        names: what was moved from base to source, each as a whole.
        attributed: sum of the estimates over all its entries, ``[metric, name]``, averaged over prompts.
        exact: effect of replacing it as a whole, ``[metric, name]``.
    """

    names: tuple[str, ...]
    attributed: np.ndarray
    exact: np.ndarray

    @property
    def error(self) -> float:
        """Largest difference between the two, as a share of the largest exact effect."""
        scale = float(np.abs(self.exact).max(initial=0.0))
        return float(np.abs(self.attributed - self.exact).max(initial=0.0)) / scale if scale else 0.0

    def __str__(self) -> str:
        return f"completeness error {self.error:.2g}"


def nodes_of_grid(grid: Grid, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns how far from base to source each point of a grid lies, and its weight.

    >>> [array.tolist() for array in nodes_of_grid("left", 4)]
    [[0.0, 0.25, 0.5, 0.75], [0.25, 0.25, 0.25, 0.25]]
    """
    if grid == "gauss":
        places, weights = np.polynomial.legendre.leggauss(steps)
        return (places + 1) / 2, weights / 2
    first = {"left": 0.0, "midpoint": 0.5, "right": 1.0}[grid]
    return (np.arange(steps) + first) / steps, np.full(steps, 1 / steps)


def extra_points(model: HookedTransformer, along: Along) -> tuple[str, ...]:
    """Returns the points, besides the patched ones, whose values on both runs a path needs."""
    if along == "activation":
        return ()
    outputs = (
        f"blocks.{layer}.{out}" for layer in range(model.cfg.n_layers) for out in ("attn.hook_z", "hook_mlp_out")
    )
    table = point_table(model.cfg)
    return (INPUT,) if along == "inputs" else (INPUT, *(name for name in outputs if name in table))


def integrate(
    model: HookedTransformer,
    base: BaseRun,
    sites: Sites,
    measures: Mapping[str, Measure],
    how: Estimate,
    values: Values,
) -> tuple[np.ndarray, Completeness, float]:
    """Estimates every site: ``[metric, site, batch]``, how well the estimates add up, and the forward passes spent."""
    places, weights = nodes_of_grid(how.grid, how.steps)
    table, own = point_table(model.cfg), {sites.full_name(layer): layer for layer in sites.values}
    moved = tuple(own) if how.along == "activation" else extra_points(model, how.along)
    found: dict[int, jax.Array] = {}
    attributed, exact = [], []
    origin = trajectory_of(model, base)
    start = {name: as_numpy(measure.baseline) for name, measure in measures.items()}
    for name in moved:
        old, new = base.activations[name], values(table[name])
        wanted = (name,) if how.along == "activation" else tuple(dict.fromkeys((*own, name)))
        shapes = {one: base.activations[one].shape for one in wanted}
        total, delta = 0.0, changed(new, old)
        for place, weight in zip(places, weights, strict=True):
            run = _moved(model, base, origin, name, _between(old, new, place))
            slopes = cotangents(measures, run, base.length)
            for point, gradients in pull_back(run, slopes, shapes):
                part = gradients * jnp.asarray(weight, gradients.dtype)
                if point == name:
                    total = total + _whole(delta, part)
                if point in own:
                    products = site_products(sites, base.activations[point], own[point], part)
                    share = products / (1 if how.along == "activation" else len(moved))
                    found[own[point]] = found[own[point]] + share if own[point] in found else share
        attributed.append(as_numpy(total))
        final = as_numpy(_moved(model, base, origin, name, new).final)[:, : base.length]
        exact.append([np.sum(measure_run(one, final) - start[key]) for key, one in measures.items()])
    counts = np.asarray([max(1, one.baseline.size) for one in measures.values()])[:, None]
    completeness = Completeness(moved, np.stack(attributed, axis=1) / counts, np.asarray(exact).T / counts)
    back = 3.0 * how.steps
    shares = [_share(model, name) for name in moved]
    passes = sum(
        share * (how.steps + 1) + back * (share if how.along == "activation" else 1) for share in shares
    )  # fmt: skip
    return of_sites(sites, base, {layer: found[layer] for layer in sites.values}), completeness, passes


def _moved(model: HookedTransformer, base: BaseRun, origin: Trajectory, name: str, value: jax.Array) -> Trajectory:
    """Runs the model with an activation replaced, from its layer on."""
    layer, patch = layer_of(name), (HookEntry(name, Replace(value)),)
    if layer is None:
        return follow(model, base, patch)
    after = follow(model, base, patch, layer, origin.streams[layer])
    return dataclasses.replace(after, streams={**origin.streams, **after.streams})


@jax.jit
def _between(old: jax.Array, new: jax.Array, place: jax.Array) -> jax.Array:
    between = old + (new - old) * jnp.asarray(place, old.dtype)
    return jnp.where(new == old, old, between)


@jax.jit
def _whole(delta: jax.Array, gradients: jax.Array) -> jax.Array:
    """Returns the sum over everything but the metric."""
    products = gradients * delta[None].astype(gradients.dtype)
    return products.sum(axis=tuple(range(1, gradients.ndim)))


def _share(model: HookedTransformer, name: str) -> float:
    """Returns the share of a forward pass that runs when an activation is replaced."""
    return 1 - (layer_of(name) or 0) / max(model.cfg.n_layers, 1)
