"""From query-key products to attention patterns: masks, the ALiBi bias, softmax with and without sinks."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from tljax.config import HookedTransformerConfig, LayerKind
from tljax.modules.activations import soft_cap
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


def numbered_keys(cfg: HookedTransformerConfig, key_pos: jax.Array, token_mask: jax.Array | None) -> jax.Array | None:
    """Returns the number of each key ``[batch or 1, key_pos]`` under ``alibi_rounded``, else ``None``.

    Keys count from the first that is not padding.
    """
    if not cfg.alibi_rounded:
        return None
    return key_pos[None, :] if token_mask is None else jnp.cumsum(token_mask, axis=1) - 1


def alibi_bias(
    cfg: HookedTransformerConfig,
    slopes: jax.Array,
    query_pos: jax.Array,
    key_pos: jax.Array,
    keys: jax.Array | None,
) -> jax.Array:
    """Returns the ALiBi bias of the scores, ``slope * (key - query)``, ``[batch or 1, head, query_pos, key_pos]``.

    Under ``alibi_rounded`` it is the same for every query and reads ``keys`` (:func:`numbered_keys`), because rounding
    makes it depend on more than the distance. ``slopes`` are those of the heads at hand, ``[head]``.
    """
    dtype = slopes.dtype
    if keys is not None:
        product = _as_bfloat16(slopes)[None, :, None] * _as_bfloat16(keys.astype(dtype))[:, None, :]
        return (_as_bfloat16(product) / cfg.attn_scale).astype(cfg.jnp_dtype)[:, :, None, :]
    distance = (key_pos[None, :] - query_pos[:, None]).astype(dtype)
    return (slopes[:, None, None] * distance[None]).astype(cfg.jnp_dtype)[None]


def finished_scores(
    products: jax.Array,
    cfg: HookedTransformerConfig,
    kind: LayerKind,
    places: "Places",
    score_divisor: Any,
    slopes: jax.Array | None,
) -> jax.Array:
    """Computes scores from products of queries and keys: scale, soft cap, ALiBi, and ``-inf`` where a key is not seen.

    Args:
        products: ``[batch, head, query_pos, key_pos]``.
        cfg: the model's config.
        kind: the layer's kind.
        places: where its queries and keys are.
        score_divisor: the layer's own divisor, a scalar, or ``None``.
        slopes: ALiBi slopes of the heads ``[head]``, or ``None``.
    """
    scores = products / jnp.asarray(cfg.attn_scale, products.dtype)
    if score_divisor is not None:
        scores = scores / jnp.asarray(score_divisor).astype(scores.dtype)
    scores = soft_cap(scores, cfg.attn_scores_soft_cap)
    if slopes is not None:
        scores = scores + alibi_bias(cfg, slopes, places.query_pos, places.key_pos, places.keys)
    mask = visible(cfg, kind, places.query_pos, places.key_pos, places.token_mask)
    return scores if mask is None else jnp.where(mask, scores, -jnp.inf)


def head_slopes(cfg: HookedTransformerConfig) -> jax.Array | None:
    """Returns the ALiBi slope of every head ``[head]``; ``None`` in a model without."""
    if cfg.positional_embedding_type != "alibi":
        return None
    return jnp.asarray(alibi_slopes(cfg.n_heads, cfg.alibi_bias_max), widened(cfg.jnp_dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where queries and keys are in their text.

    Attributes:
        query_pos: ``[query_pos]``.
        key_pos: ``[key_pos]``.
        token_mask: ``[batch, key_pos]``, ``False`` at keys that no query sees; ``None`` means there are none.
        keys: :func:`numbered_keys`.
    """

    query_pos: jax.Array
    key_pos: jax.Array
    token_mask: jax.Array | None
    keys: jax.Array | None


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
    weights, total = exponentials(scores, sinks)
    return (weights / total).astype(scores.dtype)


def exponentials(scores: jax.Array, sinks: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Computes the two parts of :func:`softmax` in float32: exponentials, and what they are divided by.

    Returns:
        ``[batch, head, query_pos, key_pos]``, at most one each; and their sums ``[batch, head, query_pos, 1]``, the
        sink's included, with 1 for a row with every key masked.
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
    return weights, jnp.where(total == 0, 1, total)
