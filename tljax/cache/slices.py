"""Slices of one axis, in the forms TransformerLens takes: a number, ``(start, stop[, step])``, a list, an array."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tljax.errors import CacheError
from tljax.text import positions

SliceInput = int | slice | tuple[int | None, ...] | Sequence[int] | np.ndarray | jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cut:
    """A checked slice, as an argument of a compiled function: indices are data, so new ones do not recompile.

    Attributes:
        index: one index (which drops the axis) or a row of them, none negative; ``None`` for a range.
        bounds: start, stop and step of the range, if ``index`` is ``None``.
    """

    index: jax.Array | None
    bounds: tuple[int | None, int | None, int | None] = dataclasses.field(metadata={"static": True})

    @property
    def drops_axis(self) -> bool:
        """Whether the slice is one number."""
        return self.index is not None and self.index.ndim == 0

    def __call__(self, array: jax.Array, axis: int) -> jax.Array:
        """Cuts one axis of an array."""
        if self.index is None:
            return array[(slice(None),) * (axis % array.ndim) + (slice(*self.bounds),)]
        return jnp.take(array, self.index, axis=axis)


def cut(slice_input: SliceInput, length: int, what: str = "the axis has {} entries") -> Cut | None:
    """Checks a slice of an axis of ``length`` entries.

    Args:
        slice_input: the slice.
        length: number of entries along the axis.
        what: text for error messages, with ``{}`` for the length.

    Returns:
        The slice, or ``None`` where everything stays.

    Raises:
        CacheError: an index is out of range, nothing would be left, or the slice is of no known form.
    """
    if is_full(slice_input):
        return None
    index = read_slice(slice_input, length)
    if isinstance(index, slice):
        if not range(*index.indices(length)):
            raise CacheError(f"{slice_input!r} keeps nothing: {what.format(length)}.")
        return Cut(None, (index.start, index.stop, index.step))
    if isinstance(index, np.ndarray):
        _check(index, slice_input, length, what)
        return Cut(jnp.asarray(index % length, jnp.int32), (None, None, None))
    inside = (index >= -length) & (index < length)  # an index outside reads as NaN
    return Cut(jnp.where(inside, index % length, length), (None, None, None))


def read_slice(slice_input: Any, length: int) -> Any:
    """Converts a slice in any of its forms to a ``slice`` or an array of indices, whose range is not checked.

    Raises:
        CacheError: it has no known form.
    """
    if isinstance(slice_input, slice | tuple):
        try:
            bounds = slice_input if isinstance(slice_input, slice) else slice(*slice_input)
            bounds.indices(length)
        except (TypeError, ValueError) as error:
            raise CacheError(_unknown_form(slice_input)) from error
        return bounds
    if isinstance(slice_input, str | bytes | bool | np.bool_ | float | np.floating):
        raise CacheError(_unknown_form(slice_input))
    index: Any
    try:
        index = slice_input if isinstance(slice_input, Tracer) else np.asarray(slice_input)
    except ValueError as error:
        raise CacheError(_unknown_form(slice_input)) from error
    if index.dtype == bool and index.shape == (length,) and isinstance(index, np.ndarray):
        index = np.flatnonzero(index)
    if positions.looks_like_mask(index, length):
        raise CacheError(
            f"{slice_input!r} could be a mask of {length} entries, or the numbers 0 and 1: give booleans for a mask."
        )
    if index.ndim > 1 or (index.size and not jnp.issubdtype(index.dtype, jnp.integer)):
        raise CacheError(_unknown_form(slice_input))
    return index


def _check(index: np.ndarray, slice_input: Any, length: int, what: str) -> None:
    if not index.size:
        raise CacheError(f"{slice_input!r} keeps nothing: {what.format(length)}.")
    outside = index[(index < -length) | (index >= length)]
    if outside.size:
        raise CacheError(f"Index {outside[0]} is out of range: {what.format(length)}.")


def _unknown_form(slice_input: Any) -> str:
    return (
        f"{slice_input!r} is no slice: give a number, (start, stop), a list or array of numbers, a slice, or None for "
        "everything."
    )


def apply_slice(array: jax.Array, slice_input: SliceInput, axis: int) -> jax.Array:
    """Slices one axis; a number drops it.

    Raises:
        CacheError: see :func:`cut`.
    """
    taken = cut(slice_input, array.shape[axis])
    return array if taken is None else taken(array, axis)


def is_full(slice_input: SliceInput) -> bool:
    """Whether the slice keeps everything."""
    return slice_input is None or (isinstance(slice_input, slice) and slice_input == slice(None))
