"""Initializers of parameters: TransformerLens's init modes, on stored layouts (contracted axis first)."""

import math

import jax
import jax.numpy as jnp

from tljax.config import HookedTransformerConfig
from tljax.modules.parameters import Initializer, axis_sizes


def weight(cfg: HookedTransformerConfig, inward: str, outward: str, embedding: bool = False) -> Initializer:
    """Returns the initializer of a matrix, by the names of the axes that it reads and writes.

    Modes: ``gpt2`` is N(0, initializer_range); ``xavier_*`` and ``kaiming_*`` scale with the fans and take
    ``initializer_range`` as gain; ``muP`` is N(0, initializer_range / sqrt(fan_in)), embeddings unscaled.
    """
    sizes, gain = axis_sizes(cfg), cfg.initializer_range
    fan_in, fan_out = (math.prod(sizes[axis] for axis in axes.split()) for axes in (inward, outward))
    kaiming, xavier = math.sqrt(2.0 / fan_in), math.sqrt(2.0 / (fan_in + fan_out))
    std = {
        "gpt2": gain,
        "xavier": gain * xavier,
        "kaiming": gain * kaiming,
        "muP": gain if embedding else gain / math.sqrt(fan_in),
    }[cfg.init_mode.partition("_")[0]]
    if cfg.init_mode.endswith("uniform"):
        bound = math.sqrt(3.0) * std
        return lambda key, shape, dtype: jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)
    return lambda key, shape, dtype: (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def constant(value: float) -> Initializer:
    """Returns the initializer of a parameter that starts at ``value``."""
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


zeros, ones = constant(0.0), constant(1.0)
"""Initializers of biases and of norm weights."""
