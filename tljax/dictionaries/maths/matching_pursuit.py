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

    def step(
        state: tuple[jax.Array, jax.Array, jax.Array], _: None
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        residual, features, stopped = state
        best = jnp.matmul(*jax.lax.stop_gradient((residual, W_dec.T)), precision="highest").argmax(axis=-1)
        chosen = W_dec[best]  # derivatives go through these rows alone
        value = jnp.where(stopped, 0, jax.nn.relu((residual * chosen).sum(axis=-1)))
        had = features[rows, best] > 0
        changed = features.at[rows, best].add(value)
        left = residual - value[:, None] * chosen
        stop = stopped
        if cfg.stop_on_duplicate_support:
            stop = stop | had | (value == 0)
        if cfg.residual_threshold > 0:
            stop = stop | (jnp.linalg.norm(left, axis=-1) < cfg.residual_threshold)
        return (left, changed, stop), None

    start = (flat, jnp.zeros((flat.shape[0], W_dec.shape[0]), flat.dtype), jnp.zeros(flat.shape[0], bool))
    steps = cfg.d_in if cfg.max_iterations is None else cfg.max_iterations
    features = jax.lax.scan(step, start, None, length=steps)[0][1]
    return features.reshape(*x.shape[:-1], -1)
