"""Each neuron's share of the residual stream."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tljax.cache import access
from tljax.cache.heads import after_names, after_of
from tljax.cache.slices import Cut, SliceInput, cut
from tljax.cache.stacking import stack_units
from tljax.cache.writers import Neurons, Part, read_parts
from tljax.config import HookedTransformerConfig
from tljax.errors import CacheError, InputError
from tljax.quantized_weight import as_floats

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
        if cfg.layer_kind(layer).experts:
            raise InputError(
                f"{what} needs neurons that every token goes through, but layer {layer} has a mixture of experts. Take "
                "the layer's whole output (cache['mlp_out', layer], expand_neurons=False), or the neurons of each "
                f"token's chosen experts: cache['blocks.{layer}.mlp.experts.hook_post'] [batch, pos, choice, neuron] "
                f"and model.blocks[{layer}].mlp.experts.W_out[indices], indices of "
                f"cache['blocks.{layer}.mlp.hook_expert_indices']."
            )


def neuron_names(cache: "ActivationCache", layers: range) -> list[str]:
    """Returns the names of the activations that the neurons of ``layers`` are computed from."""
    return [
        name
        for layer in layers
        for name in (f"blocks.{layer}.mlp.hook_post", *after_names(cache, layer, "ln2_post"))
    ]  # fmt: skip


def neuron_parts(cache: "ActivationCache", layers: range, chosen: Cut | None = None) -> list[Part]:
    """Returns the neurons of ``layers``, or the chosen ones of each, one part a layer."""
    parts: list[Part] = []
    for layer in layers:
        acts = cache[f"blocks.{layer}.mlp.hook_post"]
        weight = as_floats(cache.model.params["blocks"][layer]["mlp"]["W_out"])
        if chosen is not None:
            acts, weight = chosen(acts, -1), chosen(weight, 0)
        parts.append(Neurons(acts, weight, after_of(cache, layer, "ln2_post")))
    return parts


def neuron_labels(layers: range, chosen: Iterable[int]) -> list[str]:
    """Returns ``["L0N0", "L0N1", …]``."""
    return [f"L{layer}N{neuron}" for layer in layers for neuron in chosen]


def _choose(cfg: HookedTransformerConfig, neuron_slice: SliceInput) -> tuple[Cut | None, np.ndarray]:
    """Returns the checked slice, with a number as a list of one, and the indices of the neurons it keeps."""
    width = cfg.d_mlp or 0
    if isinstance(neuron_slice, int | np.integer) and not isinstance(neuron_slice, bool):
        neuron_slice = [int(neuron_slice)]
    chosen = cut(neuron_slice, width, "an MLP has {} neurons")
    if chosen is None:
        return None, np.arange(width)
    if isinstance(chosen.index, Tracer):
        raise CacheError("neuron_slice says how many neurons there will be: give numbers, not an array under trace.")
    return chosen, np.arange(width)[slice(*chosen.bounds) if chosen.index is None else np.asarray(chosen.index)]


@access.checked
def get_neuron_results(
    cache: "ActivationCache",
    layer: int,
    neuron_slice: SliceInput = None,
    pos_slice: SliceInput = None,
    project_output_onto: Any = None,
) -> jax.Array:
    """Computes what each neuron of a layer adds to the residual stream: its activation times its row of ``W_out``.

    A norm after the MLP and ``residual_multiplier`` are applied, as in :meth:`stack_head_results`.

    Args:
        layer: the layer; negative numbers count from the end.
        neuron_slice: neurons to keep; a number drops the axis.
        pos_slice: positions to keep, of each prompt's text; a number drops the axis.
        project_output_onto: a direction ``[d_model]``, or several as columns ``[d_model, direction]``: return their
            dot products with each neuron's output, without computing the output itself.

    Returns:
        ``[batch, pos, neuron, d_model]``; projected ``[batch, pos, neuron]``, or with an axis ``direction``.
    """
    cfg = cache.cfg
    layer = access.one_layer(cfg, layer)
    layers = range(layer, layer + 1)
    refuse_without_neurons(cfg, layers, "get_neuron_results")
    access.require(cache, neuron_names(cache, layers), "get_neuron_results")
    reader = access.reader_of(cache, layer, False, False, access.directions(cfg, project_output_onto))
    chosen, _ = _choose(cfg, neuron_slice)
    parts = neuron_parts(cache, layers, chosen)
    taken = access.position_cut(cache, pos_slice, cache[f"blocks.{layer}.mlp.hook_post"])
    results = jnp.moveaxis(read_parts(parts, reader, taken, None, cfg=cfg.computation, centred=False), 0, -2)
    results = results[..., 0, :] if isinstance(neuron_slice, int | np.integer) else results
    return access.unprojected_axis(results, project_output_onto)


@access.checked
def stack_neuron_results(
    cache: "ActivationCache",
    layer: int | None,
    pos_slice: SliceInput = None,
    neuron_slice: SliceInput = None,
    return_labels: bool = False,
    incl_remainder: bool = False,
    apply_ln: bool = False,
    project_output_onto: Any = None,
) -> Any:
    """Stacks what each neuron adds to the residual stream: :meth:`get_neuron_results` over layers.

    Args:
        layer: stack the neurons of the layers before this one; ``None`` or ``-1`` means all.
        pos_slice: positions to keep, of each prompt's text; a number drops the axis.
        neuron_slice: neurons of each layer to keep.
        return_labels: also return ``["L0N0", "L0N1", …]``.
        incl_remainder: add a last row, ``"remainder"``: the stream that enters ``layer`` minus these neurons.
        apply_ln: apply the norm that reads the stream at ``layer``, with its cached scale.
        project_output_onto: a direction ``[d_model]``, or several ``[d_model, direction]``; applied after the norm.

    Returns:
        ``[layer * neuron, batch, pos, d_model]``, and the labels if asked for. A projection replaces ``d_model`` by
        ``direction``, or drops it for a single direction. Without projection or ``pos_slice`` the array is large.
    """
    cfg = cache.cfg
    last = access.bounded_layer(cfg, layer)
    layers = range(last)
    refuse_without_neurons(cfg, layers, "stack_neuron_results")
    chosen, numbers = _choose(cfg, neuron_slice)
    stack = stack_units(
        cache, "stack_neuron_results", neuron_names(cache, layers), lambda: neuron_parts(cache, layers, chosen), last,
        pos_axis=-2, incl_remainder=incl_remainder, pos_slice=pos_slice, apply_ln=apply_ln,
        projection=access.directions(cfg, project_output_onto),
    )  # fmt: skip
    stack = access.unprojected_axis(stack, project_output_onto)
    return (stack, neuron_labels(layers, numbers) + ["remainder"] * incl_remainder) if return_labels else stack
