"""``Slice``: one axis cut by a number, a range or a list, as TransformerLens writes it."""

from typing import Any

import jax
import numpy as np

from tljax.cache.slices import SliceInput, apply_slice
from tljax.errors import InputError


class Slice:
    """A selection along one axis.

    Args:
        input_slice: a number (which drops the axis), ``(stop,)``, ``(start, stop[, step])`` or a ``slice``, a list or
            an array of indices or a mask, or ``None`` for everything.

    Attributes:
        slice: the number, ``slice`` or array.
        mode: ``"int"``, ``"slice"``, ``"array"`` or ``"identity"``.

    Raises:
        InputError: ``input_slice`` is anything else.

    >>> x = np.arange(12).reshape(3, 4)
    >>> Slice((1, 3)).apply(x, dim=1).shape, Slice(2).apply(x).shape, Slice([0, 2]).indices(4)
    ((3, 2), (4,), array([0, 2]))
    """

    slice: Any
    mode: str

    def __init__(self, input_slice: SliceInput = None) -> None:
        if input_slice is None:
            self.slice, self.mode = slice(None), "identity"
        elif isinstance(input_slice, int | np.integer) and not isinstance(input_slice, bool):
            self.slice, self.mode = int(input_slice), "int"
        elif isinstance(input_slice, tuple) and 1 <= len(input_slice) <= 3:
            self.slice, self.mode = slice(*input_slice), "slice"
        elif isinstance(input_slice, slice):
            self.slice, self.mode = input_slice, "slice"
        elif isinstance(input_slice, list | np.ndarray | jax.Array):
            self.slice, self.mode = np.asarray(input_slice), "array"
        else:
            raise InputError(
                f"A slice is a number, (stop,), (start, stop[, step]), a slice, a list, an array or None; got "
                f"{input_slice!r}."
            )

    def apply(self, tensor: Any, dim: int = 0) -> Any:
        """Slices axis ``dim`` of an array; a number drops it."""
        return apply_slice(tensor, self.slice, dim)

    def indices(self, max_ctx: int | None = None) -> np.ndarray:
        """Returns the indices taken from an axis of ``max_ctx`` entries (not needed for a number)."""
        if self.mode == "int":
            return np.array([self.slice])
        if max_ctx is None:
            raise InputError(f"indices needs max_ctx, the length of the axis, for {self!r}.")
        return np.arange(max_ctx)[self.slice]

    @classmethod
    def unwrap(cls, slice_input: "Slice | SliceInput") -> "Slice":
        """Returns ``slice_input`` as a ``Slice``; a number becomes a list of one, which keeps the axis."""
        if isinstance(slice_input, Slice):
            return slice_input
        return cls([int(slice_input)] if isinstance(slice_input, int | np.integer) else slice_input)

    def __repr__(self) -> str:
        return f"Slice: {self.slice} Mode: {self.mode}"
