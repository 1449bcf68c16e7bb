"""Layer norm and RMS norm, with and without their affine part."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tljax.config import HookedTransformerConfig
from tljax.hooks.point import hook
from tljax.modules import initializers
from tljax.numerics import widened


def stored_dtype(name: str, dtype: jnp.dtype) -> jnp.dtype:
    """The dtype a parameter is kept in: the model's, but what decides between experts is not rounded."""
    return widened(dtype) if name == "b_choice" else dtype


def norm_gain(cfg: HookedTransformerConfig, params: Mapping[str, Any]) -> jax.Array | None:
    """What a norm multiplies by, from its parameters; ``None`` where it has none (folded, or without affine part)."""
    weight = params.get("w")
    return 1 + weight if weight is not None and cfg.rmsnorm_uses_offset else weight


class Norm(nn.Module):
    """``LN``, ``RMS``, and the folded ``LNPre``, ``RMSPre`` that carry no parameters.

    ``hook_scale`` is the divisor ``sqrt(mean(x²) + eps)`` and ``hook_normalized`` the quotient before weight and bias.
    Computed in float32 whatever the model's dtype; an RMS norm's weight multiplies after the cast, as in Llama, but
    with ``rmsnorm_uses_offset`` it is ``1 + w`` and multiplies before, as in Gemma. A layer norm's weight is ``1 + w``
    under the same field (Nemotron).

    Attributes:
        cfg: the model's config.
        kind: one of the four.
        width: length of the last axis.
        heads: the weight has a row for each of the axis before the last; ``None``: one row for all.
        eps: added to the mean square; ``None``: ``cfg.eps``.
    """

    cfg: HookedTransformerConfig
    kind: str
    width: int
    heads: int | None = None
    eps: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(widened(x.dtype))
        if self.kind.startswith("LN"):
            x = x - x.mean(axis=-1, keepdims=True)
        mean_square = jnp.square(x).mean(axis=-1, keepdims=True)
        scale = hook(self, "hook_scale", jnp.sqrt(mean_square + (self.cfg.eps if self.eps is None else self.eps)))
        x = hook(self, "hook_normalized", x / scale)
        dtype, offset = self.cfg.jnp_dtype, self.cfg.rmsnorm_uses_offset
        if self.kind.endswith("Pre"):
            return x.astype(dtype)
        weight = self._parameter("w", initializers.zeros if offset else initializers.ones)
        if self.kind == "RMS" and not offset:
            return x.astype(dtype) * _along_last(weight, x)
        gain = _along_last(weight, x).astype(x.dtype)
        x = x * (1 + gain if offset else gain)
        if self.kind == "LN":
            x = x + _along_last(self._parameter("b", initializers.zeros), x).astype(x.dtype)
        return x.astype(dtype)

    def _parameter(self, name: str, initializer: initializers.Initializer) -> jax.Array:
        shape = (self.width,) if self.heads is None else (self.heads, self.width)
        return self.param(name, initializer, shape, self.cfg.jnp_dtype)


def _along_last(parameter: jax.Array, x: jax.Array) -> jax.Array:
    return parameter.reshape((1,) * (x.ndim - parameter.ndim) + parameter.shape)


class NoNorm(nn.Module):
    """Stands where a model has no normalisation."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def pre_norm_kind(cfg: HookedTransformerConfig) -> str | None:
    """The kind of the norms that attention and MLP read through; ``None`` without them."""
    return cfg.normalization_type if cfg.has_norms_before else None


def block_norm_kind(cfg: HookedTransformerConfig) -> str | None:
    """The kind of ``ln1`` and ``ln2``: what attention and MLP read through, or norms of the residual stream itself."""
    return cfg.normalization_type if cfg.use_normalization_of_residual else pre_norm_kind(cfg)


def final_norm_kind(cfg: HookedTransformerConfig) -> str | None:
    """The kind of ``ln_final``: RMS under ``final_rms`` whatever the blocks use; ``None`` without it."""
    kind = cfg.normalization_type if cfg.has_final_norm else None
    if kind is not None and cfg.final_rms:
        return "RMSPre" if kind.endswith("Pre") else "RMS"
    return kind


def post_norm_kind(cfg: HookedTransformerConfig) -> str | None:
    """The kind of the norms on what attention and MLP put out: never folded; ``None`` without them."""
    if not cfg.has_norms_after or cfg.normalization_type is None:
        return None
    return cfg.normalization_type.removesuffix("Pre")


def head_norm(cfg: HookedTransformerConfig, heads: int) -> Norm:
    """Returns the norm of the queries or keys of ``heads`` heads, which ``qk_norm_span`` describes."""
    joint, rows = cfg.qk_norm_span == "joint", heads if cfg.qk_norm_span == "per_head" else None
    return Norm(cfg, cfg.qk_norm_type, heads * cfg.d_head if joint else cfg.d_head, rows)


def make_norm(cfg: HookedTransformerConfig, kind: str | None, width: int | None = None) -> nn.Module:
    """Returns the norm module of a ``normalization_type``."""
    return NoNorm() if kind is None else Norm(cfg, kind, width or cfg.d_model)
