"""What every generator does: read the tokenizer, draw without repeats, know the largest number there is."""

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict, TypeVar

from tljax.checks import typed, whole
from tljax.errors import InputError
from tljax.tasks.building import Row, assemble, checked
from tljax.tasks.drawing import Draw
from tljax.tasks.task import Task
from tljax.tasks.texts import Pair, Reader
from tljax.text.tokenizer import check_padding_side, need_tokenizer
from tljax.typing import PaddingSide

_T = TypeVar("_T")

_MOST_UNFIT = 20
_FEW = 50
"""A task is given up when more than 20 times ``n + 50`` prompts did not suit the tokenizer."""


class TaskOptions(TypedDict, total=False):
    """Options of every generator.

    Attributes:
        seed: the prompts are a function of the arguments and this number.
        prepend_bos: whether prompts start with BOS; ``None`` means ``cfg.default_prepend_bos``.
        padding_side: where shorter prompts are filled; ``None`` means the tokenizer's side.
    """

    seed: int
    prepend_bos: bool | None
    padding_side: PaddingSide | None


@dataclasses.dataclass(frozen=True)
class Template:
    """One template with all that can be filled in.

    Attributes:
        size: how many different clean prompts it makes.
        make: makes number ``0 ... size - 1`` of them, with a corruption drawn at random.
    """

    size: int
    make: Callable[[int, Draw], Pair]


@dataclasses.dataclass(frozen=True)
class Making:
    """A task that is being made.

    Attributes:
        model: the model.
        name: the generator's name.
        reader: reads the model's tokenizer.
        draw: all random choices.
        padding_side: where shorter prompts are filled.
    """

    model: Any
    name: str
    reader: Reader
    draw: Draw
    padding_side: PaddingSide | None

    def task(self, templates: Sequence[Template], n: int, corruption: str) -> Task:
        """Draws ``n`` different prompts, as evenly over the templates as these allow.

        Raises:
            InputError: there are fewer than ``n``; the message has the number there is.
        """
        whole(n, "n", at_least=1)
        total = sum(template.size for template in templates)
        if n > total:
            raise InputError(too_many(self.name, n, total))
        pairs = _drawn(templates, self.draw)
        rows: list[Row] = []
        unfit: Counter[str] = Counter()
        while len(rows) < n:
            wanted = list(itertools.islice(pairs, n - len(rows)))
            tried = len(rows) + unfit.total()
            if not wanted or unfit.total() > _MOST_UNFIT * (n + _FEW):
                reasons = ", ".join(f"{count} are left out ({why})" for why, count in unfit.items())
                raise InputError(f"{too_many(self.name, n, len(rows))} Of {tried} that were drawn, {reasons}.")
            made = checked(self.reader, wanted)
            rows += [one for one in made if isinstance(one, Row)]
            unfit.update(one for one in made if isinstance(one, str))
        return assemble(self.model, rows, name=self.name, corruption=corruption, padding_side=self.padding_side)


def begin(
    model: Any,
    name: str,
    *,
    seed: int = 0,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
) -> Making:
    """Reads the options that all generators share.

    Raises:
        TokenizerError: the model has no tokenizer.
    """
    check_padding_side(padding_side)
    tokenizer = need_tokenizer(model._tokenizer, f"tasks.{name}")
    reader = Reader(tokenizer, model.cfg.default_prepend_bos if prepend_bos is None else prepend_bos)
    return Making(model, name, reader, Draw(seed), padding_side)


generator = functools.partial(typed, receiver=begin)
"""Decorates a generator: its arguments are checked, and its signature shows the shared options' defaults."""


def too_many(name: str, n: int, most: int) -> str:
    """Returns the message about more prompts than there are."""
    if most:
        return (
            f"n={n} is more than there are: with this model's tokenizer, tasks.{name} makes at most {most} different "
            f"prompts of this kind. Ask for n={most} or fewer."
        )
    return (
        f"tasks.{name} can make no prompt with this model's tokenizer: the vocabulary lacks the words that it needs as "
        "single tokens, or those of its templates."
    )


def _drawn(templates: Sequence[Template], draw: Draw) -> Iterator[Pair]:
    """Yields pairs from all templates in turn; each round takes the templates in another order."""
    orders = [draw.order(template.size) for template in templates]
    left = list(range(len(templates)))
    while left:
        for number in [left[place] for place in draw.order(len(left))]:
            index = next(orders[number], None)
            if index is None:
                left.remove(number)
            else:
                yield dataclasses.replace(templates[number].make(index, draw), template=number)


def arrangements(options: Sequence[Any], count: int) -> int:
    """Returns in how many ways ``count`` different options can be put in order; 0 if there are fewer."""
    return math.perm(len(options), count) if len(options) >= count else 0


def arrangement(options: Sequence[_T], count: int, index: int) -> tuple[list[_T], int]:
    """Returns ``count`` different options, the arrangement of number ``index % arrangements``, and what is left of it.

    >>> [arrangement("abc", 2, index)[0] for index in range(4)]
    [['a', 'b'], ['b', 'a'], ['c', 'a'], ['a', 'c']]
    """
    left, found = list(options), []
    for _ in range(count):
        index, place = divmod(index, len(left))
        found.append(left.pop(place))
    return found, index


def one_of(options: Sequence[_T], index: int) -> tuple[_T, int]:
    """Returns option number ``index % len(options)``, and what is left of the index."""
    index, place = divmod(index, len(options))
    return options[place], index
