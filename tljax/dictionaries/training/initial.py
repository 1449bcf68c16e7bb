"""The parameters that training starts from."""

import jax
import jax.numpy as jnp

from tljax import checks
from tljax.dictionaries.training.config import TrainingConfig


@checks.typed
def initial_parameters(cfg: TrainingConfig, activations: jax.Array | None = None) -> dict[str, jax.Array]:
    """Draws parameters: decoder rows in random directions, the encoder their transpose, biases zero.

    A transcoder's or crosscoder's encoder is drawn likewise where shapes allow; otherwise it has directions of its own.

    Args:
        cfg: the settings; ``seed`` and ``decoder_init_norm`` decide what is drawn.
        activations: the first batch, ``[tokens, d_out]``, for ``b_dec_init`` other than zeros.

    Returns:
        float32 arrays by name; matrices of a crosscoder with sources merged.
    """
    key, other = jax.random.split(jax.random.key(cfg.seed))
    d_in, d_out, f = cfg.width_in, cfg.width_out, cfg.d_sae
    norm = 1.0 if cfg.decoder_norm == "unit" or cfg.architecture == "matching_pursuit" else cfg.decoder_init_norm
    W_dec = _directions(key, f, d_out) * norm
    params = {"W_dec": W_dec, "b_dec": _bias(cfg, activations)}
    if cfg.architecture == "matching_pursuit":
        return params
    tied = W_dec if d_in == d_out else _directions(other, f, d_in) * norm
    params["W_enc"] = tied.T.copy()
    names = ("b_gate", "b_mag", "r_mag") if cfg.architecture == "gated" else ("b_enc",)
    params |= {name: jnp.zeros(f, jnp.float32) for name in names}
    if cfg.architecture == "jumprelu":
        params["threshold"] = jnp.full(f, cfg.jumprelu_init_threshold, jnp.float32)
    if cfg.skip:
        params["W_skip"] = jnp.zeros((d_out, d_in), jnp.float32)
    return params


def _directions(key: jax.Array, count: int, width: int) -> jax.Array:
    rows = jax.random.uniform(key, (count, width), jnp.float32, -1, 1)
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


def _bias(cfg: TrainingConfig, activations: jax.Array | None) -> jax.Array:
    if cfg.b_dec_init == "zeros" or activations is None:
        return jnp.zeros(cfg.width_out, jnp.float32)
    if cfg.b_dec_init == "mean":
        return activations.mean(axis=0)
    return geometric_median(activations)


def geometric_median(rows: jax.Array, steps: int = 100) -> jax.Array:
    """Returns the point with the least sum of distances to some rows ``[rows, d]``, by Weiszfeld's iteration."""

    def move(_: int, point: jax.Array) -> jax.Array:
        distances = jnp.maximum(jnp.linalg.norm(rows - point[None], axis=-1), 1e-6)
        weights = 1 / distances
        return (weights @ rows) / weights.sum()

    return jax.lax.fori_loop(0, steps, move, rows.mean(axis=0))
