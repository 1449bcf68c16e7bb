"""Dtypes that configs of dictionaries name."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checkpoints.finite import all_finite
from tljax.errors import DictionaryError

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def dtype_named(name: Any, origin: str) -> np.dtype:
    """Returns the dtype that a config names, ``"float32"`` or ``"torch.float32"``.

    float64 means float32 unless JAX's ``jax_enable_x64`` is on.

    Raises:
        DictionaryError: it is not a floating dtype that JAX has.
    """
    plain = str(name).removeprefix("torch.")
    if plain not in _DTYPES:
        raise DictionaryError(f"{origin} has dtype {name!r}; known are {', '.join(_DTYPES)}.")
    return np.dtype(jax.dtypes.canonicalize_dtype(jnp.dtype(plain)))


def in_dtype(array: np.ndarray, dtype: np.dtype, name: str, origin: str) -> np.ndarray:
    """Returns an array in a dtype.

    Raises:
        DictionaryError: numbers are too large for it.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if dtype.itemsize < array.dtype.itemsize and converted.size and not all_finite(np.ascontiguousarray(converted)):
        raise DictionaryError(f'{origin}: {name} holds numbers that {dtype} has not: pass dtype="float32".')
    return converted
