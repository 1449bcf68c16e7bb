"""Steering sweeps: one vector, added at every layer, at several strengths."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import typed
from tljax.errors import InputError
from tljax.hooks.interventions import Add
from tljax.hooks.names import ActName
from tljax.hooks.points import HookPointSpec
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.assembly import as_result
from tljax.patching.engine.run import Metrics, Reduce, measure_sites
from tljax.patching.result import PatchingResult
from tljax.patching.sources import array_at, is_by_layer, read_source
from tljax.patching.sweep import prepare_sweep, site_grid


@typed
def steering_sweep(
    model: HookedTransformer,
    prompt: Any,
    vector: Any,
    metric: Metrics,
    scales: Sequence[float | int] | np.ndarray | jax.Array,
    activation_name: ActName = "resid_pre",
    axes: Sequence[str] = (),
    *,
    layers: Sequence[int] | int | None = None,
    at: Mapping[str, Any] | None = None,
    reduce: Reduce = "mean",
    max_batch: int | Literal["auto"] = "auto",
    progress: bool | None = None,
) -> PatchingResult:
    """Adds a multiple of a vector to an activation, at each layer and each strength, and measures the metric.

    Args:
        model, metric, activation_name, layers, at, reduce, max_batch, progress: as in :func:`~tljax.patching.sweep`;
            ``at={"pos": -1}`` steers the last position only.
        prompt: the run that is steered: text, a list of texts, or token ids ``[batch, pos]``.
        vector: the vector added, ``[d_model]``; one for each layer, ``[layer, d_model]`` (``[layer, head, d_head]`` if
            the activation has heads); a mapping from layer numbers to vectors; or anything else that broadcasts to the
            activation, as for a sweep (:func:`~tljax.patching.sources.array_at`).
        scales: the factors that ``vector`` is multiplied by.
        axes: as in :func:`~tljax.patching.sweep`; by default ``()``, each layer's activation as a whole.

    Returns:
        The metric, ``["layer", "scale", *axes]`` (no layer axis at the embedding).

    Raises:
        InputError: the vector does not fit, or there are no scales.
    """
    if not len(scales):
        raise InputError("scales= is empty: give at least one number.")
    setup = prepare_sweep(model, prompt, activation_name, layers)
    vectors = vector if is_by_layer(vector) else np.asarray(vector)

    def values(spec: HookPointSpec) -> jax.Array:
        shape = spec.shape(setup.base.batch, setup.base.length)
        one = np.asarray(array_at(vectors, spec, shape, setup.names, model.cfg.n_layers))
        sources = [read_source(model, setup.base, Add(float(scale) * one), setup.names) for scale in scales]
        return jnp.stack([source.values(spec) for source in sources])

    variants = {"scale": [f"{float(scale):g}" for scale in scales]}
    steered = site_grid(model, setup, values, axes, at, variants=variants)
    measured = measure_sites(model, setup.base, steered.sites, metric, max_batch=max_batch, progress=progress)
    return as_result(measured, steered.sizes, steered.names, reduce, setup.name, steered.labels)
