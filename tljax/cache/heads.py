"""Each attention head's share of the residual stream."""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from tljax.cache import access
from tljax.cache.slices import SliceInput
from tljax.cache.stacking import stack_units
from tljax.cache.writers import After, Heads, Part, Results
from tljax.hooks.splices import value_after
from tljax.modules.norm import norm_gain
from tljax.numerics import matmul_precision
from tljax.quantized_weight import as_floats

if TYPE_CHECKING:
    from tljax.cache.activation_cache import ActivationCache


def after_names(cache: "ActivationCache", layer: int, norm: str) -> list[str]:
    """Returns the name of the scale of the norm after attention (``"ln1_post"``) or MLP (``"ln2_post"``), if any."""
    return [f"blocks.{layer}.{norm}.hook_scale"] if cache.cfg.has_norms_after else []


def after_of(cache: "ActivationCache", layer: int, norm: str) -> After | None:
    """Returns the norm after a layer's attention or MLP with its cached scale, or ``None`` if there is none."""
    if not cache.cfg.has_norms_after:
        return None
    gain = norm_gain(cache.cfg, cache.model.params["blocks"][layer][norm])
    assert gain is not None  # norms after a sublayer are never folded
    return After(cache[f"blocks.{layer}.{norm}.hook_scale"], gain)


def head_names(cache: "ActivationCache", last: int) -> list[str]:
    """Returns the names of the activations that the heads of the first ``last`` layers are computed from."""
    names = []
    for layer in range(last):
        result = f"blocks.{layer}.attn.hook_result"
        names.append(result if result in cache.cache_dict else f"blocks.{layer}.attn.hook_z")
        names += after_names(cache, layer, "ln1_post")
    return names


def head_parts(cache: "ActivationCache", last: int) -> list[Part]:
    """Returns the heads of the first ``last`` layers, one part a layer."""
    parts: list[Part] = []
    for layer in range(last):
        after = after_of(cache, layer, "ln1_post")
        result = cache.cache_dict.get(f"blocks.{layer}.attn.hook_result")
        if result is None:
            weight = as_floats(cache.model.params["blocks"][layer]["attn"]["W_O"])
            parts.append(Heads(cache[f"blocks.{layer}.attn.hook_z"], weight, after))
        else:
            parts.append(Results(result, after))
    return parts


def head_labels(cache: "ActivationCache", last: int) -> list[str]:
    """Returns ``["L0H0", "L0H1", …]``."""
    return [f"L{layer}H{head}" for layer in range(last) for head in range(cache.cfg.n_heads)]


@access.checked
def compute_head_results(cache: "ActivationCache") -> "ActivationCache":
    """Returns the cache with every ``attn.hook_result`` ``[batch, pos, head, d_model]``: ``z`` times ``W_O``.

    The cache itself does not change, unlike in TransformerLens: keep what is returned. The ``stack_*`` methods do not
    need this call, and take less memory without it, as they then do not hold every layer's results twice.
    """
    cfg, results = cache.cfg, {}
    points = {layer: f"blocks.{layer}.attn.hook_z" for layer in range(cfg.n_layers)}
    points = {layer: z for layer, z in points.items() if z.replace("hook_z", "hook_result") not in cache.cache_dict}
    access.require(cache, [value_after(z, cfg.splices) for z in points.values()], "compute_head_results")
    with matmul_precision(cfg):
        for layer, z in points.items():
            weight = as_floats(cache.model.params["blocks"][layer]["attn"]["W_O"])
            heads = cache[value_after(z, cfg.splices)]
            results[z.replace("hook_z", "hook_result")] = jnp.einsum("...he,hed->...hd", heads, weight)
    return cache.with_activations(cache.cache_dict | results) if results else cache


@access.checked
def stack_head_results(
    cache: "ActivationCache",
    layer: int | None = -1,
    return_labels: bool = False,
    incl_remainder: bool = False,
    pos_slice: SliceInput = None,
    apply_ln: bool = False,
) -> Any:
    """Stacks what each head adds to the residual stream.

    A head adds its ``hook_result``, passed through the norm after attention if there is one (with its cached scale
    and its weight) and times ``residual_multiplier``. TransformerLens stacks ``hook_result`` itself, so that in such
    models its heads do not add up to ``hook_attn_out``.

    Args:
        layer: stack the heads of the layers before this one; ``None`` or ``-1`` means all.
        return_labels: also return ``["L0H0", "L0H1", …]``.
        incl_remainder: add a last row, ``"remainder"``: the stream that enters ``layer`` minus the heads.
        pos_slice: positions to keep, of each prompt's text; a number drops the axis.
        apply_ln: apply the norm that reads the stream at ``layer``, with its cached scale.

    Returns:
        ``[layer * head, batch, pos, d_model]``, and the labels if asked for.
    """
    last = access.bounded_layer(cache.cfg, layer)
    stack = stack_units(
        cache, "stack_head_results", head_names(cache, last), lambda: head_parts(cache, last), last,
        pos_axis=-3, incl_remainder=incl_remainder, pos_slice=pos_slice, apply_ln=apply_ln,
    )  # fmt: skip
    return (stack, head_labels(cache, last) + ["remainder"] * incl_remainder) if return_labels else stack
