"""Arrays from the files of dictionaries: orientation by shape, dtype, and a check that they are numbers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checkpoints.finite import all_finite
from tljax.errors import DictionaryError

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def oriented(
    array: np.ndarray, shape: tuple[int, int], name: str, origin: str, *, transposed: bool = False
) -> np.ndarray:
    """Returns a stored matrix in the orientation that dictionaries have in memory.

    Args:
        array: the matrix, either way round.
        shape: what it has to be.
        name, origin: the parameter and the file, for the error.
        transposed: whether the format stores the transpose: decides where the matrix is square, and only there.

    Raises:
        DictionaryError: the matrix fits neither way round.
    """
    if shape[0] == shape[1] and array.shape == shape:
        return array.T if transposed else array
    if array.shape == shape:
        return array
    if array.shape == shape[::-1]:
        return array.T
    raise DictionaryError(f"{origin}: {name} has shape {list(array.shape)}, expected {list(shape)} or its transpose.")


def check_finite(arrays: Mapping[str, np.ndarray], origin: str) -> None:
    """Checks arrays for NaN and infinity.

    Raises:
        DictionaryError: names those that hold one.
    """
    bad = [
        f"{name} ({int(np.size(array) - np.isfinite(array.astype(np.float32)).sum())} of {np.size(array)} entries)"
        for name, array in arrays.items()
        if array.size and jnp.issubdtype(array.dtype, jnp.floating) and not all_finite(np.ascontiguousarray(array))
    ]
    if bad:
        raise DictionaryError(
            f"{origin} holds NaN or infinity in {', '.join(bad)}. No trained dictionary has these: the file is "
            "damaged, or it was written after training had diverged. Fetch it again, or take an earlier checkpoint."
        )


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
