"""Padding: rows of different lengths as one array, and which of its entries are text.

:mod:`tljax.text.positions` counts positions in such an array.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from tljax.checks import fits_int32, is_traced
from tljax.errors import InputError
from tljax.typing import PaddingSide


def pad_rows(
    rows: Sequence[Any], side: PaddingSide = "right", fill: int = 0, width: int | None = None
) -> tuple[Int[np.ndarray, "row width"], Bool[np.ndarray, "row width"]]:
    """Pads rows of ids to one array.

    Args:
        rows: ids ``[n]``, at least one row.
        side: where shorter rows are filled.
        fill: the id to fill with.
        width: padded length, at least that of the longest row, which is the default.

    Returns:
        The ids, int32, and a mask that is ``True`` at the rows' own.

    Raises:
        InputError: an id does not fit int32.

    >>> pad_rows([[5, 6], [7]], "left")[0]
    array([[5, 6],
           [0, 7]], dtype=int32)
    """
    lengths = np.asarray([len(row) for row in rows])[:, None]
    width = int(lengths.max()) if width is None else width
    place = np.arange(width)
    mask = place >= width - lengths if side == "left" else place < lengths
    ids = np.full(mask.shape, fill, np.int32)
    joined = np.concatenate([np.asarray(row) for row in rows])
    check_int32(joined)
    ids[mask] = joined
    return ids, mask


def pad_axis(array: Any, size: int, axis: int = 1, fill: Any = 0) -> Any:
    """Pads an array with ``fill`` at the end of an axis, up to ``size`` entries; a NumPy array stays NumPy."""
    after = size - array.shape[axis]
    if not after:
        return array
    xp = np if isinstance(array, np.ndarray) else jnp
    widths = [(0, after if number == axis % array.ndim else 0) for number in range(array.ndim)]
    return xp.pad(array, widths, constant_values=fill)


def move_left(
    ids: Int[np.ndarray, "row pos"], mask: Bool[np.ndarray, "row pos"]
) -> tuple[Int[np.ndarray, "row pos"], Bool[np.ndarray, "row pos"]]:
    """Returns rows and their text mask with all of each row's padding moved to the left."""
    order = np.argsort(mask, axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(mask, order, axis=1)


def check_int32(ids: Any) -> None:
    """Refuses ids that do not fit int32; traced ids are not checked.

    Raises:
        InputError: an id is not below ``2**31``.
    """
    if not is_traced(ids) and not fits_int32(known := np.asarray(ids)):
        wrong = known[(known >= 2**31) | (known < -(2**31))].flat[0]
        raise InputError(f"Token id {wrong} is outside any vocabulary: ids are below {2**31}.")
