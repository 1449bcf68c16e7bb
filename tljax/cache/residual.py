"""Reading the residual stream out of a cache: its value at each depth, and the norm that reads it."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from tljax.cache.slices import SliceInput, apply_slice
from tljax.errors import CacheError

if TYPE_CHECKING:
    from tljax.cache.activation_cache import ActivationCache


def _bounded_layer(cache: "ActivationCache", layer: int | None) -> int:
    n_layers = cache.cfg.n_layers
    if layer is None or layer == -1:
        return n_layers
    if not 0 <= layer <= n_layers:
        raise CacheError(f"layer={layer} is out of range: the model has {n_layers} layers (None means all of them).")
    return layer


def accumulated_resid(
    cache: "ActivationCache",
    layer: int | None,
    incl_mid: bool,
    apply_ln: bool,
    pos_slice: SliceInput,
    mlp_input: bool,
    return_labels: bool,
) -> Any:
    """See :meth:`ActivationCache.accumulated_resid`."""
    last = _bounded_layer(cache, layer)
    has_mid = not (cache.cfg.attn_only or cache.cfg.parallel_attn_mlp)
    rows: list[tuple[str, Any]] = []
    for n in range(last + 1):
        if n == cache.cfg.n_layers:
            rows.append(("final_post", ("resid_post", n - 1)))
            continue
        rows.append((f"{n}_pre", ("resid_pre", n)))
        if has_mid and ((incl_mid and n < last) or (mlp_input and n == last)):
            rows.append((f"{n}_mid", ("resid_mid", n)))
    stack = jnp.stack([apply_slice(cache[key], pos_slice, -2) for _, key in rows])
    if apply_ln:
        at_end = last == cache.cfg.n_layers
        stack = apply_ln_to_stack(cache, stack, last, mlp_input, pos_slice, None, recompute_ln=at_end)
    return (stack, [label for label, _ in rows]) if return_labels else stack


def apply_ln_to_stack(
    cache: "ActivationCache",
    residual_stack: jax.Array,
    layer: int | None,
    mlp_input: bool,
    pos_slice: SliceInput,
    batch_slice: SliceInput,
    recompute_ln: bool,
) -> jax.Array:
    """Normalises a stack of residual-stream pieces.

    Args:
        cache: where the scales are.
        residual_stack: ``[component, ..., d_model]``.
        layer: the norm before this layer; ``None``, ``-1`` or ``n_layers`` means ``ln_final``.
        mlp_input: use ``ln2`` of that layer instead of ``ln1``.
        pos_slice, batch_slice: what was sliced out of the stack, to slice the scales alike.
        recompute_ln: normalise each row by its own scale through the model's ``ln_final`` (weights included), instead
            of dividing by the cached scale, which is linear in the stack. Only for the final layer.

    Returns:
        The normalised stack, same shape.
    """
    cfg = cache.cfg
    if cfg.normalization_type is None:
        return residual_stack
    last = _bounded_layer(cache, layer)
    if last == cfg.n_layers and recompute_ln:
        return cache.model.ln_final(residual_stack)
    kind = cfg.normalization_type
    centred = kind.startswith("LN") and not (last == cfg.n_layers and cfg.final_rms)
    if centred:
        residual_stack = residual_stack - residual_stack.mean(axis=-1, keepdims=True)
    name = "ln_final.hook_scale" if last == cfg.n_layers else ("scale", last, "ln2" if mlp_input else "ln1")
    scale = cache[name]
    if cache.has_batch_dim:
        scale = apply_slice(scale, batch_slice, 0)
    if name != "ln_final.hook_scale" and scale.ndim == 3 + cache.has_batch_dim:
        scale = scale[..., 0, :]  # a per-head norm: every head reads the same stream
    scale = apply_slice(scale, pos_slice, -2)
    return residual_stack / scale[None].astype(residual_stack.dtype)
