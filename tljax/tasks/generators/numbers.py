"""Numbers: years that must come later (Hanna et al. 2023), and sums of two-digit numbers."""

from collections.abc import Sequence
from typing import Any, Literal, Unpack

from tljax.tasks.drawing import Draw
from tljax.tasks.making import TaskOptions, Template, begin, generator, one_of
from tljax.tasks.task import Task
from tljax.tasks.texts import Pair, Reader, Text, fill
from tljax.tasks.words.things import DESK_OBJECTS, EVENTS, OBJECTS

YEARS = (
    "The {event} lasted from the year {XX}{YY} to the year {XX2}",
    "The {event} began in the year {XX}{YY} and ended in the year {XX2}",
    "The {event} started in the year {XX}{YY} and was over by the year {XX2}",
    "From the year {XX}{YY} the {event} went on until the year {XX2}",
)
PRICES = (
    "The price of that {item} was between $ {XX}{YY} and $ {XX2}",
    "The {item} sold for $ {XX}{YY} at first and last year for $ {XX2}",
)
SEQUENCES = (
    "{N1}, {N2}, {N3}, {XX}{YY}, {XX2}",
    "The numbers are {N1}, {N2}, {N3}, {XX}{YY}, {XX2}",
)
SUMS = {
    "+": ("Q: How much is {a} plus {b}?", "Q: What do you get if you add {b} to {a}?"),
    "-": ("Q: How much is {a} minus {b}?", "Q: What do you get if you take {b} from {a}?"),
}
_ENDS = (("\nA:", " "), ("\nA: ", ""))
"""How a prompt ends, and what its answer starts with: tokenizers differ in whether a space belongs to a number."""

Numbers = tuple[int, int]


@generator
def greater_than(
    model: Any,
    n: int,
    *,
    corruption: Literal["01"] = "01",
    variant: Literal["year", "price", "sequence"] = "year",
    **options: Unpack[TaskOptions],
) -> Task:
    """Makes prompts whose answer is a later year: "The war lasted from the year 1732 to the year 17".

    The right answers are all two-digit tokens above ``YY``, the wrong ones all others, 00 to 99: sets of different
    sizes, so measure with ``ProbDiff(**task.sets)``. Centuries 11 to 17; years that split into two tokens of two
    digits, without the first and the last of each century. Labelled parts: ``event``, ``XX``, ``YY``, ``XX2`` (the
    century again), ``end``.

    Args:
        model: the model whose tokenizer the words must suit: events and items are single tokens.
        n: number of prompts, all different.
        corruption: ``"01"``: the year's last two digits become 01, after which every later year is right.
        variant: where a larger number is asked for: the ``"year"`` in which an event ended; the upper ``"price"`` of an
            item (``item`` is labelled in place of ``event``); the next number of an increasing ``"sequence"``, whose
            first three, ``N1`` to ``N3``, are of the century before (so ``XX`` is 12 to 17).
        **options: ``seed``, ``prepend_bos`` and ``padding_side``, as of every generator.

    Raises:
        InputError: there are fewer than ``n`` such prompts; the message says how many.
        TokenizerError: the model has no tokenizer.
    """
    making = begin(model, "greater_than", **options)
    reader = making.reader
    if variant == "sequence":
        years = _years(reader, "1000,")
        return making.task([_sequence_template(sentence, years) for sentence in SEQUENCES], n, corruption)
    label, sentences, words, before = {
        "year": ("event", YEARS, EVENTS, "the year"), "price": ("item", PRICES, (*OBJECTS, *DESK_OBJECTS), "for $"),
    }[variant]  # fmt: skip
    nouns, years = reader.single(dict.fromkeys(words)), _years(reader, before)
    made = [_year_template(sentence, label, nouns, years) for sentence in sentences]
    return making.task(made, n, corruption)


def _years(reader: Reader, before: str) -> list[tuple[str, str]]:
    """Returns centuries and years, such as ``("17", "32")``, that split into two tokens after these words."""
    digits = [f"{number:02d}" for number in range(100)]
    alone = reader.plain(digits)
    if any(len(ids) != 1 for ids in alone):
        return []
    found = []
    for century in range(11, 18):
        start = reader.plain([f"{before} {century}"])[0]
        single = reader.lengths([str(century)], before=before) == [1]
        rows = reader.plain(f"{before} {century}{year}" for year in digits)
        valid = [year for year, row, ids in zip(digits, rows, alone, strict=True) if row == [*start, *ids]]
        if single and "01" in valid:
            found += [(str(century), year) for year in valid[1:-1] if year != "01"]
    return found


def _year_template(sentence: str, label: str, nouns: Sequence[str], years: Sequence[tuple[str, str]]) -> Template:
    def make(index: int, draw: Draw) -> Pair:
        noun, index = one_of(nouns, index)
        year, _ = one_of(years, index)
        return _later(sentence, {label: noun}, year)

    return Template(len(nouns) * len(years), make)


def _sequence_template(sentence: str, years: Sequence[tuple[str, str]]) -> Template:
    """Prompts with three numbers of the century before: every first one of them, and two drawn from those after it."""
    valid: dict[int, list[str]] = {}
    for century, two in years:
        valid.setdefault(int(century), []).append(two)
    every = [(first, year) for year in years for first in valid.get(int(year[0]) - 1, [])[:-2]]

    def make(index: int, draw: Draw) -> Pair:
        first, year = every[index]
        before = int(year[0]) - 1
        rest = [two for two in valid[before] if two > first]
        numbers = (first, *sorted(draw.some(rest, 2)))
        return _later(sentence, {f"N{place}": f"{before}{two}" for place, two in enumerate(numbers, 1)}, year)

    return Template(len(every), make)


def _later(sentence: str, words: dict[str, str], year: tuple[str, str]) -> Pair:
    """Fills a sentence: what is later than its year is right, and after its year 01 everything is."""
    words = words | {"XX": year[0], "YY": year[1], "XX2": year[0]}
    later = tuple(f"{number:02d}" for number in range(int(year[1]) + 1, 100))
    others = tuple(f"{number:02d}" for number in range(int(year[1]) + 1))
    return Pair(fill(sentence, words), fill(sentence, words | {"YY": "01"}), later, others)


@generator
def arithmetic(
    model: Any,
    n: int,
    *,
    corruption: Literal["random", "ones", "tens"] = "random",
    operator: Literal["+", "-"] = "+",
    **options: Unpack[TaskOptions],
) -> Task:
    """Makes sums and differences of two numbers of two digits: "Q: How much is 34 plus 21?" and "A:".

    The right answer is the result as one token, the wrong one that of the corrupted prompt. Where the tokenizer has
    results without a space only, prompts end in that space. Labelled parts: ``a``, ``b``, ``end``.

    Args:
        model: the model whose tokenizer decides which results are single tokens.
        n: number of prompts, all different.
        corruption: ``"random"``: other numbers with another result. ``"ones"``: another last digit of ``a``.
            ``"tens"``: another first digit of ``a``.
        operator: ``"+"``, or ``"-"`` with results of 0 or more.
        **options: ``seed``, ``prepend_bos`` and ``padding_side``, as of every generator.

    Raises:
        InputError: there are fewer than ``n`` such prompts; the message says how many.
        TokenizerError: the model has no tokenizer.
    """
    making = begin(model, "arithmetic", **options)
    known, end, space = _results(making.reader)
    lengths = making.reader.lengths([str(number) for number in range(100)])
    sums = {
        (a, b): result
        for a in range(10, 100)
        for b in range(10, 100)
        if (result := a + b if operator == "+" else a - b) in known and None not in (lengths[a], lengths[b])
    }
    others = _Others(sums, lengths, corruption)
    pairs = [pair for pair in sums if others.exist(pair)]

    def template(sentence: str) -> Template:
        def make(index: int, draw: Draw) -> Pair:
            pair = pairs[index]
            other = others.draw(pair, draw)
            clean, corrupted = (_filled(sentence + end, numbers) for numbers in (pair, other))
            return Pair(clean, corrupted, (f"{space}{sums[pair]}",), (f"{space}{sums[other]}",))

        return Template(len(pairs), make)

    return making.task([template(sentence) for sentence in SUMS[operator]], n, corruption)


class _Others:
    """The numbers that may take the place of two numbers: equally many tokens, another result, as the corruption says.

    Args:
        sums: the result of each two numbers that may be asked for.
        lengths: the number of tokens of each number.
        corruption: as of :func:`arithmetic`.
    """

    def __init__(self, sums: dict[Numbers, int], lengths: Sequence[int | None], corruption: str) -> None:
        self.sums, self.lengths, self.corruption = sums, lengths, corruption
        self.alike: dict[tuple[int | None, ...], list[Numbers]] = {}
        for pair in sums:
            self.alike.setdefault(self._size(pair), []).append(pair)
        self.results = {size: {sums[pair] for pair in pairs} for size, pairs in self.alike.items()}

    def _size(self, pair: Numbers) -> tuple[int | None, ...]:
        return tuple(self.lengths[number] for number in pair)

    def _fits(self, pair: Numbers, other: Numbers) -> bool:
        return other in self.sums and self.sums[other] != self.sums[pair] and self._size(other) == self._size(pair)

    def _near(self, pair: Numbers) -> list[Numbers]:
        tens, ones = divmod(pair[0], 10)
        changed = [10 * tens + digit for digit in range(10)]
        if self.corruption == "tens":
            changed = [10 * digit + ones for digit in range(1, 10)]
        return [other for other in ((number, pair[1]) for number in changed) if self._fits(pair, other)]

    def exist(self, pair: Numbers) -> bool:
        return len(self.results[self._size(pair)]) > 1 if self.corruption == "random" else bool(self._near(pair))

    def draw(self, pair: Numbers, draw: Draw) -> Numbers:
        if self.corruption != "random":
            return draw.one(self._near(pair))
        while True:
            if self._fits(pair, other := draw.one(self.alike[self._size(pair)])):
                return other


def _filled(sentence: str, numbers: Numbers) -> Text:
    return fill(sentence, {"a": str(numbers[0]), "b": str(numbers[1])})


def _results(reader: Reader) -> tuple[set[int], str, str]:
    """Returns the results that are single tokens, how prompts end, and what the answer starts with."""
    found = []
    for end, space in _ENDS:
        ids = reader.answers(f"it?{end}", [f"{space}{number}" for number in range(199)])
        found.append(({number for number, one in enumerate(ids) if one is not None}, end, space))
    return max(found, key=lambda one: len(one[0]))
