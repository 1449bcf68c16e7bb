"""Layer norm and RMS norm, with and without their affine part."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tljax.config import HookedTransformerConfig
from tljax.hooks.point import hook
from tljax.modules import initializers
from tljax.modules.parameters import parameter
from tljax.numerics import widened


def norm_gain(cfg: HookedTransformerConfig, params: Mapping[str, Any]) -> jax.Array | None:
    """Returns a norm's multiplier from its parameters; ``None`` if it has none (folded, or without affine part)."""
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
        axes: the axes of its parameters; the last one is normalised.
        eps: added to the mean square; ``None``: ``cfg.eps``.
    """

    cfg: HookedTransformerConfig
    kind: str
    axes: str = "d_model"
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
        weight = parameter(self, "w", initializers.zeros if offset else initializers.ones, self.axes)
        if self.kind == "RMS" and not offset:
            return x.astype(dtype) * _along_last(weight, x)
        gain = _along_last(weight, x).astype(x.dtype)
        x = x * (1 + gain if offset else gain)
        if self.kind == "LN":
            x = x + _along_last(parameter(self, "b", initializers.zeros, self.axes), x).astype(x.dtype)
        return x.astype(dtype)


def _along_last(parameter: jax.Array, x: jax.Array) -> jax.Array:
    return parameter.reshape((1,) * (x.ndim - parameter.ndim) + parameter.shape)


class NoNorm(nn.Module):
    """Identity, in place of a norm that a model does not have."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def norm_kind(cfg: HookedTransformerConfig, name: str) -> str | None:
    """Returns the kind of a norm around attention or MLP, or before the unembedding; ``None`` if the model lacks it.

    Args:
        cfg: the model's config.
        name: ``"ln1"`` or ``"ln2"``: the norm of the input of attention or MLP, or of the residual stream itself;
            ``"ln1_post"`` or ``"ln2_post"``: the norm of their output, never folded; ``"ln_final"``: RMS under
            ``final_rms`` whatever the others are.
    """
    kind = cfg.normalization_type
    if kind is None:
        return None
    if name.endswith("_post"):
        return kind.removesuffix("Pre") if cfg.has_norms_after else None
    if name == "ln_final":
        kind = kind.replace("LN", "RMS") if cfg.final_rms else kind
        return kind if cfg.has_final_norm else None
    return kind if cfg.has_norms_before or cfg.use_normalization_of_residual else None


def head_norm(cfg: HookedTransformerConfig, heads: str) -> Norm:
    """Returns the norm of the queries (``heads`` is ``"n_heads"``) or keys (``"n_kv"``), as ``qk_norm_span`` says."""
    joint = {"n_heads": "q_width", "n_kv": "kv_width"}[heads]
    axes = {"shared": "d_head", "per_head": f"{heads} d_head", "joint": joint}[cfg.qk_norm_span]
    return Norm(cfg, cfg.qk_norm_type, axes)


def make_norm(cfg: HookedTransformerConfig, kind: str | None, axes: str = "d_model") -> nn.Module:
    """Returns the norm module of a ``normalization_type``."""
    return NoNorm() if kind is None else Norm(cfg, kind, axes)
