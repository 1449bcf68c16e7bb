"""Matching pursuit: features chosen one after another, each the best match of what the others leave over."""

import jax
import jax.numpy as jnp

from tljax.dictionaries.maths.config import DictionaryConfig


def pursue(x: jax.Array, W_dec: jax.Array, cfg: DictionaryConfig) -> jax.Array:
    """Encodes activations by matching pursuit.

    Each step takes the feature whose decoder row has the largest product with the residual, adds that product to the
    feature and subtracts it times the row. Rows need not be of unit norm. A token stops when a step chose no feature
    that it did not have (``stop_on_duplicate_support``), or when its residual is shorter than ``residual_threshold``.

    Args:
        x: ``[..., d_in]``, less ``b_dec``.
        W_dec: ``[d_sae, d_in]``.
        cfg: the config.

    Returns:
        Features ``[..., d_sae]``.
    """
    flat = x.reshape(-1, x.shape[-1])
    rows = jnp.arange(flat.shape[0])

    def step(_: int, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        residual, features, stopped = state
        products = jax.nn.relu(jnp.matmul(residual, W_dec.T, precision="highest"))
        best = products.argmax(axis=-1)
        value = jnp.where(stopped, 0, products[rows, best])
        had = features[rows, best] > 0
        changed = features.at[rows, best].add(value)
        left = residual - value[:, None] * W_dec[best]
        stop = stopped
        if cfg.stop_on_duplicate_support:
            stop = stop | had | (value == 0)
        if cfg.residual_threshold > 0:
            stop = stop | (jnp.linalg.norm(left, axis=-1) < cfg.residual_threshold)
        return left, changed, stop

    start = (flat, jnp.zeros((flat.shape[0], W_dec.shape[0]), flat.dtype), jnp.zeros(flat.shape[0], bool))
    steps = cfg.d_in if cfg.max_iterations is None else cfg.max_iterations
    features = jax.lax.fori_loop(0, steps, step, start)[1]
    return features.reshape(*x.shape[:-1], -1)
