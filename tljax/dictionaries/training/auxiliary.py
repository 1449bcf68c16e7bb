"""AuxK: dead features learn to reconstruct what the live ones leave over (Gao et al. 2024, arXiv:2406.04093)."""

import jax
import jax.numpy as jnp

from tljax.dictionaries.training.config import TrainingConfig
from tljax.dictionaries.training.rows import square_sum
from tljax.dictionaries.training.selection import cut_rows


def auxiliary_loss(
    h: jax.Array,
    W_dec: jax.Array,
    norms: jax.Array,
    dead: jax.Array,
    residual: jax.Array,
    cfg: TrainingConfig,
    x: jax.Array,
) -> jax.Array:
    """Computes the auxiliary loss, summed over tokens, in SAELens's form.

    The ``min(d_in / 2, number dead)`` dead features with the largest pre-activations (of either sign, not rectified)
    reconstruct the residual; the loss counts for less while fewer than ``d_in / 2`` are dead.

    Args:
        h: pre-activations, ``[tokens, d_sae]``.
        W_dec: ``[d_sae, d_out]``.
        norms: of its rows, ``[d_sae]``, by which features are selected where the dictionary does so.
        dead: mask of dead features, ``[d_sae]``.
        residual: what is left to reconstruct, ``[tokens, d_out]``.
        cfg: what is computed.
        x: what is encoded, for its width.
    """
    half = max(x.shape[-1] // 2, 1)
    most = min(half, h.shape[-1])
    count = dead.sum(dtype=jnp.int32)
    values = h * norms[None] if cfg.selects_by_norm else h
    values = jnp.abs(values) if cfg.architecture == "abstopk" else values
    values = jnp.where(dead[None], values, -jnp.inf)
    kept = cut_rows(values, jnp.clip(count, 1, most).astype(jnp.float32), most).keeps(values) & dead[None]
    reconstruction = jnp.where(kept, h, 0) @ W_dec
    scale = jnp.minimum(count.astype(h.dtype) / half, 1)
    return jnp.where(count > 0, scale * square_sum(reconstruction - residual), 0)
