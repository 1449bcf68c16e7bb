"""The lengths that programs are compiled for, and how much memory a thing may take."""

from itertools import pairwise

import pytest

from tljax import memory, sizes


@pytest.mark.parametrize(
    ("standard", "first"),
    [
        (lambda n: sizes.prompt_length(n, 4096), [8, 16, 32, 48, 64, 96, 128]),
        (lambda n: sizes.prompt_length(n, 4096, whole_steps_to=8), [8, 12, 16, 24, 32, 48, 64]),
        (sizes.packed_size, [8, 16, 24, 32, 48, 64, 96]),
        (lambda n: sizes.text_capacity(n, 4096), [128, 256, 512, 1024]),
        (sizes.power_of_two, [1, 2, 4, 8, 16, 32, 64]),
    ],
    ids=["prompts", "prompts of generation", "packed", "texts", "powers"],
)
def test_few_sizes_that_hold_what_they_are_for(standard, first) -> None:  # type: ignore[no-untyped-def]
    chosen = [standard(number) for number in range(1, 2000)]
    assert all(size >= number for number, size in enumerate(chosen, 1))
    assert chosen == sorted(chosen)
    taken = sorted(set(chosen))
    assert taken[: len(first)] == first
    assert all(later <= 2 * earlier for earlier, later in pairwise(taken))


def test_sizes_end_at_the_context() -> None:
    assert sizes.prompt_length(70, 80) == 80
    assert sizes.text_capacity(200, 240) == 240
    assert sizes.text_capacity(20, 64) == 64


def test_neighbours_among_packed_sizes() -> None:
    ladder = sorted({sizes.packed_size(number) for number in range(1, 3000)})
    for below, above in pairwise(ladder):
        assert sizes.next_packed_size(below, ladder[-1] * 2) == above
        assert sizes.next_packed_size(above, 1) == below


def test_shares_of_memory() -> None:
    assert [sizes.power_of_two_within(number) for number in (1, 2, 3, 4, 63, 64)] == [1, 2, 2, 4, 32, 64]
    assert memory.how_many(2**20) == 256
    assert memory.how_many(2**40) == 1
    assert memory.is_large(26, 100)
    assert not memory.is_large(25, 100)
