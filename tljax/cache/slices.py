"""Slices of one axis, in the forms TransformerLens takes: a number, ``(start, stop[, step])``, a list, an array."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.errors import CacheError

SliceInput = int | slice | tuple[int | None, ...] | Sequence[int] | np.ndarray | jax.Array | None


def _index(slice_input: Any) -> Any:
    if slice_input is None:
        return slice(None)
    if isinstance(slice_input, tuple):
        return slice(*slice_input)
    return jnp.asarray(slice_input) if isinstance(slice_input, list) else slice_input


def apply_slice(array: jax.Array, slice_input: SliceInput, axis: int) -> jax.Array:
    """Slices one axis; a number drops it."""
    if isinstance(slice_input, int | np.integer) and not -array.shape[axis] <= slice_input < array.shape[axis]:
        raise CacheError(f"Index {slice_input} is out of range: the axis has {array.shape[axis]} entries.")
    return array[(slice(None),) * (axis % array.ndim) + (_index(slice_input),)]


def is_full(slice_input: SliceInput) -> bool:
    """Whether the slice keeps everything."""
    return slice_input is None or (isinstance(slice_input, slice) and slice_input == slice(None))
