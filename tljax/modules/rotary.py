"""Rotary position embedding: both pair layouts, partial rotation, linear and Llama-3 frequency scaling."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from tljax.config import HookedTransformerConfig


def inverse_frequencies(cfg: HookedTransformerConfig, kind: str = "global") -> np.ndarray:
    """Angle per position of each rotated pair, float32 ``[rotary_dim / 2]``.

    Llama-3 scaling ("NTK by parts"): wavelengths longer than ``original / low`` are slowed by ``factor``, those shorter
    than ``original / high`` are kept, and the ones between are interpolated. Layers of local attention may have a base
    of their own, unscaled.
    """
    assert cfg.rotary_dim is not None
    exponents = np.arange(0, cfg.rotary_dim, 2, dtype=np.float32) / np.float32(cfg.rotary_dim)
    own_base = cfg.rotary_base_local if kind.startswith("local") else None
    base = cfg.rotary_base if own_base is None else own_base
    frequencies = (1.0 / np.float32(base) ** exponents).astype(np.float32)
    if own_base is not None:
        return frequencies
    if cfg.use_NTK_by_parts_rope:
        low, high = cfg.NTK_by_parts_low_freq_factor, cfg.NTK_by_parts_high_freq_factor
        wavelengths = 2 * math.pi / frequencies
        slowed = frequencies / cfg.NTK_by_parts_factor
        blend = (cfg.NTK_original_ctx_len / wavelengths - low) / (high - low)
        between = (1 - blend) * slowed + blend * frequencies
        frequencies = np.where(blend <= 0, slowed, np.where(blend >= 1, frequencies, between)).astype(np.float32)
    return frequencies / np.float32(cfg.rotary_scaling_factor)


def rotate(x: jax.Array, positions: jax.Array, cfg: HookedTransformerConfig, kind: str = "global") -> jax.Array:
    """Rotates the leading ``rotary_dim`` dimensions of every head by its position (Su et al. 2021, RoFormer).

    Args:
        x: queries or keys ``[batch, pos, head, d_head]``.
        positions: ``[batch or 1, pos]``.
        cfg: the rotary fields of the model.
        kind: the layer's (:meth:`~tljax.config.HookedTransformerConfig.layer_kind`); some layers do not rotate.

    Returns:
        The rotated array, same shape.
    """
    assert cfg.rotary_dim is not None
    if kind.endswith("unrotated"):
        return x
    angles = positions.astype(jnp.float32)[..., None] * inverse_frequencies(cfg, kind)[None, None, :]
    cos = jnp.cos(angles).astype(x.dtype)[:, :, None, :]
    sin = jnp.sin(angles).astype(x.dtype)[:, :, None, :]
    turning, kept = x[..., : cfg.rotary_dim], x[..., cfg.rotary_dim :]
    if cfg.rotary_adjacent_pairs:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = jnp.split(turning, 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    if cfg.rotary_adjacent_pairs:
        rotated = jnp.stack(turned, axis=-1).reshape(turning.shape)
    else:
        rotated = jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([rotated, kept], axis=-1) if kept.shape[-1] else rotated
