"""Reading a part of a parameter from the part of a tensor that holds it.

A device of a mesh needs a slice of a parameter. The table's rearrangement (transposed axes, heads split, parts fused,
experts stacked) is followed back to ranges of the stored tensor's dimensions: those are read, and what comes along
because grouped axes lie interleaved (``(n_heads 3 d_head)``) is dropped.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from tljax.checkpoints.files.reader import Tensors
from tljax.checkpoints.rows import Entry, each_of, merge_axes

Index = tuple[slice, ...]


@runtime_checkable
class PartTensors(Protocol):
    """Tensors of which a part can be read without the rest."""

    def reads_parts(self, key: str) -> bool:
        """Whether a part of tensor ``key`` can be read alone."""
        ...

    def read_part(self, key: str, index: Index) -> np.ndarray:
        """Returns ``tensor[index]`` in its stored dtype."""
        ...


def reads_parts(tensors: Tensors, keys: Sequence[str]) -> bool:
    """Whether parts of all these tensors can be read alone."""
    return isinstance(tensors, PartTensors) and all(map(tensors.reads_parts, keys))


@dataclasses.dataclass
class PartReader:
    """Reads slices of the parameters of one entry; a range that several parameters share is read once.

    Attributes:
        entry: the row, bound to its tensors.
        tensors: the stored tensors.
        ours: axes of the entry's first target.
        sizes: axis lengths of the checkpoint.
    """

    entry: Entry
    tensors: PartTensors
    ours: Sequence[str]
    sizes: Mapping[str, int]
    _seen: dict[tuple[str, tuple[tuple[int, int], ...]], np.ndarray] = dataclasses.field(default_factory=dict)

    def read(self, part: int, index: Index) -> np.ndarray:
        """Returns a slice of the entry's target number ``part``, in our layout.

        Args:
            part: number of the target.
            index: a range along each axis of the target, each with a start and a stop.
        """
        row, layout = self.entry.row, self.entry.row.layout(self.ours, part, self.sizes)
        wanted = {axis: (0, length) for axis, length in zip(layout.stored, layout.lengths, strict=True)}
        final: list[slice] = []
        for axis, one in zip(self.ours, index, strict=True):
            pair = layout.cut.get(axis)
            if pair is None:
                wanted[axis] = (one.start, one.stop)
                final.append(slice(None))
            else:  # stored in groups: read whole groups
                runs, group = pair, layout.lengths[layout.stored.index(layout.group[axis])]
                first, last = one.start // group, -(-one.stop // group)
                wanted[runs] = (first, last)
                final.append(slice(one.start - first * group, one.stop - first * group))
        if layout.number is not None:
            wanted[layout.stored[layout.number]] = (part, part + 1)
        ranges, shape, picked, place = [], [], [], 0
        for group in layout.groups:
            span = slice(place, place + len(group))
            held = _held([wanted[axis] for axis in layout.stored[span]], layout.whole[span], layout.offset[span])
            ranges.append(held.stored)
            shape += held.shape
            picked += held.picked
            place += len(group)
        if row.skip:
            ranges[0] = (ranges[0][0] + row.skip, ranges[0][1] + row.skip)
        piece = self._stored(ranges).reshape(shape)[(*picked, ...)].transpose(layout.order)
        piece = piece[0] if layout.number is not None else piece
        return merge_axes(piece, layout.axes, self.ours)[(*final, ...)]

    def _stored(self, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
        """Returns the ranges of the stored tensor, or of those stored one for each expert or head, stacked."""
        if each_of(self.entry.key) is None:
            return self._range(self.entry.key, ranges)
        keys = self.entry.keys(self.sizes)[slice(*ranges[0])]
        return np.stack([self._range(key, ranges[1:]) for key in keys])

    def _range(self, key: str, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
        at = key, tuple(ranges)
        if at in self._seen:
            return self._seen[at]
        part = self.tensors.read_part(key, tuple(slice(*one) for one in ranges))
        if len(self.entry.targets) > 1 or "/" in self.entry.row.axes:  # other slices lie in the same range
            self._seen[at] = part
        return part


@dataclasses.dataclass(frozen=True)
class _Held:
    """A range of one stored dimension: what it holds, and what of that is wanted."""

    stored: tuple[int, int]
    shape: list[int]
    picked: list[slice]


def _held(wanted: Sequence[tuple[int, int]], lengths: Sequence[int], offsets: Sequence[int]) -> _Held:
    """Returns the smallest range of a dimension that holds what is wanted of the axes grouped in it.

    Args:
        wanted: a range along each axis, outermost first.
        lengths: the axes' lengths as stored.
        offsets: where the ranges start, along an axis that several parameters share.
    """
    start, step = 0, math.prod(lengths)
    moved = [(low + offset, high + offset) for (low, high), offset in zip(wanted, offsets, strict=True)]
    number = next((place for place, (low, high) in enumerate(moved) if high - low != 1), len(moved) - 1)
    for (low, _), length in zip(moved[: number + 1], lengths, strict=False):
        step //= length
        start += low * step
    count, inner = moved[number][1] - moved[number][0], number + 1  # axes inside the first range are read whole
    picked = [slice(0, 1)] * number + [slice(0, count)] + [slice(*one) for one in moved[inner:]]
    return _Held((start, start + count * step), [1] * number + [count, *lengths[inner:]], picked)
