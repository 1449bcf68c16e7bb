"""Questions about colours: of objects on a shelf, and with lettered choices."""

import string
from collections.abc import Sequence
from typing import Any, Literal, Unpack

from tljax.tasks.drawing import Draw
from tljax.tasks.making import TaskOptions, Template, arrangement, arrangements, begin, generator, one_of
from tljax.tasks.task import Task
from tljax.tasks.texts import Pair, fill
from tljax.tasks.words.things import COLORS, DESK_OBJECTS, TYPICAL_COLORS

SHELVES = (
    "Q: On the shelf I see a {c1} {o1}, a {c2} {o2}, and a {c3} {o3}. What color is the {asked}?\nA:",
    "Q: In the box there is a {c1} {o1}, a {c2} {o2}, and a {c3} {o3}. What color is the {asked}?\nA:",
    "Q: She bought a {c1} {o1}, a {c2} {o2}, and a {c3} {o3}. What color is the {asked}?\nA:",
)
CHOICES = (
    "The {object} is {color}. What color is the {asked}?\n{L1}. {A1}\n{L2}. {A2}\n{L3}. {A3}\n{L4}. {A4}\nAnswer:",
    "I saw that the {object} was {color}. What color was the {asked}?\n"
    "{L1}. {A1}\n{L2}. {A2}\n{L3}. {A3}\n{L4}. {A4}\nAnswer:",
)
_COLORS = tuple(color for color in COLORS if color[0] not in "aeiou")
"""Colours that "a" may stand before."""


@generator
def coloured_objects(
    model: Any,
    n: int,
    *,
    corruption: Literal["other_object", "other_colors"] = "other_object",
    **options: Unpack[TaskOptions],
) -> Task:
    """Makes questions about one of three objects, after an answered question of the same form with another answer.

    Labelled parts: ``c1`` to ``c3`` and ``o1`` to ``o3`` (colours and objects of the open question), ``asked``,
    ``end``, and ``example``, all that stands before the open question.

    Args:
        model: the model whose tokenizer the words must suit: colours and objects are single tokens.
        n: number of prompts, all different.
        corruption: ``"other_object"``: asks for another of the three, whose colour is the wrong answer.
            ``"other_colors"``: three other colours; wrong is the new one of the object asked for.
        **options: ``seed``, ``prepend_bos`` and ``padding_side``, as of every generator.

    Raises:
        InputError: there are fewer than ``n`` such prompts; the message says how many.
        TokenizerError: the model has no tokenizer.
    """
    making = begin(model, "coloured_objects", **options)
    colors, objects = (making.reader.single(words, before="a") for words in (_COLORS, DESK_OBJECTS))
    colors = colors if len(colors) >= 6 else []
    size = arrangements(colors, 3) * arrangements(objects, 3) * 3

    def template(sentence: str) -> Template:
        def make(index: int, draw: Draw) -> Pair:
            asked, index = one_of((0, 1, 2), index)
            own_colors, index = arrangement(colors, 3, index)
            own_objects, _ = arrangement(objects, 3, index)
            new_colors, which = own_colors, asked
            if corruption == "other_object":
                which = draw.other((0, 1, 2), asked)
            else:
                new_colors = draw.some([color for color in colors if color not in own_colors], 3)
            right, wrong = own_colors[asked], new_colors[which]
            example = _shelf(sentence, *_shown(objects, colors, (right, wrong), draw))
            clean, corrupted = (
                fill(
                    "{example}\n\n" + sentence, {"example": example} | _words(shades, own_objects, own_objects[number])
                )
                for shades, number in ((own_colors, asked), (new_colors, which))
            )
            return Pair(clean, corrupted, (f" {right}",), (f" {wrong}",))

        return Template(size, make)

    return making.task([template(sentence) for sentence in SHELVES], n, corruption)


def _words(colors: Sequence[str], objects: Sequence[str], asked: str) -> dict[str, str]:
    return {
        **{f"c{number}": color for number, color in enumerate(colors, 1)},
        **{f"o{number}": thing for number, thing in enumerate(objects, 1)},
        "asked": asked,
    }


def _shown(
    objects: Sequence[str], colors: Sequence[str], without: Sequence[str], draw: Draw
) -> tuple[list[str], list[str], int]:
    """Draws an example whose answer is none of ``without``: colours, objects, and which object is asked for."""
    while True:
        shades, asked = draw.some(colors, 3), draw.below(3)
        if shades[asked] not in without:
            return shades, draw.some(objects, 3), asked


def _shelf(sentence: str, colors: Sequence[str], objects: Sequence[str], asked: int) -> str:
    return f"{fill(sentence, _words(colors, objects, objects[asked])).text} {colors[asked]}"


@generator
def mcqa(
    model: Any,
    n: int,
    *,
    corruption: Literal["position", "letters"] = "position",
    letters: Literal["abcd", "random"] = "abcd",
    **options: Unpack[TaskOptions],
) -> Task:
    """Makes questions with four lettered choices, one of which repeats a colour that was just named.

    The right answer is the letter before that colour. Labelled parts: ``object``, ``color``, ``asked``, ``L1`` to
    ``L4`` (letters), ``A1`` to ``A4`` (choices), ``end``.

    Args:
        model: the model whose tokenizer the words must suit: objects, colours and letters are single tokens.
        n: number of prompts, all different.
        corruption: ``"position"``: the right choice and another one change places; wrong is the letter where the right
            choice then stands. ``"letters"``: four other letters; wrong is the new letter of the right choice.
        letters: ``"abcd"``, or four at ``"random"`` for each prompt.
        **options: ``seed``, ``prepend_bos`` and ``padding_side``, as of every generator.

    Raises:
        InputError: there are fewer than ``n`` such prompts; the message says how many.
        TokenizerError: the model has no tokenizer.
    """
    making = begin(model, "mcqa", **options)
    reader = making.reader
    colors = reader.single(COLORS, before="is")
    known = set(reader.single(thing for thing, _ in TYPICAL_COLORS))
    things = [(thing, color) for thing, color in TYPICAL_COLORS if thing in known and color in colors]
    ids = reader.answers("\nAnswer:", [f" {letter}" for letter in string.ascii_uppercase])
    capitals = [letter for letter, one in zip(string.ascii_uppercase, ids, strict=True) if one is not None]
    enough = len(capitals) >= 8 and set("ABCD") <= set(capitals) and len(colors) >= 4

    def template(sentence: str) -> Template:
        def make(index: int, draw: Draw) -> Pair:
            (thing, color), index = one_of(things, index)
            right, index = one_of(range(4), index)
            choices, _ = arrangement([other for other in colors if other != color], 3, index)
            choices.insert(right, color)
            symbols = list("ABCD") if letters == "abcd" else draw.some(capitals, 4)
            new_choices, new_symbols, there = list(choices), symbols, right
            if corruption == "position":
                there = draw.other(range(4), right)
                new_choices[right], new_choices[there] = choices[there], choices[right]
            else:
                new_symbols = draw.some([letter for letter in capitals if letter not in symbols], 4)
            base = {"object": thing, "color": color, "asked": thing}
            clean, corrupted = (
                fill(sentence, base | _lines(own_symbols, own_choices))
                for own_symbols, own_choices in ((symbols, choices), (new_symbols, new_choices))
            )
            return Pair(clean, corrupted, (f" {symbols[right]}",), (f" {new_symbols[there]}",))

        return Template(len(things) * 4 * arrangements(colors[1:], 3) if enough else 0, make)

    return making.task([template(sentence) for sentence in CHOICES], n, corruption)


def _lines(symbols: Sequence[str], choices: Sequence[str]) -> dict[str, str]:
    numbered = [(f"L{number}", symbol) for number, symbol in enumerate(symbols, 1)]
    return dict([*numbered, *((f"A{number}", choice) for number, choice in enumerate(choices, 1))])
