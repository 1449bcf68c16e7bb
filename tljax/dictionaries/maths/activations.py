"""How pre-activations become features, by architecture."""

import jax
import jax.numpy as jnp

from tljax.dictionaries.maths.broadcasting import each
from tljax.dictionaries.maths.config import DictionaryConfig


def top_k_mask(values: jax.Array, k: int) -> jax.Array:
    """Returns a mask of the ``k`` largest entries along the last axis; the lowest index wins a tie."""
    _, indices = jax.lax.top_k(values, k)
    flat = indices.reshape(-1, k)
    rows = jnp.arange(flat.shape[0])[:, None]
    mask = jnp.zeros((flat.shape[0], values.shape[-1]), bool).at[rows, flat].set(True)
    return mask.reshape(values.shape)


def batch_top_k_mask(values: jax.Array, k: int) -> jax.Array:
    """Returns a mask of the ``k * tokens`` largest entries over all axes; the lowest index wins a tie."""
    tokens = values.size // values.shape[-1]
    return top_k_mask(values.reshape(-1), min(k * tokens, values.size)).reshape(values.shape)


def group_max_mask(values: jax.Array, k: int) -> jax.Array:
    """Returns a mask of the largest entry of each of ``k`` contiguous groups along the last axis."""
    groups = values.reshape(*values.shape[:-1], k, -1)
    largest = groups.argmax(axis=-1)[..., None]
    return (each(jnp.arange(groups.shape[-1]), groups) == largest).reshape(values.shape)


def select(h: jax.Array, cfg: DictionaryConfig, threshold: jax.Array | None = None) -> jax.Array:
    """Turns pre-activations into features.

    Args:
        h: ``[..., d_sae]``; times the decoder norms where ``cfg.rescale_acts_by_decoder_norm``.
        cfg: the config; ``gated`` is not among the architectures here.
        threshold: ``[d_sae]``, of ``jumprelu``; a negative one acts as 0.

    Returns:
        Features ``[..., d_sae]``.
    """
    match cfg.architecture:
        case "jumprelu":
            assert threshold is not None
            return jnp.where(h <= each(jnp.maximum(threshold, 0), h), 0, h)  # this way round a NaN stays one
        case "topk":
            return jnp.where(top_k_mask(h, cfg.k or 1), jax.nn.relu(h), 0)
        case "abstopk":
            return jnp.where(top_k_mask(jnp.abs(h), cfg.k or 1), h, 0)
        case "batchtopk":
            positive = jax.nn.relu(h)
            return jnp.where(batch_top_k_mask(positive, cfg.k or 1), positive, 0)
        case "groupmax":
            positive = jax.nn.relu(h)
            return jnp.where(group_max_mask(positive, cfg.k or 1), positive, 0)
        case _:
            return jax.nn.relu(h)


def selected(values: jax.Array, cfg: DictionaryConfig, threshold: jax.Array | None = None) -> jax.Array:
    """Returns a mask of the features that are kept, by non-negative values ``[..., d_sae]`` to compare them by.

    A NaN is kept, so that it shows.

    Args:
        values: rectified features times whatever they are compared by.
        cfg: the config: ``standard``, ``jumprelu``, ``topk`` or ``batchtopk``.
        threshold: ``[d_sae]``, of ``jumprelu``.
    """
    match cfg.architecture:
        case "jumprelu":
            assert threshold is not None
            return ~(values <= each(jnp.maximum(threshold, 0), values))
        case "topk":
            return top_k_mask(values, cfg.k or 1)
        case "batchtopk":
            return batch_top_k_mask(values, cfg.k or 1)
        case _:
            return ~(values <= 0)
