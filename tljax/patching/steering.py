"""Steering sweeps: one vector, added at every layer, at several strengths."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tljax.errors import InputError
from tljax.hooked_transformer import HookedTransformer
from tljax.hooks.interventions import Add
from tljax.hooks.names import layer_of
from tljax.patching.measured import Metrics, Reduce, measure_sites
from tljax.patching.result import PatchingResult
from tljax.patching.sites import Sites, grid
from tljax.patching.sources import read_source
from tljax.patching.sweep import choose_entries, prepare_sweep, site_labels


def steering_sweep(
    model: HookedTransformer,
    prompt: Any,
    vector: Any,
    metric: Metrics,
    scales: Sequence[float | int] | np.ndarray | jax.Array,
    activation_name: str = "resid_pre",
    axes: Sequence[str] = (),
    *,
    layers: Sequence[int] | None = None,
    at: Mapping[str, Any] | None = None,
    reduce: Reduce = "mean",
    max_batch: int | Literal["auto"] = "auto",
) -> PatchingResult:
    """Adds a multiple of a vector to an activation, at each layer and each strength, and measures.

    Args:
        model, prompt, metric, activation_name, layers, at, reduce, max_batch: as in :func:`~tljax.patching.sweep`;
            ``at={"pos": -1}`` steers the last position only.
        vector: what is added: a vector ``[d_model]``, one for each layer ``[layer, d_model]`` (``[layer, head,
            d_head]`` where the activation has heads), or else anything that broadcasts to the activation.
        scales: what it is multiplied by.
        axes: further axes along which sites are told apart, such as ``("pos",)``.

    Returns:
        The metric, ``["layer", "scale", *axes]`` (no layer axis at the embedding).

    Raises:
        InputError: the vector does not fit, or there are no scales.
    """
    if not len(scales):
        raise InputError("scales= is empty: give at least one number.")
    setup = prepare_sweep(model, prompt, activation_name, layers)
    vectors = np.asarray(vector)
    per_layer = vectors.shape == (model.cfg.n_layers, *setup.spec.shape()[2:])
    values = {}
    for layer in setup.layers:
        one = vectors[layer] if per_layer else vectors
        steered = [
            read_source(model, setup.base, Add(float(scale) * one), setup.names).values(setup.spec_at(layer))
            for scale in scales
        ]
        values[layer] = jnp.stack(steered)
    chosen, allowed = choose_entries(setup.spec, setup.base, axes, at or {})
    entries = {"layer": np.asarray(setup.layers), "scale": np.arange(len(scales)), **chosen}
    coordinates = grid(entries)
    layer, variant = coordinates.pop("layer"), coordinates.pop("scale")
    sites = Sites(setup.point, layer, values, variant, coordinates, allowed)
    labels = site_labels(model, setup, entries) | {"scale": [f"{float(scale):g}" for scale in scales]}
    measured = measure_sites(model, setup.base, sites, metric, max_batch=max_batch)
    names = tuple(axis for axis in entries if axis != "layer" or layer_of(setup.names[0]) is not None)
    return measured.as_result([len(entries[axis]) for axis in names], names, reduce, activation_name, labels)
