"""Each neuron's share of the residual stream."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.cache import access
from tljax.cache.heads import after_names, after_of
from tljax.cache.slices import Cut, SliceInput, cut
from tljax.cache.writers import Neurons, Part, Rows, read_parts
from tljax.config import HookedTransformerConfig
from tljax.errors import CacheError, InputError

if TYPE_CHECKING:
    from tljax.cache.activation_cache import ActivationCache


def refuse_without_neurons(cfg: HookedTransformerConfig, layers: range, what: str) -> None:
    """Refuses models whose MLPs have no neurons that every token goes through.

    Raises:
        InputError: there is no MLP, or a layer has a mixture of experts.
    """
    if cfg.attn_only and layers:
        raise InputError(f"{what} needs an MLP, and this model is attention-only.")
    for layer in layers:
        if cfg.has_experts(cfg.layer_kind(layer)):
            raise InputError(
                f"{what} needs neurons that every token goes through, but layer {layer} has a mixture of experts. Take "
                "the layer's whole output (cache['mlp_out', layer], expand_neurons=False), or the neurons of each "
                f"token's chosen experts: cache['blocks.{layer}.mlp.experts.hook_post'] [batch, pos, choice, neuron] "
                f"and model.blocks[{layer}].mlp.experts.W_out[indices], indices of "
                f"cache['blocks.{layer}.mlp.hook_expert_indices']."
            )


def neuron_names(cache: "ActivationCache", layers: range) -> list[str]:
    """What the neurons of layers are computed from."""
    return [
        name
        for layer in layers
        for name in (f"blocks.{layer}.mlp.hook_post", *after_names(cache, layer, "ln2_post"))
    ]  # fmt: skip


def neuron_parts(cache: "ActivationCache", layers: range, chosen: Cut | None = None) -> list[Part]:
    """The neurons of layers, or the chosen ones of each."""
    parts: list[Part] = []
    for layer in layers:
        acts, weight = cache[f"blocks.{layer}.mlp.hook_post"], cache.model.params["blocks"][layer]["mlp"]["W_out"]
        if chosen is not None:
            acts, weight = chosen(acts, -1), chosen(weight, 0)
        parts.append(Neurons(acts, weight, after_of(cache, layer, "ln2_post")))
    return parts


def neuron_labels(layers: range, chosen: np.ndarray) -> list[str]:
    """``["L0N0", "L0N1", …]``."""
    return [f"L{layer}N{neuron}" for layer in layers for neuron in chosen]


def _choose(cfg: HookedTransformerConfig, neuron_slice: SliceInput) -> tuple[Cut | None, np.ndarray]:
    """The slice, a number as a row of one, and the numbers of the neurons it keeps."""
    width = cfg.d_mlp or 0
    if isinstance(neuron_slice, int | np.integer) and not isinstance(neuron_slice, bool):
        neuron_slice = [int(neuron_slice)]
    chosen = cut(neuron_slice, width, "an MLP has {} neurons")
    if chosen is None:
        return None, np.arange(width)
    if isinstance(chosen.index, jax.core.Tracer):
        raise CacheError("neuron_slice says how many neurons there will be: give numbers, not an array under trace.")
    return chosen, np.arange(width)[slice(*chosen.bounds) if chosen.index is None else np.asarray(chosen.index)]


def get_neuron_results(
    cache: "ActivationCache", layer: int, neuron_slice: SliceInput, pos_slice: SliceInput, project_output_onto: Any
) -> jax.Array:
    """See :meth:`ActivationCache.get_neuron_results`."""
    cfg = cache.cfg
    access.refuse_norms_of_the_stream(cfg, "get_neuron_results")
    layer = access.one_layer(cfg, layer)
    layers = range(layer, layer + 1)
    refuse_without_neurons(cfg, layers, "get_neuron_results")
    access.require(cache, neuron_names(cache, layers), "get_neuron_results")
    reader = access.reader_of(cache, layer, False, False, access.directions(cfg, project_output_onto))
    chosen, _ = _choose(cfg, neuron_slice)
    parts = neuron_parts(cache, layers, chosen)
    taken = access.position_cut(pos_slice, cache[f"blocks.{layer}.mlp.hook_post"])
    results = jnp.moveaxis(read_parts(parts, reader, taken, None, cfg=cfg, centred=False), 0, -2)
    results = results[..., 0, :] if isinstance(neuron_slice, int | np.integer) else results
    return access.unprojected_axis(results, project_output_onto)


def stack_neuron_results(
    cache: "ActivationCache",
    layer: int | None,
    pos_slice: SliceInput,
    neuron_slice: SliceInput,
    return_labels: bool,
    incl_remainder: bool,
    apply_ln: bool,
    project_output_onto: Any,
) -> Any:
    """See :meth:`ActivationCache.stack_neuron_results`."""
    cfg = cache.cfg
    access.refuse_norms_of_the_stream(cfg, "stack_neuron_results")
    last = access.bounded_layer(cfg, layer)
    layers = range(last)
    refuse_without_neurons(cfg, layers, "stack_neuron_results")
    names, scale = neuron_names(cache, layers), access.scale_name(cfg, last) if apply_ln else None
    stream = access.stream_name(cache, last) if incl_remainder or not names else None
    needed = [*names, *([] if scale is None else [scale]), *([] if stream is None else [stream])]
    access.require(cache, needed, "stack_neuron_results")
    chosen, numbers = _choose(cfg, neuron_slice)
    labels = neuron_labels(layers, numbers) + ["remainder"] * incl_remainder
    parts: list[Part] = neuron_parts(cache, layers, chosen) or [Rows((cache[stream],))]  # for the shape
    reader = access.reader_of(cache, last, False, apply_ln, access.directions(cfg, project_output_onto))
    taken = access.position_cut(pos_slice, cache[(names or [stream])[0]])
    remainder_of = cache[stream] if incl_remainder and names else None
    centred = apply_ln and access.centres(cfg, last)
    stack = read_parts(parts, reader, taken, remainder_of, cfg=cfg, centred=centred)
    stack = access.unprojected_axis(stack if names or incl_remainder else stack[:0], project_output_onto)
    return (stack, labels) if return_labels else stack
