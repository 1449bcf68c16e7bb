"""Pronouns: what a model takes for granted about professions, and about first names."""

from collections.abc import Sequence
from typing import Any, Literal, Unpack

from tljax.tasks.drawing import Draw
from tljax.tasks.making import TaskOptions, Template, begin, generator, one_of
from tljax.tasks.task import Task
from tljax.tasks.texts import Pair, Text, fill
from tljax.tasks.words.people import FEMALE_NAMES, FEMALE_PROFESSIONS, MALE_NAMES, MALE_PROFESSIONS

DEEDS = (
    "was promoted", "was late", "was tired", "was praised", "was angry", "was happy", "slept well", "left early",
    "stayed home", "smiled", "resigned", "waited outside", "called again", "laughed", "was fired", "ran away",
)  # fmt: skip
PRAISE = (
    "such a good cook", "a very good athlete", "a really great friend", "a really nice person", "such a funny person",
    "such a kind neighbor", "a very careful driver", "such a clever student", "a really good dancer",
    "such a brave person", "a very quick reader", "a really loud singer",
)  # fmt: skip

_Options = Sequence[tuple[str, bool]]
"""A word, and whether it is taken for a man's."""


@generator
def gender_bias(
    model: Any, n: int, *, corruption: Literal["man_woman"] = "man_woman", **options: Unpack[TaskOptions]
) -> Task:
    """Makes prompts that show a bias: "The nurse was promoted because", followed by "she" rather than "he".

    The right answer is the pronoun that the profession is stereotypically given, the wrong one the other. Labelled
    parts: ``person``, ``end``.

    Args:
        model: the model whose tokenizer the words must suit: professions are single tokens.
        n: number of prompts, all different.
        corruption: ``"man_woman"``: "man" or "woman" takes the profession's place, of the other gender.
        **options: ``seed``, ``prepend_bos`` and ``padding_side``, as of every generator.

    Raises:
        InputError: there are fewer than ``n`` such prompts; the message says how many.
        TokenizerError: the model has no tokenizer.
    """
    making = begin(model, "gender_bias", **options)
    listed = ((MALE_PROFESSIONS, True), (FEMALE_PROFESSIONS, False))
    people = [(word, male) for words, male in listed for word in making.reader.single(words)]
    both = len(making.reader.single(("man", "woman"))) == 2

    def template(deed: str) -> Template:
        def make(index: int, draw: Draw) -> Pair:
            (person, male), _ = one_of(people, index)
            sentence = f"The {{person}} {deed} because"
            clean, corrupted = (fill(sentence, {"person": one}) for one in (person, "woman" if male else "man"))
            return Pair(clean, corrupted, *_pronouns(male))

        return Template(len(people) if both else 0, make)

    return making.task([template(deed) for deed in DEEDS], n, corruption)


@generator
def gendered_pronouns(
    model: Any,
    n: int,
    *,
    corruption: Literal["other_gender", "that_person"] = "other_gender",
    **options: Unpack[TaskOptions],
) -> Task:
    """Makes prompts that ask for the pronoun of a first name: "So Mary is such a good cook, isn't", then "she".

    Labelled parts: ``name``, ``end``.

    Args:
        model: the model whose tokenizer the words must suit: names are single tokens.
        n: number of prompts, all different.
        corruption: ``"other_gender"``: a name of the other gender. ``"that_person"``: "That person is …", which says
            neither.
        **options: ``seed``, ``prepend_bos`` and ``padding_side``, as of every generator.

    Raises:
        InputError: there are fewer than ``n`` such prompts; the message says how many.
        TokenizerError: the model has no tokenizer.
    """
    making = begin(model, "gendered_pronouns", **options)
    names = {male: making.reader.single(words) for male, words in ((True, MALE_NAMES), (False, FEMALE_NAMES))}
    people = [(name, male) for male, own in names.items() for name in own] if all(names.values()) else []

    def template(praise: str) -> Template:
        def make(index: int, draw: Draw) -> Pair:
            (name, male), _ = one_of(people, index)
            sentence = f"So {{name}} is {praise}, isn't"
            if corruption == "other_gender":
                corrupted: Text = fill(sentence, {"name": draw.one(names[not male])})
            else:
                corrupted = fill(sentence.replace("So", "That", 1), {"name": "person"})
            return Pair(fill(sentence, {"name": name}), corrupted, *_pronouns(male))

        return Template(len(people), make)

    return making.task([template(praise) for praise in PRAISE], n, corruption)


def _pronouns(male: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return ((" he",), (" she",)) if male else ((" she",), (" he",))
