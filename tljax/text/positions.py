"""Positions in padded text, counted over each prompt's own tokens if its padding mask is known.

Position 0 is the first token of *each* prompt and -1 its last, whichever side the padding is on; slices and masks of
positions refer to each prompt's text too. All code that takes positions uses this module to find a position's entry in
an array ``[batch, pos, ...]``. Without a mask, a position is an index into the array.

Masks are ``[batch, pos]`` or ``[pos]``, ``True`` at text. NumPy masks give NumPy results. JAX masks may be traced:
their values are then unknown, and a position that a prompt lacks gives NaN.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tljax.errors import InputError


def read_mask(mask: Any, name: str = "attention_mask") -> Any:
    """Returns an attention mask as booleans, in NumPy unless it is traced.

    Raises:
        InputError: the mask holds anything but 0 and 1, such as the additive form (0 and a large negative number); or
            it is traced, so that its values are not known, and neither boolean nor integer (where 1 is text).
    """
    if isinstance(mask, Tracer):
        if jnp.issubdtype(mask.dtype, jnp.bool_):
            return mask
        if not jnp.issubdtype(mask.dtype, jnp.integer):
            raise InputError(
                f"{name} has dtype {mask.dtype} under trace, where its values are not known: it could be 1 at text, or "
                "0 as in the additive form. Give booleans, such as mask == 1."
            )
        return mask == 1
    try:
        array = np.asarray(mask)
    except ValueError as error:
        raise InputError(f"{name} has rows of different lengths: give one entry for each token.") from error
    if array.dtype == bool:
        return array
    if array.dtype.kind not in "iuf" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(f"{name} has dtype {array.dtype}: give booleans, or 1 at text and 0 at padding.")
    is_text = array == 1
    if wrong := array[~is_text & (array != 0)].ravel()[:1].tolist():
        additive = (array <= 0).all() and (array < -1).any()
        hint = (
            "it looks like the additive form (0 at text, a large negative number at padding): give mask == 0"
            if additive
            else "give booleans, or 1 at text and 0 at padding"
        )
        raise InputError(f"{name} holds {wrong[0]}: {hint}.")
    return is_text


def looks_like_mask(numbers: Any, size: int) -> bool:
    """Whether ``numbers`` are ``size`` zeros and ones, and so may be a mask that should be boolean."""
    if isinstance(numbers, Tracer):
        return False
    array = np.asarray(numbers)
    return array.shape == (size,) and size > 1 and len({*array.tolist()}) < size and {*array.tolist()} <= {0, 1}


def is_known(mask: Any) -> bool:
    """Whether there is a mask that is not traced and has padding."""
    return mask is not None and not isinstance(mask, Tracer) and not bool(np.asarray(mask).all())


def may_pad(mask: Any) -> bool:
    """Whether positions must be counted with the mask: there is padding, or the mask is traced."""
    return isinstance(mask, Tracer) or is_known(mask)


def count_positions(mask: Any) -> Any:
    """Returns positions, int32 ``[..., pos]``, counted from each prompt's first token; at least 0 at padding too."""
    xp = np if isinstance(mask, np.ndarray) else jnp
    return xp.maximum(xp.cumsum(mask.astype(np.int32), axis=-1, dtype=np.int32) - 1, 0)


def ranks(mask: Any) -> Any:
    """Returns the position of each token in its prompt's text, int32 ``[..., pos]``; -1 at padding."""
    xp = np if isinstance(mask, np.ndarray) else jnp
    return xp.where(mask, count_positions(mask), np.int32(-1))


def lengths(mask: Any) -> Any:
    """Returns the number of tokens of each prompt, int32 ``[...]``."""
    return mask.sum(axis=-1, dtype=np.int32)


def spans(bounds: slice, length: Any) -> tuple[Any, Any, int]:
    """Returns first position, number of positions and step of a slice of texts of these lengths, by Python's rules."""
    xp = np if isinstance(length, np.ndarray) else jnp
    step = 1 if bounds.step is None else int(bounds.step)
    low, high = (0, length) if step > 0 else (-1, length - 1)

    def end(bound: int | None, default: Any) -> Any:
        if bound is None:
            return xp.zeros_like(length) + default
        return xp.clip(int(bound) + (length if bound < 0 else xp.zeros_like(length)), low, high)

    start, stop = end(bounds.start, low if step > 0 else high), end(bounds.stop, high if step > 0 else low)
    count = xp.maximum((stop - start + step - (1 if step > 0 else -1)) // step, 0)
    return start, count, step


def find(mask: Any, numbers: Any) -> tuple[Any, Any]:
    """Finds positions in the array.

    Args:
        mask: ``[..., pos]``.
        numbers: positions ``[]`` or ``[n]``, the same for every prompt, or ``[..., n]``; negative ones from the end.

    Returns:
        Array indices ``[...]`` or ``[..., n]``, and whether the prompt has that position.
    """
    xp = np if isinstance(mask, np.ndarray) and not isinstance(numbers, jax.Array) else jnp
    numbers = xp.asarray(numbers, np.int32)
    one = numbers.ndim == 0
    numbers = numbers.reshape(-1) if one else numbers
    length = lengths(mask)[..., None]
    numbers = numbers.reshape((1,) * (length.ndim - numbers.ndim) + numbers.shape)
    wanted = xp.where(numbers < 0, numbers + length, numbers)
    here = (ranks(mask)[..., None, :] == wanted[..., :, None]) & (wanted >= 0)[..., None]
    places, there = here.argmax(axis=-1).astype(np.int32), here.any(axis=-1)
    return (places[..., 0], there[..., 0]) if one else (places, there)


def chosen(mask: Any, index: Any) -> jax.Array:
    """Returns a mask of the array entries that a selection of positions picks.

    Args:
        mask: ``[..., pos]``.
        index: a number, numbers ``[n]``, a slice, or booleans ``[n]``, one for each position of the text.

    Returns:
        Boolean ``[..., pos]``.
    """
    rank, length = ranks(mask), lengths(mask)
    if isinstance(index, slice):
        start, count, step = spans(index, length)
        entry = (rank - start[..., None]) // step
        on_step = (rank - start[..., None]) % step == 0
        return jnp.asarray((rank >= 0) & on_step & (entry >= 0) & (entry < count[..., None]))
    index = jnp.asarray(index)
    rank, length = jnp.asarray(rank), jnp.asarray(length)
    if index.dtype == bool:
        return (rank >= 0) & index[jnp.clip(rank, 0, index.shape[0] - 1)]
    wanted = jnp.atleast_1d(index).astype(jnp.int32)
    wanted = wanted.reshape((1,) * length.ndim + wanted.shape)
    wanted = jnp.where(wanted < 0, wanted + length[..., None], wanted)
    return ((rank[..., None] == wanted[..., None, :]) & (rank >= 0)[..., None]).any(axis=-1)


def lacking(mask: Any, numbers: Any) -> tuple[int, int, int] | None:
    """Returns the first prompt that lacks a position, that position, and the prompt's length; ``None`` if none does.

    Args:
        mask: ``[..., pos]``, not traced; all ``True`` for a prompt that does not matter.
        numbers: ``[]`` or ``[n]``, not traced.
    """
    mask = np.atleast_2d(np.asarray(mask)).astype(bool)
    numbers = np.atleast_1d(np.asarray(numbers)).astype(np.int64)
    for prompt, length in enumerate(lengths(mask)):
        wrong = numbers[(numbers < -length) | (numbers >= length)]
        if wrong.size:
            return prompt, int(wrong[0]), int(length)
    return None


def no_such_position(prompt: int, number: int, length: int) -> str:
    """Returns the message of every error about a prompt that lacks a position."""
    return (
        f"There is no position {number} in prompt {prompt}, which has {length} tokens: positions count in each "
        f"prompt's text, 0 to {length - 1} here, or -1 to {-length} from its end."
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextCut:
    """Positions to take from arrays ``[..., batch, pos, ...]``, each prompt its own, as data for compiled functions.

    Attributes:
        places: array indices, ``[batch]``, or ``[batch, n]``; without ``batch`` for one prompt.
        there: the same shape, whether the prompt has the position; ``None`` means it always does.
        drops_axis: whether the position was one number, so that its axis is dropped.
    """

    places: jax.Array
    there: jax.Array | None
    drops_axis: bool = dataclasses.field(metadata={"static": True})

    def __call__(self, array: Any, axis: int, batch_axis: int | None = None) -> jax.Array:
        """Takes the positions along ``axis``; the batch axis is the one before it unless ``batch_axis`` is given."""
        axis %= array.ndim
        places = self.places[..., None] if self.drops_axis else self.places
        shape = [1] * array.ndim
        shape[axis] = places.shape[-1]
        if places.ndim == 2:
            shape[axis - 1 if batch_axis is None else batch_axis] = places.shape[0]
        taken = jnp.take_along_axis(jnp.asarray(array), places.reshape(shape), axis=axis)
        if self.there is not None:
            nothing = _nothing(taken.dtype)
            taken = jnp.where(self.there.reshape(shape), taken, nothing)
        return taken.squeeze(axis) if self.drops_axis else taken

    @property
    def mask(self) -> jax.Array:
        """Mask ``[batch, n]`` of the taken entries, ``True`` at text."""
        return jnp.ones(self.places.shape, bool) if self.there is None else self.there


def _nothing(dtype: Any) -> Any:
    """Returns the fill value where there is no token: NaN, -1 for integers, or ``False``."""
    if jnp.issubdtype(dtype, jnp.bool_):
        return False
    return np.asarray(np.nan if jnp.issubdtype(dtype, jnp.inexact) else -1).astype(dtype)


def fill_nothing(array: jax.Array, where: jax.Array) -> jax.Array:
    """Fills an array with NaN (-1 for integers) where ``where`` is ``True``, because a position does not exist."""
    return jnp.where(where, _nothing(array.dtype), array)


class NoPosition(Exception):
    """Some prompt lacks a selected position; the caller puts the message into its own error."""


def text_cut(mask: Any, index: Any) -> TextCut:
    """Returns the array entries that a selection of positions picks in each prompt.

    If a slice keeps fewer positions of one prompt than of another, NaN fills the rest, on the side of the padding.

    Args:
        mask: ``[batch, pos]`` or ``[pos]``.
        index: a number, numbers ``[n]`` or a slice.

    Raises:
        NoPosition: a prompt lacks a position that was named by number, or a slice keeps nothing of any
            prompt. (Not checked under trace.)
    """
    known = not isinstance(mask, Tracer)
    mask = np.asarray(mask).astype(bool) if known else mask.astype(bool)
    if isinstance(index, slice):
        return _sliced(mask, index)
    if known and not isinstance(index, Tracer) and (wrong := lacking(mask, index)) is not None:
        raise NoPosition(no_such_position(*wrong))
    places, there = find(mask, index)
    everywhere = isinstance(there, np.ndarray) and bool(there.all())
    return TextCut(jnp.asarray(places), None if everywhere else jnp.asarray(there), np.ndim(index) == 0)


def _sliced(mask: Any, bounds: slice) -> TextCut:
    xp = np if isinstance(mask, np.ndarray) else jnp
    start, count, step = spans(bounds, lengths(mask) if xp is jnp else np.asarray(lengths(mask)))
    if xp is np:
        if not count.any():
            raise NoPosition(f"{bounds} keeps nothing: the longest prompt has {int(lengths(mask).max())} tokens.")
        width = int(count.max())
    else:
        width = max(len(range(*bounds.indices(n))) for n in range(1, mask.shape[-1] + 1))
    at_end = mask[..., -1].all()
    place = xp.arange(width, dtype=np.int32).reshape((1,) * (mask.ndim - 1) + (width,))
    entry = place - xp.where(at_end, width - count, 0)[..., None].astype(np.int32)
    there = (entry >= 0) & (entry < count[..., None])
    places, _ = find(mask, xp.where(there, start[..., None] + entry * step, 0).astype(np.int32))
    return TextCut(jnp.asarray(places), None if xp is np and there.all() else jnp.asarray(there), False)


def mean_of_text(value: jax.Array, axes: Sequence[str], over: Sequence[str], mask: Any) -> jax.Array:
    """Returns the mean of an activation over some axes, without padding and with prompts aligned at their first token.

    Args:
        value: the activation.
        axes: its axes, ``batch`` first; ``pos``, ``query_pos`` and ``key_pos`` are positions.
        over: the axes to average over.
        mask: ``[batch, pos]``.

    Returns:
        The mean, with one entry along each averaged axis, but the full ``batch`` axis if positions are not averaged.
    """
    place, there = find(mask, np.arange(mask.shape[-1], dtype=np.int32))
    rank = jnp.maximum(jnp.asarray(ranks(mask)), 0)
    counted = jnp.ones((1,) * value.ndim, bool)
    positions = [number for number, axis in enumerate(axes) if axis in ("pos", "query_pos", "key_pos")]

    def laid(array: Any, number: int) -> jax.Array:
        shape = [1] * value.ndim
        shape[0], shape[number] = mask.shape
        return jnp.asarray(array).reshape(shape)

    for number in positions:
        value = jnp.take_along_axis(value, laid(place, number), axis=number)
        counted = counted & laid(there, number)
    mean = value.mean(axis=tuple(axes.index(axis) for axis in over), keepdims=True, where=counted)
    for number in positions:
        if mean.shape[number] > 1:
            mean = jnp.take_along_axis(mean, laid(rank, number), axis=number)
    return mean
