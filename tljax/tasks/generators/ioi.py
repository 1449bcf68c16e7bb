"""Indirect objects: "When Mary and John came to the store, John gave a drink to" (Wang et al. 2022)."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Unpack

from tljax.errors import InputError
from tljax.tasks.drawing import Draw
from tljax.tasks.making import TaskOptions, Template, arrangement, arrangements, begin, generator, one_of
from tljax.tasks.task import Task
from tljax.tasks.texts import Pair, Reader, fields, fill
from tljax.tasks.words.people import NAMES
from tljax.tasks.words.things import OBJECTS, PLACES

PLAIN = (
    "When {first} and {second} went to the {place}, {S2} gave a {object} to",
    "After {first} and {second} met at the {place}, {S2} handed a {object} to",
    "While {first} and {second} were working at the {place}, {S2} passed a {object} to",
    "When {first} and {second} were at the {place}, {S2} offered a {object} to",
    "Yesterday {first} met {second} at the {place}, and {S2} gave a {object} to",
    "In the morning {first} and {second} walked to the {place}, where {S2} handed a {object} to",
    "It was late when {first} and {second} came to the {place}, and {S2} gave a {object} to",
    "At the {place}, {first} met {second}. In the evening, {S2} gave a {object} to",
    "The friends {first} and {second} found a {object} at the {place}, and {S2} gave it to",
    "Once {first} and {second} had found the {place}, {S2} passed a {object} to",
    "Because {first} and {second} both liked the {place}, {S2} brought a {object} to",
    "Last summer {first} and {second} visited the {place}, and {S2} bought a {object} for",
    "As soon as {first} and {second} left the {place}, {S2} showed a {object} to",
    "Since {first} and {second} work at the same {place}, {S2} lent a {object} to",
    "Before {first} and {second} went home from the {place}, {S2} threw a {object} to",
)
LONG = (
    "It was late in the evening when {first} and {second} came to the {place}, and there {S2} gave a {object} to",
    "In the morning, when it was quiet, {first} and {second} walked to the {place}, where {S2} handed a {object} to",
    "One morning, when it was still dark, {first} and {second} went to the {place}, and {S2} passed a {object} to",
    "After all the guests had left, {first} and {second} sat in the {place}, and then {S2} offered a {object} to",
    "The day was so hot that {first} and {second} stayed in the {place} until {S2} gave a {object} to",
    "Although it was a Sunday, {first} and {second} had to work at the {place}, and {S2} brought a {object} to",
    "While music played in the street, {first} and {second} talked near the {place}, until {S2} gave a {object} to",
    "Not long before dinner, {first} and {second} met by chance at the {place}, and {S2} handed a {object} to",
    "For the first time in years, {first} and {second} saw the old {place}, and {S2} showed a {object} to",
    "With nothing else to do that day, {first} and {second} cleaned the {place}, and {S2} threw a {object} to",
    "As the train was late again, {first} and {second} waited in the {place}, and {S2} bought a {object} for",
    "On the way back from the lake, {first} and {second} stopped at the {place}, and {S2} passed a {object} to",
    "Just as the lights went out, {first} and {second} reached the {place}, and in the dark {S2} gave a {object} to",
    "Long after the party was over, {first} and {second} were still in the {place}, and {S2} sent a {object} to",
    "Since the two were old friends, {first} and {second} often met at the {place}, and {S2} lent a {object} to",
)
LATE = (
    "Near the {place}, {first} met {second}. Later that day {S2} gave a {object} to",
    "Then, {first} and {second} went to the {place}. {S2} gave a {object} to",
    "The {place} was full when {first} and {second} came. {S2} handed a {object} to",
    "In the evening {first} and {second} sat in the {place}. {S2} passed a {object} to",
    "It rained, so {first} and {second} stayed in the {place}. {S2} offered a {object} to",
    "Today {first} and {second} had a long talk at the {place}. {S2} brought a {object} to",
    "Some time ago {first} and {second} opened a {place}. {S2} bought a {object} for",
    "The old friends {first} and {second} met near the {place}. {S2} showed a {object} to",
)
EARLY = (
    "Then {first} and {second} went to the {place}, and {S2} gave a {object} to",
    "So {first} and {second} sat in the {place}, and {S2} handed a {object} to",
    "Today {first} and {second} met at the {place}, and {S2} passed a {object} to",
    "Once {first} and {second} found a {place}, and {S2} offered a {object} to",
    "Later {first} and {second} left the {place}, and {S2} brought a {object} to",
    "There {first} and {second} saw the {place}, and {S2} gave a {object} to",
    "Yesterday {first} and {second} came to the {place}, and {S2} showed a {object} to",
    "Often {first} and {second} worked in the {place}, and {S2} threw a {object} to",
)
VARIANTS = {"plain": PLAIN, "long": LONG, "late": LATE, "early": EARLY}

Corruption = Literal["abc", "s2_random", "s2_io_flip", "swap"]
Names = dict[str, str]
"""The names at IO, S1 and S2."""

_MOST_TOKENS = 3
"""A template with a word of more tokens is left out: the vocabulary does not know that word."""


def _abc(given: Names, names: Sequence[str], draw: Draw) -> Names:
    fresh: list[str] = []
    for _ in range(3):
        fresh.append(draw.other(names, *given.values(), *fresh))
    return dict(zip(("IO", "S1", "S2"), fresh, strict=True))


CORRUPTIONS: dict[str, Callable[[Names, Sequence[str], Draw], Names]] = {
    "abc": _abc,
    "s2_random": lambda given, names, draw: given | {"S2": draw.other(names, *given.values())},
    "s2_io_flip": lambda given, names, draw: given | {"S2": given["IO"]},
    "swap": lambda given, names, draw: {"IO": given["S1"], "S1": given["IO"], "S2": given["IO"]},
}


@generator
def ioi(
    model: Any,
    n: int,
    *,
    corruption: Corruption = "abc",
    variant: Literal["plain", "long", "late", "early"] = "plain",
    order: Literal["both", "abba", "baba"] = "both",
    names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    **options: Unpack[TaskOptions],
) -> Task:
    """Makes prompts whose answer is the indirect object (IO): the one of two people who did not act.

    Each template comes in two orders, the indirect object first (ABBA) or the subject first (BABA), and each order
    counts as a template of its own. Labelled parts: ``IO``, ``S1`` and ``S2`` (the subject's two mentions), ``place``,
    ``object``, ``end``. The right answer is the indirect object, the wrong one the subject.

    Args:
        model: the model whose tokenizer the words must suit: names, places and objects are single tokens.
        n: number of prompts, all different.
        corruption: ``"abc"``: three fresh names, so that nothing is repeated. ``"s2_random"``: a fresh name acts.
            ``"s2_io_flip"``: the indirect object acts, which makes the subject right. ``"swap"``: the two people change
            roles and places everywhere.
        variant: ``"plain"`` and ``"long"`` have 15 templates in each order, ``"late"`` (the deed in a sentence of its
            own) and ``"early"`` (short ones) have 8.
        order: which of the two orders.
        names: first names to use instead of the built-in ones.
        templates: templates to use instead of the variant's: texts with ``{first}``, ``{second}``, ``{S2}``,
            and ``{place}`` and ``{object}`` if wanted.
        **options: ``seed``, ``prepend_bos`` and ``padding_side``, as of every generator.

    Raises:
        InputError: there are fewer than ``n`` such prompts (the message says how many), or a template lacks a field.
        TokenizerError: the model has no tokenizer.
    """
    making = begin(model, "ioi", **options)
    reader = making.reader
    people = reader.single(dict.fromkeys(NAMES if names is None else names))
    needed = {"abc": 5, "s2_random": 3}.get(corruption, 2)
    people = people if len(people) >= needed else []
    things = {"place": reader.single(PLACES), "object": reader.single(OBJECTS)}
    sentences = _spelled(reader, VARIANTS[variant] if templates is None else _own(templates))
    made = [
        _template(_ordered(sentence, one), people, things, CORRUPTIONS[corruption])
        for sentence in sentences
        for one in (("abba", "baba") if order == "both" else (order,))
    ]
    return making.task(made, n, corruption)


def _ordered(sentence: str, order: str) -> str:
    first, second = ("IO", "S1") if order == "abba" else ("S1", "IO")
    return sentence.replace("{first}", f"{{{first}}}").replace("{second}", f"{{{second}}}")


def _own(templates: Sequence[str]) -> Sequence[str]:
    """Returns a user's templates after checking their fields."""
    needed, allowed = {"first", "second", "S2"}, {"first", "second", "S2", "place", "object"}
    for number, template in enumerate([templates] if isinstance(templates, str) else templates):
        found = fields(template)
        if not needed <= set(found) <= allowed or len(set(found)) < len(found):
            raise InputError(
                f"templates[{number}]={template!r} has the fields {', '.join(found) or '(none)'}; it needs "
                "{first}, {second} and {S2}, once each, and may have {place} and {object}."
            )
    return [templates] if isinstance(templates, str) else list(templates)


def _spelled(reader: Reader, sentences: Sequence[str]) -> list[str]:
    """Returns the templates whose own words are a few tokens each."""
    words = [[word.strip(",.") for word in sentence.split() if "{" not in word] for sentence in sentences]
    flat = list(dict.fromkeys(word for own in words for word in own))
    known = {
        word
        for word, length in zip(flat, reader.lengths(flat), strict=True)
        if length is not None and length <= _MOST_TOKENS
    }
    return [sentence for sentence, own in zip(sentences, words, strict=True) if known.issuperset(own)]


def _template(
    sentence: str,
    people: Sequence[str],
    things: dict[str, list[str]],
    corrupt: Callable[[Names, Sequence[str], Draw], Names],
) -> Template:
    used = {name: words for name, words in things.items() if f"{{{name}}}" in sentence}
    size = arrangements(people, 2) * math.prod(map(len, used.values()))

    def make(index: int, draw: Draw) -> Pair:
        words: dict[str, str] = {}
        for name, options in used.items():
            words[name], index = one_of(options, index)
        (subject, receiver), _ = arrangement(people, 2, index)
        given = {"IO": receiver, "S1": subject, "S2": subject}
        corrupted = corrupt(given, people, draw)
        return Pair(
            fill(sentence, words | given), fill(sentence, words | corrupted), (f" {receiver}",), (f" {subject}",)
        )

    return Template(size, make)
