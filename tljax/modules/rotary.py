"""Rotary position embedding: both pair layouts, partial rotation, and the ways of stretching it to longer texts."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from tljax.config import USUAL, HookedTransformerConfig, LayerKind


def inverse_frequencies(cfg: HookedTransformerConfig, kind: LayerKind = USUAL, is_long: bool = False) -> np.ndarray:
    """Returns the angle per position of each rotated pair, float32 ``[rotary_dim / 2]``.

    Args:
        cfg: the rotary fields of the model.
        kind: the layer's; layers of local attention may have a base of their own, and are then not scaled.
        is_long: under long rope, whether the text is longer than the original context.
    """
    assert cfg.rotary_dim is not None
    exponents = np.arange(0, cfg.rotary_dim, 2, dtype=np.float32) / np.float32(cfg.rotary_dim)
    own_base = cfg.rotary_base_local if kind.local else None
    base = cfg.rotary_base if own_base is None else own_base
    # In float64 first: over a hundred thousand positions the last bit of a float32 power is a hundredth of a radian.
    periods = (np.float64(base) ** exponents.astype(np.float64)).astype(np.float32)
    if not is_scaled(cfg, kind):
        return 1 / periods
    if cfg.use_NTK_by_parts_rope:
        return _by_parts(cfg, 1 / periods)
    if cfg.use_yarn_rope:
        return _yarn(cfg, periods)
    if cfg.uses_longrope:
        factors = cfg.longrope_long_factor if is_long else cfg.longrope_short_factor
        return 1 / (np.asarray(factors, np.float32) * periods)
    return 1 / periods / np.float32(cfg.rotary_scaling_factor)


def is_scaled(cfg: HookedTransformerConfig, kind: LayerKind) -> bool:
    """Whether a model's scaling applies to layers of a kind."""
    return not (kind.local and (cfg.rotary_base_local is not None or cfg.yarn_global_attn_only))


def attention_factor(cfg: HookedTransformerConfig, kind: LayerKind = USUAL) -> float:
    """Returns the factor of cosines and sines: stretching flattens attention, and the factor sharpens it again."""
    if not is_scaled(cfg, kind):
        return 1.0
    return cfg.yarn_attention_factor if cfg.use_yarn_rope else cfg.longrope_attention_factor


def _by_parts(cfg: HookedTransformerConfig, frequencies: np.ndarray) -> np.ndarray:
    """Applies Llama-3 scaling ("NTK by parts").

    Wavelengths longer than ``original / low`` are slowed by ``factor``, those shorter than ``original / high`` are
    kept, and the ones between are interpolated.
    """
    low, high = cfg.NTK_by_parts_low_freq_factor, cfg.NTK_by_parts_high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    slowed = frequencies / cfg.NTK_by_parts_factor
    blend = (cfg.NTK_original_ctx_len / wavelengths - low) / (high - low)
    between = (1 - blend) * slowed + blend * frequencies
    return np.where(blend <= 0, slowed, np.where(blend >= 1, frequencies, between)).astype(np.float32)


def _yarn(cfg: HookedTransformerConfig, periods: np.ndarray) -> np.ndarray:
    """Applies YaRN (Peng et al. 2023): like :func:`_by_parts`, but the ramp from kept to slowed is linear in the pair.

    A pair is kept if it turns at least ``yarn_beta_fast`` times within the original context and slowed by
    ``yarn_factor`` if at most ``yarn_beta_slow`` times.
    """
    assert cfg.rotary_dim is not None
    first, last = (_pair_that_turns(cfg, times) for times in (cfg.yarn_beta_fast, cfg.yarn_beta_slow))
    if cfg.yarn_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, cfg.rotary_dim - 1)
    ramp = last - first or 0.001  # where both are one pair, the ramp is a step
    slowed = np.clip((np.arange(len(periods), dtype=np.float32) - np.float32(first)) / np.float32(ramp), 0, 1)
    kept = 1 - slowed
    return 1 / (np.float32(cfg.yarn_factor) * periods) * (1 - kept) + 1 / periods * kept


def _pair_that_turns(cfg: HookedTransformerConfig, times: float) -> float:
    """Returns the pair that turns ``times`` times within the original context; a fraction if between two pairs."""
    assert cfg.rotary_dim is not None
    wavelength = cfg.yarn_original_max_position_embeddings / times
    return cfg.rotary_dim / 2 * math.log(wavelength / (2 * math.pi)) / math.log(cfg.rotary_base)


def rotate(
    x: jax.Array, positions: jax.Array, lengths: jax.Array, cfg: HookedTransformerConfig, kind: LayerKind, last: bool
) -> jax.Array:
    """Rotates ``rotary_dim`` dimensions of every head by its position (Su et al. 2021, RoFormer).

    Args:
        x: queries or keys ``[batch, pos, head, d_head]``.
        positions: ``[batch or 1, pos]``.
        lengths: length of each token's text, ``[batch or 1, pos or 1]``, which long rope depends on.
        cfg: the rotary fields of the model.
        kind: the layer's (:meth:`~tljax.config.HookedTransformerConfig.layer_kind`); some layers do not rotate.
        last: whether the last dimensions rotate instead of the leading ones.

    Returns:
        The rotated array, same shape.
    """
    assert cfg.rotary_dim is not None
    if not kind.rotates:
        return x
    cos, sin = (table.astype(x.dtype)[:, :, None, :] for table in _cos_and_sin(positions, lengths, cfg, kind))
    if last:
        kept, turning = x[..., : -cfg.rotary_dim], x[..., -cfg.rotary_dim :]
    else:
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
    if not kept.shape[-1]:
        return rotated
    return jnp.concatenate([kept, rotated] if last else [rotated, kept], axis=-1)


def _cos_and_sin(
    positions: jax.Array, lengths: jax.Array, cfg: HookedTransformerConfig, kind: LayerKind
) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines of each token's angles, float32 ``[batch or 1, pos, rotary_dim / 2]``."""
    frequencies = jnp.asarray(inverse_frequencies(cfg, kind))[None, None, :]
    if cfg.uses_longrope and is_scaled(cfg, kind):
        is_long = (lengths > cfg.longrope_original_max_position_embeddings)[..., None]
        frequencies = jnp.where(is_long, inverse_frequencies(cfg, kind, is_long=True)[None, None, :], frequencies)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    factor = attention_factor(cfg, kind)
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)
