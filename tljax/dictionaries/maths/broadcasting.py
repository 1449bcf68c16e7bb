"""Vectors in the shape of what they are combined with."""

import jax
import jax.numpy as jnp


def each(vector: jax.Array, values: jax.Array) -> jax.Array:
    """Returns a vector ``[d]`` (or ``[n, d]``) in the shape of ``values`` ``[..., d]``.

    Said outright, so that code works under ``jax_numpy_rank_promotion="raise"``; XLA adds the same.
    """
    return jnp.broadcast_to(vector, values.shape)
