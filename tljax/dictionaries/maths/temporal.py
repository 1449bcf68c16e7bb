"""Temporal dictionaries: attention over earlier tokens predicts part of the features, the rest is encoded as novel."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from tljax.dictionaries.maths.activations import top_k_mask
from tljax.dictionaries.maths.broadcasting import each
from tljax.dictionaries.maths.config import DictionaryConfig

_EPS = 1e-6


def encode_temporal(
    x: jax.Array, params: Mapping[str, jax.Array], cfg: DictionaryConfig
) -> tuple[jax.Array, jax.Array]:
    """Encodes activations whose features earlier tokens predict.

    Args:
        x: ``[batch, pos, d_in]``, less ``b_dec`` where that is subtracted.
        params: ``W_dec``, ``W_enc`` unless weights are tied, and ``attn_layers.<i>.{k_ctx,q_target,v_ctx,c_proj}`` with
            ``.weight`` ``[out, in]`` and ``.bias``.
        cfg: the config.

    Returns:
        Novel features and predicted features, each ``[batch, pos, d_sae]``.
    """
    W_dec = params["W_dec"]
    W_enc = W_dec.T if cfg.tied_weights else params["W_enc"]
    rate, residual = 1 / (4 * cfg.d_in), x
    predicted = jnp.zeros((*x.shape[:-1], cfg.d_sae), x.dtype)
    for layer in range(cfg.n_attn_layers):
        z = jax.nn.relu(rate * _product(residual, W_enc))
        context = jnp.pad(z, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        part = jax.nn.relu(_attend(z, context, params, f"attn_layers.{layer}", cfg.n_attn_heads))
        direction = _product(part, W_dec)
        length = jnp.linalg.norm(direction, axis=-1, keepdims=True) + _EPS
        share = (direction * residual).sum(axis=-1, keepdims=True) / length**2
        predicted = predicted + share * part
        residual = residual - share * direction
    novel = jax.nn.relu(rate * _product(residual, W_enc))
    if cfg.novel == "topk":
        novel = jnp.where(top_k_mask(novel, cfg.k or 1), novel, 0)
    return novel, predicted


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.matmul(x, matrix, precision="highest")


def _attend(z: jax.Array, context: jax.Array, params: Mapping[str, jax.Array], name: str, n_heads: int) -> jax.Array:
    def heads(part: str, source: jax.Array) -> jax.Array:
        weight = params[f"{name}.{part}.weight"]
        projected = _biased(_product(source, weight.T), params.get(f"{name}.{part}.bias"))
        return projected.reshape(*projected.shape[:-1], n_heads, -1)

    q, k, v = heads("q_target", z), heads("k_ctx", context), heads("v_ctx", context)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") / q.shape[-1] ** 0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    pattern = jax.nn.softmax(jnp.where(each(causal, scores), scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", pattern, v, precision="highest").reshape(z.shape)
    return _biased(_product(mixed, params[f"{name}.c_proj.weight"].T), params.get(f"{name}.c_proj.bias"))


def _biased(values: jax.Array, bias: jax.Array | None) -> jax.Array:
    return values if bias is None else values + each(bias, values)
