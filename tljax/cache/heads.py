"""Each attention head's share of the residual stream."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from tljax.cache import access
from tljax.cache.slices import SliceInput
from tljax.cache.writers import After, Heads, Part, Results, Rows, read_parts

if TYPE_CHECKING:
    from tljax.cache.activation_cache import ActivationCache


def after_names(cache: "ActivationCache", layer: int, norm: str) -> list[str]:
    """The scale of the norm after a layer's attention (``"ln1_post"``) or MLP (``"ln2_post"``), where there is one."""
    return [f"blocks.{layer}.{norm}.hook_scale"] if cache.cfg.has_norms_after else []


def after_of(cache: "ActivationCache", layer: int, norm: str) -> After | None:
    """That norm as it was in the run."""
    if not cache.cfg.has_norms_after:
        return None
    weight = cache.model.params["blocks"][layer][norm]["w"]
    gain = 1 + weight if cache.cfg.rmsnorm_uses_offset else weight
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
    cfg = cache.cfg
    names = [f"blocks.{layer}.attn.hook_result" for layer in range(cfg.n_layers)]
    if all(name in cache.cache_dict for name in names):
        return cache
    access.require(cache, [name.replace("hook_result", "hook_z") for name in names], "compute_head_results")
    results = {}
    with jax.default_matmul_precision(cfg.matmul_precision):
        for name, block in zip(names, cache.model.params["blocks"], strict=True):
            z = cache[name.replace("hook_result", "hook_z")]
            results[name] = jnp.einsum("...he,hed->...hd", z, block["attn"]["W_O"])
    return cache.with_activations(results | cache.cache_dict)


def stack_head_results(
    cache: "ActivationCache",
    layer: int | None,
    return_labels: bool,
    incl_remainder: bool,
    pos_slice: SliceInput,
    apply_ln: bool,
) -> Any:
    """See :meth:`ActivationCache.stack_head_results`."""
    cfg = cache.cfg
    access.refuse_norms_of_the_stream(cfg, "stack_head_results")
    last = access.bounded_layer(cfg, layer)
    names, scale = head_names(cache, last), access.scale_name(cfg, last) if apply_ln else None
    stream = access.stream_name(cache, last) if incl_remainder or not names else None
    needed = [*names, *([] if scale is None else [scale]), *([] if stream is None else [stream])]
    access.require(cache, needed, "stack_head_results")
    labels = head_labels(cache, last) + ["remainder"] * incl_remainder
    parts: list[Part] = head_parts(cache, last) or [Rows((cache[stream],))]  # without heads, for the shape
    reader = access.reader_of(cache, last, False, apply_ln)
    like = cache[names[0]][..., 0, :] if names and parts else cache[stream]
    taken = access.position_cut(pos_slice, like)
    remainder_of = cache[stream] if incl_remainder and names else None
    stack = read_parts(parts, reader, taken, remainder_of, cfg=cfg, centred=apply_ln and access.centres(cfg, last))
    stack = stack if names or incl_remainder else stack[:0]
    return (stack, labels) if return_labels else stack
