"""Multiplying quantised numbers by their scales: one for all, per row, per group of inputs, or per block."""

import math

import numpy as np

from tljax.checkpoints.formats.quantized.layout import Packed


def fits(weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int]) -> bool:
    """Whether a scale is one number, one per row, column or expert, or one per block of the last two axes."""
    return spread(weight, scale) is not None or scale == blocks_of(weight, block)


def spread(weight: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns the shape in which a scale multiplies the whole weight, or ``None`` if it has to be repeated first."""
    if all(size == 1 for size in scale):
        return (1,) * len(weight)
    if len(weight) == 2 and scale == weight[:1]:
        return (*scale, 1)
    if len(scale) != len(weight):
        return None
    return scale if all(size in (1, full) for size, full in zip(scale, weight, strict=True)) else None


def blocks_of(weight: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Returns how many blocks the last two axes have; the last block of an axis may be smaller."""
    return (*weight[:-2], -(-weight[-2] // block[0]), -(-weight[-1] // block[1]))


def places(weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int]) -> np.ndarray:
    """Returns the place of each number's scale, of scales that :func:`fits` accepts; broadcasts to the weight."""
    numbers = np.arange(math.prod(scale), dtype=np.int32)
    if (whole := spread(weight, scale)) is not None:
        return numbers.reshape(whole)
    rows = np.repeat(numbers.reshape(scale), block[0], -2)[..., : weight[-2], :]
    return np.repeat(rows, block[1], -1)[..., : weight[-1]]


def by_blocks(numbers: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Multiplies ``numbers``, float32, in place, by scales that :func:`fits` accepts; returns them."""
    whole = spread(numbers.shape, scale.shape)
    if whole is not None:
        numbers *= scale.reshape(whole)
        return numbers
    for row in range(scale.shape[-2]):
        rows = slice(row * block[0], (row + 1) * block[0])
        numbers[..., rows, :] *= np.repeat(scale[..., row : row + 1, :], block[1], -1)[..., : numbers.shape[-1]]
    return numbers


def by_groups(
    numbers: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, group: np.ndarray | None = None
) -> np.ndarray:
    """Returns ``(numbers - zero) * scale``.

    Args:
        numbers: float32 ``[out, in]``, changed in place.
        scale: float32 ``[out, groups]``; or one number, or one per row.
        zero: as ``scale``, or ``None``.
        group: the group of each input; ``None``: groups are equal runs of inputs.
    """
    rows = numbers.shape[0]
    groups = scale.size // rows if scale.size > 1 else 1
    scale = scale.reshape(-1, groups, 1)
    zero = None if zero is None else zero.reshape(-1, groups, 1)
    if group is None:
        parts = numbers.reshape(rows, groups, -1)
    else:
        parts, scale = numbers[..., None], scale[:, group]
        zero = None if zero is None else zero[:, group]
    if zero is not None:
        parts -= zero
    parts *= scale
    return numbers


def group_of_inputs(packed: Packed, end: str, groups: int) -> np.ndarray:
    """Returns the tensor that says which group each input belongs to.

    Raises:
        CheckpointError: it names a group that does not exist.
    """
    index = packed[end].astype(np.int64)
    if index.min() < 0 or index.max() >= groups:
        raise packed.error(
            f"its {end.lstrip('.')} puts an input into group {int(index.max() if index.min() >= 0 else index.min())}, "
            f"but there are scales for groups 0 to {groups - 1}"
        )
    return index
