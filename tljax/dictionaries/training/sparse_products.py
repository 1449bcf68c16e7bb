"""The products of a step, row by row where few features are active, on a CPU.

With the places of the active features known, the reconstruction sums rows of ``W_dec``, the gradient of the features is
their dot products with the reconstruction's gradient, and the gradients of the weights are added up row by row: of the
five products of a step only ``x W_enc`` is left. Each function looks at run time whether few enough are active, and
takes the matrix product otherwise; either way the result is that of the product, to rounding.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tljax.dictionaries.training.pieces import WIDTH, Pieces

_LEAST = 2**20
"""The least ``d_in * d_sae`` for which pieces are looked for: below, products take too little time to save any."""


def pays(d_in: int, d_sae: int) -> bool:
    """Returns whether a program should look for active features: on a CPU, where products are large."""
    return jax.default_backend() == "cpu" and d_in * d_sae >= _LEAST


def decoded(features: jax.Array, W_dec: jax.Array, pieces: Pieces | None) -> jax.Array:
    """Returns ``features @ W_dec``.

    Args:
        features: ``[tokens, d_sae]``.
        W_dec: ``[d_sae, d_out]``.
        pieces: where ``features`` may be other than 0, or where their gradient is read: elsewhere that is 0. ``None``
            is everywhere.
    """
    return features @ W_dec if pieces is None else _decoded(features, W_dec, pieces)


@jax.custom_vjp
def _decoded(features: jax.Array, W_dec: jax.Array, pieces: Pieces) -> Any:
    return jax.lax.cond(pieces.fits, _sum_rows, lambda f, W, _: f @ W, features, W_dec, pieces)


def _decoded_forward(features: jax.Array, W_dec: jax.Array, pieces: Pieces) -> tuple[jax.Array, Any]:
    return _decoded(features, W_dec, pieces), (features, W_dec, pieces)


def _decoded_backward(saved: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    features, W_dec, pieces = saved
    to_features = jax.lax.cond(
        pieces.fits,
        functools.partial(_dot_rows, shape=features.shape),
        lambda g, W, _: g @ W.T,
        gradient, W_dec, pieces,
    )  # fmt: skip
    return to_features, outer_sums(features, gradient, pieces, pieces.fits), None


_decoded.defvjp(_decoded_forward, _decoded_backward)


def outer_sums(features: jax.Array, y: jax.Array, pieces: Pieces, few: jax.Array) -> jax.Array:
    """Returns ``features.T @ y``, ``[d_sae, d]``.

    Args:
        features: ``[tokens, d_sae]``, 0 outside the pieces if there are few.
        y: ``[tokens, d]``.
        pieces: where the features may be other than 0.
        few: whether the pieces hold them all.
    """
    return jax.lax.cond(few, _add_rows, lambda f, y, _: f.T @ y, features, y, pieces)


def _row(matrix: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(matrix, number, 1, axis=0)


def _sum_rows(features: jax.Array, W_dec: jax.Array, pieces: Pieces) -> jax.Array:
    values = pieces.values(features)

    def add(piece: jax.Array, output: jax.Array) -> jax.Array:
        row = pieces.rows[piece]
        total = _row(output, row)
        for place in range(WIDTH):  # one fused loop: five times as fast as gathering rows for a product
            total = total + values[piece, place] * _row(W_dec, pieces.columns[piece, place])
        return jax.lax.dynamic_update_slice_in_dim(output, total, row, axis=0)

    zeros = jnp.zeros((features.shape[0], W_dec.shape[1]), W_dec.dtype)
    return jax.lax.fori_loop(0, pieces.count, add, zeros)


def _dot_rows(gradient: jax.Array, W_dec: jax.Array, pieces: Pieces, shape: tuple[int, ...]) -> jax.Array:
    def dot(piece: jax.Array, found: jax.Array) -> jax.Array:
        rows = W_dec.at[pieces.columns[piece]].get(mode="promise_in_bounds")
        products = rows @ _row(gradient, pieces.rows[piece])[0]
        return jax.lax.dynamic_update_slice_in_dim(found, products[None], piece, axis=0)

    found = jax.lax.fori_loop(0, pieces.count, dot, jnp.zeros(pieces.columns.shape, gradient.dtype))
    return pieces.dense(found, shape)


def _add_rows(features: jax.Array, y: jax.Array, pieces: Pieces) -> jax.Array:
    values = pieces.values(features)

    def add(piece: jax.Array, total: jax.Array) -> jax.Array:
        outer = values[piece][:, None] * _row(y, pieces.rows[piece])
        return total.at[pieces.columns[piece]].add(outer, mode="promise_in_bounds")

    return jax.lax.fori_loop(0, pieces.count, add, jnp.zeros((features.shape[1], y.shape[1]), y.dtype))
