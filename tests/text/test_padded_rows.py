"""Rows to arrays and back, on either side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax.errors import InputError
from tljax.text.padding import move_left, pad_axis, pad_rows


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("right", [[5, 6, 9, 9], [7, 9, 9, 9]], [[1, 1, 0, 0], [1, 0, 0, 0]]),
        ("left", [[9, 9, 5, 6], [9, 9, 9, 7]], [[0, 0, 1, 1], [0, 0, 0, 1]]),
    ],
)
def test_rows_stand_on_their_side(side: str, ids: list[list[int]], mask: list[list[int]]) -> None:
    padded, text = pad_rows([[5, 6], np.array([7])], side, 9, width=4)  # type: ignore[arg-type]
    assert padded.dtype == np.int32
    assert padded.tolist() == ids
    assert text.tolist() == mask
    moved, there = move_left(padded, text)
    assert there.tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]
    assert moved.tolist() == [[9, 9, 5, 6], [9, 9, 9, 7]]


def test_ids_that_int32_cannot_hold_are_refused() -> None:
    with pytest.raises(InputError, match=f"Token id {2**32 + 5} is outside any vocabulary"):
        pad_rows([[1], [2**32 + 5]])


def test_an_axis_grows_at_its_end() -> None:
    array = np.ones((2, 3), bool)
    assert pad_axis(array, 3) is array
    grown = pad_axis(array, 4, axis=-1, fill=True)
    assert isinstance(grown, np.ndarray)
    assert grown.all()
    assert grown.shape == (2, 4)
    on_device = pad_axis(jnp.ones((2, 3, 4)), 5, axis=0)
    assert isinstance(on_device, jax.Array)
    assert on_device.shape == (5, 3, 4)
    assert float(on_device.sum()) == 24
