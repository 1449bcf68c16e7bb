"""Layer norm and RMS norm, with and without their affine part."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tljax.config import HookedTransformerConfig
from tljax.hooks.point import hook
from tljax.modules import initializers


def widened(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype norms and softmax compute in: float32 for narrower types."""
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


class Norm(nn.Module):
    """``LN``, ``RMS``, and the folded ``LNPre``, ``RMSPre`` that carry no parameters.

    ``hook_scale`` is the divisor ``sqrt(mean(x²) + eps)`` and ``hook_normalized`` the quotient before weight and bias.
    Computed in float32 whatever the model's dtype; an RMS norm's weight multiplies after the cast, as in Llama, but
    with ``rmsnorm_uses_offset`` it is ``1 + w`` and multiplies before, as in Gemma.
    """

    cfg: HookedTransformerConfig
    kind: str
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(widened(x.dtype))
        if self.kind.startswith("LN"):
            x = x - x.mean(axis=-1, keepdims=True)
        mean_square = jnp.square(x).mean(axis=-1, keepdims=True)
        scale = hook(self, "hook_scale", jnp.sqrt(mean_square + self.cfg.eps))
        x = hook(self, "hook_normalized", x / scale)
        dtype = self.cfg.jnp_dtype
        if self.kind == "RMS":
            weight = self._parameter("w", initializers.zeros if self.cfg.rmsnorm_uses_offset else initializers.ones)
            if self.cfg.rmsnorm_uses_offset:
                return (x * (1 + _along_last(weight, x).astype(x.dtype))).astype(dtype)
            return x.astype(dtype) * _along_last(weight, x)
        if self.kind == "LN":
            weight, bias = self._parameter("w", initializers.ones), self._parameter("b", initializers.zeros)
            x = x * _along_last(weight, x).astype(x.dtype) + _along_last(bias, x).astype(x.dtype)
        return x.astype(dtype)

    def _parameter(self, name: str, initializer: initializers.Initializer) -> jax.Array:
        return self.param(name, initializer, (self.width,), self.cfg.jnp_dtype)


def _along_last(parameter: jax.Array, x: jax.Array) -> jax.Array:
    return parameter.reshape((1,) * (x.ndim - 1) + parameter.shape)


class NoNorm(nn.Module):
    """Stands where a model has no normalisation."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def post_norm_kind(cfg: HookedTransformerConfig) -> str | None:
    """The kind of the norms on what attention and MLP put out: never folded; ``None`` without them."""
    if not cfg.use_normalization_before_and_after or cfg.normalization_type is None:
        return None
    return cfg.normalization_type.removesuffix("Pre")


def make_norm(cfg: HookedTransformerConfig, kind: str | None, width: int | None = None) -> nn.Module:
    """Returns the norm module of a ``normalization_type``."""
    return NoNorm() if kind is None else Norm(cfg, kind, width or cfg.d_model)
