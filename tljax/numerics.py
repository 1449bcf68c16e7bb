"""In what precision things are computed: sums in float32 at least, matrix products as the config says."""

import contextlib

import jax
import jax.numpy as jnp

from tljax.config import HookedTransformerConfig


def widened(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype norms and softmax compute in: float32 for narrower types."""
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def matmul_precision(cfg: HookedTransformerConfig) -> contextlib.AbstractContextManager[None]:
    """A ``with`` block whose matrix products have the config's precision, whatever jax's default is on the device."""
    return jax.default_matmul_precision(cfg.matmul_precision)
