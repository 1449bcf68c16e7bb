"""A stored weight kept packed: its codes, and which scale belongs to each, brought into our layout without rounding.

The table's rearrangement (heads split, parts fused, experts stacked, axes transposed) is applied to the codes and, as
an array of the same shape, to the number of each code's scale. Along each axis of the result neighbours that share
scales form blocks: that is the form of :class:`~tljax.quantized_weight.QuantizedWeight`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

from tljax.checkpoints.files.reader import Tensors
from tljax.checkpoints.rows import Entry
from tljax.errors import UnsupportedModelError
from tljax.modules.parameters import contracted_axes
from tljax.quantized_weight import QuantizedWeight, pack
from tljax.weights.quantization import packed_axis

_SHORTEST = 8
"""Fewest codes that share a scale: with fewer, the scales take half as much memory as the codes or more."""


@dataclasses.dataclass(frozen=True)
class Codes:
    """A weight as its file holds it: ``(number - zero) * scale``, or ``table[number] * scale``.

    Attributes:
        numbers: ``[...]``, the weight's shape: int8, or an eight-bit float; of four bits -8 to 7, or 0 to 15 with a
            table.
        scale: ``[...]`` of any shape.
        place: int, broadcasts to ``numbers``: the place of each number's scale in ``scale``, flattened.
        bits: 8, or 4 for those that fit in four bits.
        zero: as ``scale``; ``None``: 0.
        table: ``[16]`` or ``None``.
        shortest: fewest numbers, on average, that share a scale in a weight that is kept packed.
    """

    numbers: np.ndarray
    scale: np.ndarray
    place: np.ndarray
    bits: int = 8
    zero: np.ndarray | None = None
    table: np.ndarray | None = None
    shortest: int = _SHORTEST

    @property
    def kind(self) -> tuple[Any, ...]:
        """What experts that are held in one array have in common."""
        return self.bits, self.zero is None, None if self.table is None else self.table.tobytes()


@runtime_checkable
class CodedTensors(Protocol):
    """Tensors of which some are stored as codes."""

    def has_codes(self, key: str) -> bool:
        """Whether tensor ``key`` can be read as codes."""
        ...

    def codes(self, key: str) -> Codes:
        """Returns a quantised weight as its codes."""
        ...


def has_codes(tensors: Tensors, keys: Sequence[str]) -> bool:
    """Whether all these tensors can be read as codes."""
    return isinstance(tensors, CodedTensors) and all(map(tensors.has_codes, keys))


def codes_of(tensors: Tensors, key: str) -> Codes:
    """Returns a tensor for which :func:`has_codes` is true as its codes."""
    return cast(CodedTensors, tensors).codes(key)


def place_of_rows(shape: Sequence[int]) -> np.ndarray:
    """Returns the places of scales that each output has one of, ``[out, 1]``."""
    return np.arange(shape[0], dtype=np.int32)[:, None]


def read_packed(
    entry: Entry, tensors: Tensors, axes: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int], dtype: str
) -> tuple[QuantizedWeight, ...]:
    """Reads the parameters of one entry as quantised weights, arrays of numpy's.

    Args:
        entry: the entry; all its tensors have codes.
        tensors: the stored tensors.
        axes: axes of every parameter, by dotted path.
        sizes: axis lengths.
        dtype: dtype of the floats.

    Raises:
        UnsupportedModelError: scales do not belong to runs of numbers, or experts differ in how they are stored.
    """
    keys, ours = entry.keys(sizes), axes[entry.targets[0]]
    stored = {key: codes_of(tensors, key) for key in keys}
    if len({one.kind for one in stored.values()}) > 1:
        raise _unsupported(keys[0], f"and {keys[-1]} are packed in two ways")
    counts = np.cumsum([0, *(one.scale.size for one in stored.values())])
    start = dict(zip(keys, counts, strict=False))
    numbers = entry.read(lambda key: stored[key].numbers, ours, sizes)
    places = entry.read(
        lambda key: np.broadcast_to(stored[key].place + start[key], stored[key].numbers.shape), ours, sizes
    )
    whole = _joined([one.scale for one in stored.values()])
    zeros = [one.zero for one in stored.values() if one.zero is not None]
    zero, first = _joined(zeros) if zeros else None, stored[keys[0]]
    found = []
    for path, own, place in zip(entry.targets, numbers, places, strict=True):
        small = place[tuple(slice(None, None, block_length(place, axis)) for axis in range(place.ndim))]
        summed = math.prod(own.shape[axis] for axis in contracted_axes(path, axes[path]))
        if small.size * min(first.shortest, summed) > own.size:
            raise _unsupported(keys[0], "has scales that belong to no runs of its inputs (desc_act), or to short ones")
        packed = packed_axis(path, axes[path], own.shape) if first.bits == 4 else None
        codes = own if packed is None else pack(np.ascontiguousarray(own).view(np.uint8), packed)
        found.append(
            QuantizedWeight(
                np.ascontiguousarray(codes),
                whole[small],
                None if zero is None else zero[small],
                first.table,
                packed,
                dtype,
            )
        )
    return tuple(found)


def block_length(place: np.ndarray, axis: int) -> int:
    """Returns the length of the longest equal blocks along an axis in which all numbers share their scales.

    >>> block_length(np.array([[0, 0, 1, 1], [2, 2, 3, 3]]), 1)
    2
    """
    moved = np.moveaxis(place, axis, 0)
    edges = [row + 1 for row in range(len(moved) - 1) if not np.array_equal(moved[row], moved[row + 1])]
    return math.gcd(len(moved), *edges)


def spread_places(scale: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """Returns the places of scales of blocks whose number along each axis divides it, ``shape``."""
    place = np.arange(math.prod(scale), dtype=np.int32).reshape(scale)
    for axis, (count, size) in enumerate(zip(scale, shape, strict=True)):
        place = np.repeat(place, size // count, axis)
    return place


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([part.reshape(-1) for part in parts])


def _unsupported(key: str, problem: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{key} {problem}: tljax cannot keep it packed. Leave dequantize=False out, and choose the dtype of its floats "
        "with dtype='bfloat16'; quantize='int8' rounds them anew while they load."
    )
