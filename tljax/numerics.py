"""Dtype names, and the precision of arithmetic: sums in float32 or wider, matrix products as the config says."""

import contextlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.errors import ConfigError, nearest

if TYPE_CHECKING:
    from tljax.config import HookedTransformerConfig

DTYPES = {
    "float32": "float32", "fp32": "float32", "float16": "float16", "fp16": "float16",
    "bfloat16": "bfloat16", "bf16": "bfloat16", "float64": "float64",
}  # fmt: skip


def canonical_dtype(dtype: Any) -> str:
    """Returns the canonical name of a floating dtype given as a name, a numpy or jax dtype, or a torch one.

    >>> canonical_dtype("bf16"), canonical_dtype(np.float32)
    ('bfloat16', 'float32')
    """
    if isinstance(dtype, str):
        name = dtype
    elif str(dtype).startswith("torch."):
        name = str(dtype).removeprefix("torch.")
    else:
        name = "None" if dtype is None else np.dtype(dtype).name
    if name not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.{nearest(name, DTYPES)}")
    return DTYPES[name]


def available_dtype(dtype: Any) -> str:
    """Returns :func:`canonical_dtype`, but refuses float64 while JAX would silently make it float32."""
    name = canonical_dtype(dtype)
    if name == "float64" and not jax.config.read("jax_enable_x64"):
        raise ConfigError("dtype float64 needs jax.config.update('jax_enable_x64', True) first.")
    return name


def widened(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype that norms and softmax compute in: float32 for narrower types."""
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def widest(one: Any, other: Any) -> Any:
    """Returns a floating dtype that holds the numbers of both, whatever JAX's rules of promotion are."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(one, other)


def matmul_precision(cfg: "HookedTransformerConfig") -> contextlib.AbstractContextManager[None]:
    """Returns a context manager that sets the config's precision for matrix products, whatever JAX's default is."""
    return jax.default_matmul_precision(cfg.matmul_precision)
