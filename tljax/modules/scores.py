"""From query-key products to attention patterns: masks, the ALiBi bias, softmax with and without sinks."""

import math

import jax
import jax.numpy as jnp

from tljax.config import HookedTransformerConfig, LayerKind
from tljax.numerics import widened


def visible(
    cfg: HookedTransformerConfig,
    kind: LayerKind,
    query_pos: jax.Array,
    key_pos: jax.Array,
    token_mask: jax.Array | None,
) -> jax.Array | None:
    """Returns which keys a query may attend to, boolean ``[batch or 1, 1, query_pos, key_pos]``; ``None`` means all."""
    query, key = query_pos[:, None], key_pos[None, :]
    mask = None
    if cfg.attention_dir == "causal":
        mask = key <= query
    if kind.local:
        assert cfg.window_size is not None
        window = (key > query - cfg.window_size) & (key < query + cfg.window_size)
        mask = window if mask is None else mask & window
    if mask is not None:
        mask = mask[None, None]
    if token_mask is not None:
        keys = token_mask[:, None, None, :]
        mask = keys if mask is None else mask & keys
    return mask


def alibi_slopes(n_heads: int, bias_max: float = 8.0) -> tuple[float, ...]:
    """Returns the slope of each head's linear bias (Press et al. 2022, ALiBi).

    For a power of two heads, ``2 ** (-bias_max * h / n_heads)`` with ``h`` from 1; for another number, those of the
    next lower power of two and then every second one of twice that power.
    """
    below = 2 ** math.floor(math.log2(n_heads))
    own = [2.0 ** (-bias_max * (head + 1) / below) for head in range(below)]
    between = [2.0 ** (-bias_max * (head + 0.5) / below) for head in range(0, n_heads - below)]
    return tuple(own + between)


def alibi_bias(
    cfg: HookedTransformerConfig, query_pos: jax.Array, key_pos: jax.Array, token_mask: jax.Array | None
) -> jax.Array:
    """Returns the ALiBi bias of the scores, ``slope * (key - query)``, ``[batch or 1, head, query_pos, key_pos]``.

    Under ``alibi_rounded`` it is the same for every query and counts keys from the first that is not padding, because
    rounding makes it depend on more than the distance.
    """
    dtype = widened(cfg.jnp_dtype)
    slopes = jnp.asarray(alibi_slopes(cfg.n_heads, cfg.alibi_bias_max), dtype)
    if cfg.alibi_rounded:
        keys = key_pos[None, :] if token_mask is None else jnp.cumsum(token_mask, axis=1) - 1
        product = _as_bfloat16(slopes)[None, :, None] * _as_bfloat16(keys.astype(dtype))[:, None, :]
        return (_as_bfloat16(product) / cfg.attn_scale).astype(cfg.jnp_dtype)[:, :, None, :]
    distance = (key_pos[None, :] - query_pos[:, None]).astype(dtype)
    return (slopes[:, None, None] * distance[None]).astype(cfg.jnp_dtype)[None]


def _as_bfloat16(x: jax.Array) -> jax.Array:
    """Rounds to bfloat16 and keeps the dtype: a cast to and fro would be compiled away."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def softmax(scores: jax.Array, sinks: jax.Array | None = None) -> jax.Array:
    """Computes softmax over keys in float32; a row with every key masked is all zeros, with zero gradient, not NaN.

    Args:
        scores: ``[batch, head, query_pos, key_pos]``.
        sinks: ``[head]``, the score of one more key that takes weight and gives no value: rows then sum to less than
            one (gpt-oss).
    """
    wide = scores.astype(widened(scores.dtype))
    peak = jax.lax.stop_gradient(wide.max(axis=-1, keepdims=True))
    sink = None if sinks is None else sinks.astype(wide.dtype)[None, :, None, None]
    if sink is not None:
        peak = jnp.maximum(peak, jax.lax.stop_gradient(sink))
    peak = jnp.where(jnp.isfinite(peak), peak, 0)
    weights = jnp.exp(wide - peak)
    total = weights.sum(axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(sink - peak)
    return (weights / jnp.where(total == 0, 1, total)).astype(scores.dtype)
