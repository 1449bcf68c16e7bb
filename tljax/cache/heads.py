"""Each attention head's share of the residual stream."""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from tljax.cache import access
from tljax.cache.slices import SliceInput
from tljax.cache.stacking import stack_units
from tljax.cache.writers import After, Heads, Part, Results
from tljax.modules.norm import norm_gain
from tljax.numerics import matmul_precision

if TYPE_CHECKING:
    from tljax.cache.activation_cache import ActivationCache


def after_names(cache: "ActivationCache", layer: int, norm: str) -> list[str]:
    """The scale of the norm after a layer's attention (``"ln1_post"``) or MLP (``"ln2_post"``), where there is one."""
    return [f"blocks.{layer}.{norm}.hook_scale"] if cache.cfg.has_norms_after else []


def after_of(cache: "ActivationCache", layer: int, norm: str) -> After | None:
    """That norm as it was in the run."""
    if not cache.cfg.has_norms_after:
        return None
    gain = norm_gain(cache.cfg, cache.model.params["blocks"][layer][norm])
    assert gain is not None  # norms after a sublayer are never folded
    return After(cache[f"blocks.{layer}.{norm}.hook_scale"], gain)


def head_names(cache: "ActivationCache", last: int) -> list[str]:
    """What the heads of the first ``last`` layers are computed from."""
    names = []
    for layer in range(last):
        result = f"blocks.{layer}.attn.hook_result"
        names.append(result if result in cache.cache_dict else f"blocks.{layer}.attn.hook_z")
        names += after_names(cache, layer, "ln1_post")
    return names


def head_parts(cache: "ActivationCache", last: int) -> list[Part]:
    """The heads of the first ``last`` layers."""
    parts: list[Part] = []
    for layer in range(last):
        after = after_of(cache, layer, "ln1_post")
        result = cache.cache_dict.get(f"blocks.{layer}.attn.hook_result")
        if result is None:
            weight = cache.model.params["blocks"][layer]["attn"]["W_O"]
            parts.append(Heads(cache[f"blocks.{layer}.attn.hook_z"], weight, after))
        else:
            parts.append(Results(result, after))
    return parts


def head_labels(cache: "ActivationCache", last: int) -> list[str]:
    """``["L0H0", "L0H1", …]``."""
    return [f"L{layer}H{head}" for layer in range(last) for head in range(cache.cfg.n_heads)]


def compute_head_results(cache: "ActivationCache") -> "ActivationCache":
    """See :meth:`ActivationCache.compute_head_results`."""
    cfg, results = cache.cfg, {}
    points = {layer: f"blocks.{layer}.attn.hook_z" for layer in range(cfg.n_layers)}
    points = {layer: z for layer, z in points.items() if z.replace("hook_z", "hook_result") not in cache.cache_dict}
    access.require(cache, list(points.values()), "compute_head_results")
    with matmul_precision(cfg):
        for layer, z in points.items():
            weight = cache.model.params["blocks"][layer]["attn"]["W_O"]
            results[z.replace("hook_z", "hook_result")] = jnp.einsum("...he,hed->...hd", cache[z], weight)
    return cache.with_activations(cache.cache_dict | results) if results else cache


def stack_head_results(
    cache: "ActivationCache",
    layer: int | None,
    return_labels: bool,
    incl_remainder: bool,
    pos_slice: SliceInput,
    apply_ln: bool,
) -> Any:
    """See :meth:`ActivationCache.stack_head_results`."""
    last = access.bounded_layer(cache.cfg, layer)
    stack = stack_units(
        cache, "stack_head_results", head_names(cache, last), lambda: head_parts(cache, last), last,
        pos_axis=-3, incl_remainder=incl_remainder, pos_slice=pos_slice, apply_ln=apply_ln,
    )  # fmt: skip
    return (stack, head_labels(cache, last) + ["remainder"] * incl_remainder) if return_labels else stack
