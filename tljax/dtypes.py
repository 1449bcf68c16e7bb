"""Floating dtypes by name."""

from typing import Any

import jax
import numpy as np

from tljax.errors import ConfigError, nearest

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
    """:func:`canonical_dtype`, refusing float64 while jax would silently make it float32."""
    name = canonical_dtype(dtype)
    if name == "float64" and not jax.config.read("jax_enable_x64"):
        raise ConfigError("dtype float64 needs jax.config.update('jax_enable_x64', True) first.")
    return name
