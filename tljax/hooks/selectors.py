"""``Selector``: the entries of one axis that an intervention addresses."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tljax.errors import InterventionError
from tljax.hooks.point import POSITION_AXES
from tljax.text import positions

AXIS_ALIASES = {
    "d_mlp": "neuron",
    "d_vocab_out": "d_vocab",
    "head_index": "head",
    "dest": "query_pos",
    "dest_pos": "query_pos",
    "src": "key_pos",
    "src_pos": "key_pos",
}


SPANS = ("prompt", "new")
"""Named parts of a text: the prompt, and the tokens that generation adds. Outside generation all is prompt."""


class Selector:
    """Selected entries of one axis: a number, several numbers, a boolean mask, a slice, or a named part of the text.

    Positions count in each prompt's text if the run knows its padding (:mod:`tljax.text.positions`). A named part of
    the text, and the mask that replaces it in generation (kind ``"places"``), refer to the array, padding included.

    Numbers and masks are stored as float32 leaves (exact up to 2**24), so that ``jax.grad`` accepts an intervention
    as its argument: integer leaves would make it refuse the whole pytree.
    """

    __slots__ = ("axis", "kind", "payload")

    axis: str
    kind: Literal["number", "numbers", "mask", "slice", "span", "places"]
    payload: Any

    def __init__(self, axis: str, index: Any) -> None:
        self.axis = axis
        if isinstance(index, slice):
            self.kind, self.payload = "slice", index
            return
        if isinstance(index, str):
            if index not in SPANS or axis not in POSITION_AXES:
                raise InterventionError(
                    f'{axis}={index!r} is not known: a position can be "prompt" or "new" (tokens that generate adds).'
                )
            self.kind, self.payload = "span", index
            return
        if isinstance(index, tuple):
            raise InterventionError(
                f"{axis}={index!r} could be numbers, or a start and an end: write {axis}={list(index)!r} for these "
                f"entries, {axis}=slice(start, stop) for a range."
            )
        array = index if isinstance(index, jax.Array) else np.asarray(index)
        if array.ndim > 1:
            raise InterventionError(
                f"{axis}= takes a number, a list of numbers, a boolean mask of the axis or a slice; got an array of "
                f"shape {tuple(array.shape)}. For a mask over several axes use mask=."
            )
        if array.ndim == 0 and array.dtype == bool:
            raise InterventionError(
                f"{axis}= takes a number, not {bool(array)}; a mask of the axis has one entry for each."
            )
        self.kind = "mask" if array.dtype == bool else "number" if array.ndim == 0 else "numbers"
        if self.kind != "mask" and not jnp.issubdtype(array.dtype, jnp.integer):
            raise InterventionError(f"{axis}= takes whole numbers, got dtype {array.dtype}.")
        self.payload = array.astype(jnp.float32 if isinstance(array, jax.Array) else np.float32)

    @classmethod
    def stored(cls, axis: str, kind: Any, payload: Any) -> "Selector":
        """Builds a selector from its parts, unchecked."""
        self = object.__new__(cls)
        self.axis, self.kind, self.payload = axis, kind, payload
        return self

    @property
    def size(self) -> int:
        """Number of entries of a mask or a list of numbers."""
        return self.payload.shape[0]

    def signature(self) -> Any:
        """Returns the static part of the selector, which belongs to the structure of compiled programs."""
        static = (self.payload.start, self.payload.stop, self.payload.step) if self.kind == "slice" else None
        return (self.axis, self.kind, self.payload if self.kind == "span" else static)

    @property
    def is_static(self) -> bool:
        """Whether the selection is part of the pytree's structure, not of its leaves."""
        return self.kind in ("slice", "span")

    def check(self, size: int, name: str) -> None:
        """Raises InterventionError if the selection does not fit an axis of ``size`` entries at hook point ``name``."""
        if self.is_static or isinstance(self.payload, Tracer):
            return
        if self.kind in ("mask", "places"):
            if self.size != size:
                raise InterventionError(
                    f"The mask for axis {self.axis!r} of {name} has {self.size} entries; the axis has {size}."
                )
            return
        numbers = np.atleast_1d(np.asarray(self.payload)).astype(int)
        if self.kind == "numbers" and positions.looks_like_mask(numbers, size):
            raise InterventionError(
                f"{self.axis}={numbers.tolist()} at {name} could be a mask of the {size} entries, or the numbers 0 and "
                "1: give booleans for a mask, and each number once otherwise."
            )
        if bad := [int(n) for n in numbers if not -size <= n < size]:
            raise InterventionError(
                f"{self.axis}={bad[0]} is out of range at {name}: the axis has {size} entries (0 to {size - 1}, or "
                "negative from the end)."
            )

    @property
    def counts_in_text(self) -> bool:
        """Whether the selection depends on padding."""
        return self.axis in POSITION_AXES and self.kind not in ("span", "places")

    @property
    def is_numbered(self) -> bool:
        """Whether entries are named by number."""
        return self.kind in ("number", "numbers")

    def check_text(self, text: Any, name: str) -> None:
        """Raises InterventionError if a prompt lacks a position named by number; ``text`` is ``[batch, pos]``."""
        if not (self.counts_in_text and self.is_numbered) or isinstance(self.payload, Tracer):
            return
        if (wrong := positions.lacking(text, self.payload)) is not None:
            raise InterventionError(f"{self.axis}={wrong[1]} at {name}: {positions.no_such_position(*wrong)}")

    def lacking(self, text: jax.Array) -> jax.Array | None:
        """Returns a mask ``[batch]`` of prompts that lack a position named by number; ``None`` if none is so named."""
        if not (self.counts_in_text and self.is_numbered):
            return None
        return ~positions.find(text, jnp.atleast_1d(self._whole_numbers))[1].all(axis=-1)

    def text_mask(self, text: jax.Array) -> jax.Array:
        """Returns the selected entries of padded prompts, boolean ``[batch, pos]``."""
        match self.kind:
            case "slice":
                return positions.chosen(text, self.payload)
            case "mask":
                return positions.chosen(text, jnp.asarray(self.payload) != 0)
            case _:
                return positions.chosen(text, self._whole_numbers)

    @property
    def _whole_numbers(self) -> jax.Array:
        return jnp.asarray(self.payload).astype(jnp.int32)

    def exist(self, size: int) -> jax.Array | None:
        """Returns whether all traced numbers are in range, a scalar; ``None`` if there are no traced numbers."""
        if self.kind not in ("number", "numbers") or not isinstance(self.payload, Tracer):
            return None
        return self._inside(size).all()

    def _inside(self, size: int) -> jax.Array:
        numbers = jnp.asarray(self.payload)
        return (numbers >= -size) & (numbers < size)

    def numbers(self, size: int) -> jax.Array:
        """Returns the numbers as int32, negative ones counted from the end; ``size`` for one out of range."""
        return jnp.where(self._inside(size), self._whole_numbers % jnp.int32(size), jnp.int32(size))

    def mask(self, size: int) -> jax.Array:
        """Returns the selected entries, boolean ``[size]``."""
        if self.kind in ("mask", "places"):
            return jnp.asarray(self.payload) != 0
        if self.kind == "span":
            return jnp.full(size, self.payload == "prompt")
        if self.kind == "slice":
            chosen = np.zeros(size, bool)
            chosen[self.payload] = True
            return jnp.asarray(chosen)
        numbers = jnp.atleast_1d(self.numbers(size))
        return (jnp.arange(size)[:, None] == numbers[None, :]).any(axis=1)
