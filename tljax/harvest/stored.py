"""Arrays that lie in several shards, used like one array."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tljax.errors import HarvestError

_BFLOAT16 = np.dtype(jnp.bfloat16)


class StoredArray:
    """An array ``[token, ...]`` in shards, memory-mapped: indexing reads what is asked for, and nothing else.

    Args:
        shards: the parts, along the first axis.
    """

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self.shards = tuple(shards)
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in self.shards])])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole."""
        return (len(self), *self.shards[0].shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """As what it is stored."""
        return self.shards[0].dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.shards[0].ndim

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"StoredArray(shape={self.shape}, dtype={self.dtype}, shards={len(self.shards)})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = np.concatenate(self.shards)
        return whole if dtype is None else whole.astype(dtype)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Reads rows by number, slice, list or mask; more indices apply to what was read.

        Raises:
            IndexError: a row that is not there.
        """
        if isinstance(rows, tuple):
            read = self[rows[0]]
            return read[rows[1:]] if np.ndim(rows[0]) == 0 and not isinstance(rows[0], slice) else read[:, *rows[1:]]
        if isinstance(rows, slice):
            return self._between(*rows.indices(len(self)))
        numbers = np.asarray(rows)
        if numbers.dtype == bool:
            if numbers.shape != (len(self),):
                raise IndexError(f"The mask has shape {numbers.shape}; there are {len(self)} tokens.")
            numbers = np.flatnonzero(numbers)
        if numbers.dtype.kind not in "iu":
            raise IndexError(f"Rows are named by number, slice or mask, not {numbers.dtype}.")
        if numbers.size and (numbers.min() < -len(self) or numbers.max() >= len(self)):
            raise IndexError(f"A row is out of range: there are {len(self)} tokens, 0 to {len(self) - 1}.")
        flat = numbers.reshape(-1)
        taken = self.take(np.where(flat < 0, flat + len(self), flat))
        return taken.reshape(*numbers.shape, *self.shape[1:]) if numbers.ndim else taken[0]

    def _between(self, start: int, stop: int, step: int) -> np.ndarray:
        if step != 1:
            return self.take(np.arange(start, stop, step))
        parts = [
            part[max(start - first, 0) : max(stop - first, 0)]
            for first, part in zip(self._starts, self.shards, strict=False)
            if first < stop and first + len(part) > start
        ]
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def take(self, rows: np.ndarray, dtype: Any = None) -> np.ndarray:
        """Reads rows ``[n]``, which must be in range, in the order of the file, into a new array ``[n, ...]``."""
        target = np.dtype(self.dtype if dtype is None else dtype)
        taken = np.empty((len(rows), *self.shape[1:]), self.dtype)
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        bounds = np.searchsorted(ordered, self._starts)
        for number, part in enumerate(self.shards):
            low, high = bounds[number], bounds[number + 1]
            if low < high:
                taken[order[low:high]] = part[ordered[low:high] - self._starts[number]]
        return as_dtype(taken, target)


def as_dtype(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Returns values of another dtype; bfloat16 to float32 by moving bits, which is quicker than a cast."""
    dtype = np.dtype(dtype)
    if values.dtype == _BFLOAT16 and dtype == np.float32:
        wide = values.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return values.astype(dtype, copy=False)


def one_point(points: tuple[str, ...], given: Any) -> tuple[str, ...]:
    """Returns the names, of those stored, that ``points=`` asks for.

    Raises:
        HarvestError: one is not stored.
    """
    if given is None:
        return points
    wanted = (given,) if isinstance(given, str) else tuple(given)
    for name in wanted:
        if name not in points:
            raise not_stored(name, points)
    return wanted


def not_stored(name: Any, points: Sequence[str]) -> HarvestError:
    """Returns the error for a point that a store does not have."""
    from tljax.errors import nearest

    return HarvestError(f"{name!r} is not stored here.{nearest(str(name), points)} Stored: {', '.join(points)}.")
