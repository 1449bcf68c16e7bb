"""Random draws that are the same in every version of Python: only ``random.Random(seed).random()`` promises that."""

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tljax.checks import whole

_T = TypeVar("_T")


class Draw:
    """A stream of random choices.

    Args:
        seed: where it starts; a whole number of at least 0.

    >>> draw = Draw(0)
    >>> draw.below(10), draw.one("abc"), draw.some("abcdef", 3)
    (8, 'c', ['c', 'b', 'd'])
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(whole(seed, "seed", at_least=0)).random

    def below(self, size: int) -> int:
        """Returns a whole number from 0 to ``size - 1``; ``size`` is below ``2**52``."""
        return int(self._random() * size)

    def one(self, options: Sequence[_T]) -> _T:
        """Returns one of the options."""
        return options[self.below(len(options))]

    def order(self, size: int) -> Iterator[int]:
        """Yields the numbers below ``size`` in random order, each once, with memory for those drawn only."""
        moved: dict[int, int] = {}
        for place in range(size):
            taken = place + self.below(size - place)
            yield moved.get(taken, taken)
            moved[taken] = moved.get(place, place)

    def some(self, options: Sequence[_T], count: int) -> list[_T]:
        """Returns ``count`` of the options, each at most once."""
        return [options[place] for place, _ in zip(self.order(len(options)), range(count), strict=False)]

    def other(self, options: Sequence[_T], *without: _T) -> _T:
        """Returns one of the options that is none of ``without``."""
        return self.one([option for option in options if option not in without])
