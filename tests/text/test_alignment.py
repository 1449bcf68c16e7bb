"""Which token of one prompt belongs to which of another."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tljax import Batch
from tljax.errors import InputError
from tljax.text import align

ROWS = st.lists(st.integers(1, 4), min_size=1, max_size=9)


def longest_common(one: list[int], other: list[int]) -> int:
    table = np.zeros((len(one) + 1, len(other) + 1), int)
    for i, first in enumerate(one):
        for j, second in enumerate(other):
            table[i + 1, j + 1] = table[i, j] + 1 if first == second else max(table[i, j + 1], table[i + 1, j])
    return int(table[-1, -1])


@given(ROWS, ROWS)
def test_a_longest_common_subsequence(one: list[int], other: list[int]) -> None:
    (aligned,) = align([one], [other], method="tokens")
    matched = [(place, int(to)) for place, to in enumerate(aligned) if to >= 0]
    assert all(a < b for a, b in zip([to for _, to in matched], [to for _, to in matched][1:], strict=False))
    equal = [1 for place, to in matched if one[place] == other[to]]
    assert len(equal) >= longest_common(one, other)


@given(ROWS, ROWS, st.sampled_from(["left", "right"]), st.sampled_from(["left", "right"]))
def test_padding_moves_positions(one: list[int], other: list[int], side: str, other_side: str) -> None:
    bare = align([one], [other])[0]
    base = Batch.from_rows([one, [1] * 10], side)
    source = Batch.from_rows([other, [1] * 10], other_side)
    aligned = align(base, source)
    assert aligned.shape == base.shape
    start, other_start = (10 - len(row) if way == "left" else 0 for row, way in ((one, side), (other, other_side)))
    expected = np.full(10, -1)
    expected[start : start + len(one)] = np.where(bare >= 0, bare + other_start, -1)
    assert aligned[0].tolist() == expected.tolist()
    assert aligned[1].tolist() == list(range(10))


def test_equal_lengths_are_matched_by_position() -> None:
    assert align([[1, 2, 3]], [[3, 1, 2]]).tolist() == [[0, 1, 2]]
    assert align([[1, 2, 3]], [[3, 1, 2]], method="tokens").tolist() == [[1, 2, -1]]


def test_replaced_and_inserted_tokens() -> None:
    assert align([[1, 2, 3, 4]], [[1, 9, 3, 8, 4]]).tolist() == [[0, 1, 2, 4]]
    assert align([[1, 2, 3, 4]], [[1, 7, 8, 9, 4]]).tolist() == [[0, -1, -1, 4]]


def test_labelled_parts_are_matched_from_their_ends() -> None:
    base, source = [[1, 5, 6, 7, 2, 3]], [[1, 8, 2, 3]]
    spans, others = {"name": [[1, 4]], "end": [5], "gone": [[-1, -1]]}, {"name": [[1, 2]], "end": [3], "gone": [[0, 1]]}
    assert align(base, source, spans=spans, source_spans=others).tolist() == [[0, -1, -1, 1, 2, 3]]
    assert align(source, base, spans=others, source_spans=spans).tolist() == [[0, 3, 4, 5]]


def test_parts_that_contradict() -> None:
    spans, crossed = {"a": [[0, 1]], "b": [[2, 3]]}, {"a": [[2, 3]], "b": [[0, 1]]}
    with pytest.raises(InputError, match="'a' and 'b' overlap, or stand in another order"):
        align([[1, 2, 3]], [[1, 2, 3, 4]], spans=spans, source_spans=crossed)
    inner = {"a": [[0, 3]], "b": [[1, 2]]}
    assert align([[1, 2, 3]], [[1, 2, 3, 4]], spans=inner, source_spans=inner).tolist() == [[0, 1, 2]]
