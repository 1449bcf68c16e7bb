"""New factors for heads' low-rank matrices by singular value decomposition, which fixes their arbitrary basis."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def refactor_heads(attn: dict[str, Any]) -> dict[str, Any]:
    """Returns attention parameters with the same products, whose factors have orthogonal columns.

    Each head's query-key matrix, biases included, becomes ``U sqrt(S)`` times ``V sqrt(S)`` transposed; its
    output-value matrix becomes ``W_V = U S``, ``W_O = V^T``. Singular values fall along ``d_head``.

    Args:
        attn: parameters of one block's attention, with ``b_V`` zero.
    """
    queries, keys = (_with_bias(attn[f"W_{x}"], attn[f"b_{x}"]) for x in "QK")
    left, singular, right = jax.vmap(product_svd)(queries, keys)
    root = jnp.sqrt(singular)[:, None, :]
    queries, keys = left * root, right * root
    values, outputs = jnp.moveaxis(attn["W_V"], 1, 0), jnp.swapaxes(attn["W_O"], 1, 2)
    left, singular, right = jax.vmap(product_svd)(values, outputs)
    return attn | {
        "W_Q": jnp.moveaxis(queries[:, :-1], 0, 1),
        "b_Q": queries[:, -1],
        "W_K": jnp.moveaxis(keys[:, :-1], 0, 1),
        "b_K": keys[:, -1],
        "W_V": jnp.moveaxis(left * singular[:, None, :], 0, 1),
        "W_O": jnp.swapaxes(right, 1, 2),
    }


def product_svd(
    a: Float[Array, "m r"], b: Float[Array, "n r"]
) -> tuple[Float[Array, "m r"], Float[Array, " r"], Float[Array, "n r"]]:
    """Computes the singular value decomposition ``(U, S, V)`` of ``a @ b.T``, without forming the product."""
    rank = a.shape[1]
    (q_a, r_a), (q_b, r_b) = jnp.linalg.qr(a), jnp.linalg.qr(b)
    u, s, vt = jnp.linalg.svd(jnp.matmul(r_a, r_b.T, precision="highest"), full_matrices=False)
    left = jnp.matmul(q_a, u, precision="highest")
    right = jnp.matmul(q_b, vt.T, precision="highest")
    missing = rank - s.shape[0]  # a head wider than the model has no more singular values than the model is wide
    return (
        jnp.pad(left, ((0, 0), (0, missing))),
        jnp.pad(s, (0, missing)),
        jnp.pad(right, ((0, 0), (0, missing))),
    )


def _with_bias(weight: Float[Array, "d h e"], bias: Float[Array, "h e"]) -> Float[Array, "h d1 e"]:
    return jnp.concatenate([jnp.moveaxis(weight, 1, 0), bias[:, None]], axis=1)
