"""Contracts what a patch changes with the gradient there, for all sites of a layer at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tljax.numerics import widened
from tljax.patching.engine.base_run import BaseRun
from tljax.patching.engine.edits import expand
from tljax.patching.engine.sites import Sites
from tljax.processes import as_numpy


def site_products(sites: Sites, old: jax.Array, layer: int, gradients: jax.Array) -> jax.Array:
    """Returns ``(source - base) · gradient``, summed over what each site of a layer covers.

    Args:
        sites: the sites.
        old: the base run's activation, ``[batch, padded_pos, ...]``.
        layer: the layer.
        gradients: ``[n, batch, padded_pos, ...]``.

    Returns:
        ``[n, batch, *entries]``, with an axis for each of ``sites.chosen``, in their order.
    """
    return restricted_sum(sites, changed(sites.values[layer][0], old), gradients)


@jax.jit
def changed(new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns ``new - old``, 0 where both are the same infinity, in float32 or wider."""
    new, old = (value.astype(widened(value.dtype)) for value in (new, old))
    return jnp.where(new == old, 0, new - old)


def allowed_masks(sites: Sites) -> list[np.ndarray]:
    """Returns a mask that broadcasts to the activation for each axis that all sites cover in part."""
    axes = sites.row.axes
    return [
        expand(allowed, (axes.index(axis),) if allowed.ndim == 1 else (0, axes.index(axis)), len(axes))
        for axis, allowed in sites.allowed.items()
    ]


def restricted_sum(sites: Sites, delta: jax.Array, gradients: jax.Array) -> jax.Array:
    """Sums ``delta · gradients`` over the axes that do not tell sites apart, where the sites cover them."""
    kept = tuple(sites.row.axes.index(axis) for axis in sites.chosen)
    return _summed(delta, gradients, tuple(allowed_masks(sites)), kept)


@functools.partial(jax.jit, static_argnums=3)
def _summed(delta: jax.Array, gradients: jax.Array, masks: tuple[jax.Array, ...], kept: tuple[int, ...]) -> jax.Array:
    for mask in masks:
        delta = jnp.where(mask, delta, 0)
    product = gradients.astype(widened(gradients.dtype)) * delta[None]
    reduced = tuple(number + 1 for number in range(1, delta.ndim) if number not in kept)
    product = product.sum(axis=reduced, keepdims=True)
    product = product.transpose(0, 1, *(number + 1 for number in kept), *reduced)
    return product.reshape(product.shape[: 2 + len(kept)])


def of_sites(sites: Sites, base: BaseRun, by_layer: dict[int, jax.Array]) -> np.ndarray:
    """Picks each site's entry.

    Args:
        sites: the sites.
        base: the base run.
        by_layer: for each layer, what :func:`site_products` returns.

    Returns:
        ``[n, site, batch]``; 0 where a prompt lacks a site's position.
    """
    numbers = {layer: number for number, layer in enumerate(by_layer)}
    products = np.stack([as_numpy(products) for products in by_layer.values()])  # [layer, n, batch, *entries]
    layer = np.asarray([numbers[int(layer)] for layer in sites.layer])[:, None]
    prompts = np.arange(base.batch)[None]
    entries = [_by_prompt(chosen) for chosen in sites.chosen.values()]
    picked = products[(layer, slice(None), prompts, *entries)]  # [site, batch, n]
    for chosen in entries:
        picked = np.where((chosen >= 0)[..., None], picked, 0)
    return np.moveaxis(picked, -1, 0)


def _by_prompt(chosen: np.ndarray) -> np.ndarray:
    return chosen[:, None] if chosen.ndim == 1 else chosen


def cover(sites: Sites, base: BaseRun, index: np.ndarray, layer: int) -> np.ndarray:
    """Returns a mask of what some sites of a layer cover together, which broadcasts to its activation."""
    axes = sites.row.axes
    shape = base.activations[sites.full_name(layer)].shape
    here = np.asarray([site for site in index if sites.layer[site] == layer], int)
    kept = [axes.index(axis) for axis in sites.chosen]
    mask = np.zeros((base.batch, *(shape[number] for number in kept)), bool)
    entries = [np.broadcast_to(_by_prompt(chosen[here]), (len(here), base.batch)) for chosen in sites.chosen.values()]
    there = np.broadcast_to(np.arange(base.batch)[None], (len(here), base.batch))
    exist = functools.reduce(np.logical_and, [chosen >= 0 for chosen in entries], np.ones(there.shape, bool))
    mask[(there[exist], *(chosen[exist] for chosen in entries))] = True
    order = np.argsort(kept)
    mask = expand(mask.transpose(0, *(order + 1)), (0, *(kept[n] for n in order)), len(shape))
    return functools.reduce(np.logical_and, allowed_masks(sites), mask)
