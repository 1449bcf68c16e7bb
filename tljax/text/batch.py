"""``Batch``: prompts of different lengths as one object that says which positions are text."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import is_traced, whole
from tljax.errors import InputError
from tljax.text.padding import check_int32, pad_rows
from tljax.text.positions import count_positions, read_mask
from tljax.text.tokenizer import check_padding_side
from tljax.typing import PaddingSide

_OWN_MASK = "To hide tokens inside a prompt, pass plain tokens and attention_mask= to the model."


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Batch:
    """Prompts of any lengths, padded on one side; made by ``model.to_batch`` or :meth:`from_mask`.

    Accepted wherever prompts are (forward, loss, caches, sweeps); each prompt gets the same results as when run alone.
    A pytree: its arrays may be traced, ``padding_side`` is static.

    Attributes:
        tokens: ids ``[batch, pos]``, int32; those at padding are never read.
        mask: ``[batch, pos]``, ``True`` at text.
        positions: ``[batch, pos]``, int32, counted from each prompt's first token.
        padding_side: where shorter prompts are filled, ``"left"`` or ``"right"``.
    """

    tokens: jax.Array
    mask: jax.Array
    positions: jax.Array
    padding_side: PaddingSide = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_mask(cls, tokens: Any, attention_mask: Any, padding_side: PaddingSide | None = None) -> "Batch":
        """Makes a batch of padded tokens and a mask, such as a Hugging Face tokenizer returns.

        Args:
            tokens: ids ``[batch, pos]``, or ``[pos]`` for one prompt.
            attention_mask: the same shape, 1 at text and 0 at padding. Each row's ones must be contiguous, and all
                padding on one side.
            padding_side: that side; ``None`` reads it from the mask (right if nothing is padded), which must then not
                be traced.

        Raises:
            InputError: shapes differ, or there is a row without text, a gap inside a prompt, or padding on both sides.

        >>> Batch.from_mask([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]])
        Batch(2 prompts of 1 to 3 tokens, padded left)
        """
        check_padding_side(padding_side)
        ids, mask = _two_axes(tokens), _two_axes(attention_mask)
        if ids.shape != mask.shape:
            raise InputError(
                f"attention_mask has shape {tuple(mask.shape)}; the tokens have shape {tuple(ids.shape)}. Give one "
                "mask entry for each token."
            )
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise InputError(f"Token ids must be integers, got dtype {ids.dtype}.")
        check_int32(ids)
        mask = read_mask(mask)
        if not is_traced(mask):
            padding_side = padding_side or _side_of(mask)
            _check_mask(mask, padding_side)
        elif padding_side is None:
            raise InputError(
                "A traced mask does not show its padding side: pass padding_side='left' or 'right', or make the Batch "
                "outside jax.jit."
            )
        return cls._make(ids, mask, padding_side)

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Sequence[int] | np.ndarray],
        padding_side: PaddingSide = "right",
        padding: int = 0,
        width: int | None = None,
    ) -> "Batch":
        """Pads rows of ids.

        Args:
            rows: ids of each prompt, at least one.
            padding_side: where to fill.
            padding: the id to fill with.
            width: padded length, at least that of the longest row, which is the default.

        Raises:
            InputError: no rows, a row without tokens, or one longer than ``width``.
        """
        lengths = [len(row) for row in rows]
        if not lengths:
            raise InputError("There are no prompts: give at least one.")
        if 0 in lengths:
            raise InputError(
                f"Prompt {lengths.index(0)} has no tokens, so there is nothing to run. Leave it out, or start it with "
                "a BOS token (prepend_bos=True for texts)."
            )
        width = max(lengths) if width is None else width
        if width < max(lengths):
            raise InputError(f"The longest prompt has {max(lengths)} tokens, more than width={width}.")
        return cls._make(*pad_rows(rows, padding_side, padding, width), padding_side)

    @classmethod
    def _make(cls, ids: Any, mask: Any, padding_side: PaddingSide) -> "Batch":
        if not is_traced(ids, mask):  # on the host nothing is compiled for a length
            ids, mask = np.asarray(ids).astype(np.int32), np.asarray(mask).astype(bool)
            tokens, mask, positions = jax.device_put((ids, mask, count_positions(mask)))
            return cls(tokens, mask, positions, padding_side)
        mask = jnp.asarray(mask).astype(bool)
        return cls(jnp.asarray(ids).astype(jnp.int32), mask, count_positions(mask), padding_side)

    @property
    def lengths(self) -> jax.Array:
        """Number of tokens in each prompt, ``[batch]``, int32."""
        return self.mask.sum(axis=-1, dtype=jnp.int32)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of prompts, and positions with padding."""
        return self.tokens.shape[0], self.tokens.shape[1]

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def row(self, index: int) -> jax.Array:
        """Returns the tokens of one prompt without padding, ``[n]``.

        Raises:
            InputError: no such prompt, or the batch is traced (its lengths are then unknown).
        """
        if not -len(self) <= whole(index, "index") < len(self):
            raise InputError(f"There is no prompt {index}: the batch has {len(self)}.")
        if is_traced(self.mask):
            raise InputError("A traced batch has no rows of known length: call batch.row outside jax.jit.")
        return self.tokens[index][np.flatnonzero(np.asarray(self.mask[index]))]

    def check(self) -> None:
        """Checks that tokens, mask and positions are consistent; only shapes if they are traced.

        Raises:
            InputError: they are not.
        """
        shapes = {name: np.shape(getattr(self, name)) for name in ("tokens", "mask", "positions")}
        if len(set(shapes.values())) > 1 or len(self.shape) != 2 or np.ndim(self.tokens) != 2:
            raise InputError(
                f"The parts of this Batch have shapes {shapes}, not one shape [batch, pos]. Make it with "
                "model.to_batch(prompts) or Batch.from_mask(tokens, mask)."
            )
        if is_traced(self.mask, self.positions):
            return
        mask = np.asarray(self.mask)
        _check_mask(mask, self.padding_side)
        if (np.asarray(self.positions) != count_positions(mask))[mask].any():
            raise InputError(
                "The positions of this Batch do not count up from 0 at each prompt's first token, as its mask says "
                "they should. Make it with Batch.from_mask(tokens, mask), which counts them."
            )

    def __repr__(self) -> str:
        if not isinstance(self.mask, jax.Array | np.ndarray):
            return f"Batch(tokens={self.tokens!r}, mask={self.mask!r}, padding_side={self.padding_side!r})"
        count = f"{len(self)} prompt{'s' * (len(self) != 1)}"
        if is_traced(self.mask):
            return f"Batch({count} in {self.shape[1]} positions, padded {self.padding_side}, traced)"
        lengths = np.asarray(self.mask).sum(axis=-1)
        low, high = int(lengths.min()), int(lengths.max())
        if low == high == self.shape[1]:
            return f"Batch({count} of {high} token{'s' * (high != 1)})"
        return f"Batch({count} of {f'{low} to ' * (low != high)}{high} tokens, padded {self.padding_side})"


def _two_axes(value: Any) -> Any:
    try:
        array = value if isinstance(value, jax.Array) else np.asarray(value)
    except ValueError as error:
        raise InputError(
            "The rows have different lengths. Give padded rows, or let model.to_batch(rows) pad them."
        ) from error
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(f"A Batch needs tokens and mask of shape [batch, pos], got {tuple(array.shape)}.")
    return array


def _side_of(mask: np.ndarray) -> PaddingSide:
    return "right" if mask[:, 0].all() else "left"


def _check_mask(mask: np.ndarray, padding_side: PaddingSide) -> None:
    for row, visible in enumerate(mask):
        places = np.flatnonzero(visible)
        if not len(places):
            raise InputError(
                f"Row {row} of attention_mask is all padding, so there is nothing to run. Leave that row out."
            )
        if places[-1] - places[0] + 1 != len(places):
            gap = int(np.flatnonzero(np.diff(places) > 1)[0])
            raise InputError(
                f"Row {row} of attention_mask has a gap after position {int(places[gap])}: the tokens of a Batch's "
                f"prompt stand together. {_OWN_MASK}"
            )
        edge = places[-1] == mask.shape[1] - 1 if padding_side == "left" else places[0] == 0
        if not edge:
            raise InputError(
                f"Row {row} of attention_mask is not padded on the {padding_side} only: its text is at positions "
                f"{int(places[0])} to {int(places[-1])} of {mask.shape[1]}. Pad every row on one side, as "
                "model.to_batch(list_of_rows) does."
            )
