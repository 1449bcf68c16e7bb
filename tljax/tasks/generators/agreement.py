"""Subject and verb that agree in number, in four structures (Finlayson et al. 2021; Marks et al. 2024)."""

import math
from collections.abc import Sequence
from typing import Any, Literal, Unpack

from tljax.tasks.drawing import Draw
from tljax.tasks.making import TaskOptions, Template, begin, generator, one_of
from tljax.tasks.task import Task
from tljax.tasks.texts import Pair, Reader, fill
from tljax.tasks.words.things import NEAR_NOUNS, NOUNS, RELATIVE_VERBS, VERBS

SENTENCES = {
    "simple": (
        "The {subject}", "Today the {subject}", "Of course the {subject}", "I think that the {subject}",
        "We know that the {subject}", "After lunch, the {subject}", "Every morning the {subject}",
        "At the moment the {subject}", "In the village the {subject}", "They told us that the {subject}",
        "It is clear that the {subject}", "Most of the time the {subject}",
    ),
    "rc": ("The {subject} that the {other} {relative}", "The {subject} who the {other} {relative}"),
    "within_rc": ("The {other} that the {subject}", "The {other} who the {subject}"),
    "nounpp": (
        "The {subject} near the {thing}", "The {subject} behind the {thing}", "The {subject} beside the {thing}",
        "The {subject} in front of the {thing}",
    ),
}  # fmt: skip
"""Sentences up to the verb. In ``within_rc`` that is the verb of the relative clause."""


Forms = tuple[str, str]
"""Singular and plural."""


@generator
def subject_verb_agreement(
    model: Any,
    n: int,
    *,
    corruption: Literal["number"] = "number",
    structure: Literal["simple", "rc", "within_rc", "nounpp"] = "simple",
    verbs: Literal["one", "all"] = "one",
    **options: Unpack[TaskOptions],
) -> Task:
    """Makes beginnings of sentences whose verb must agree with the subject: "The boys that the teacher likes".

    Other nouns have either number, whatever the subject's. Labelled parts: ``subject``, ``end``, and with the structure
    ``other`` (a second person), ``relative`` (the verb of the relative clause), ``thing``.

    Args:
        model: the model whose tokenizer the words must suit: both forms of nouns and verbs are single tokens.
        n: number of prompts, all different.
        corruption: ``"number"``: the subject's other number, after which the wrong answer is right.
        structure: ``"simple"``: "The boy"; ``"rc"``: the verb follows a relative clause; ``"within_rc"``: the verb is
            the relative clause's; ``"nounpp"``: "The boy near the cars".
        verbs: ``"one"``: the right and the wrong form of one verb, drawn for each prompt. ``"all"``: the forms of all
            verbs, for ``ProbDiff(**task.sets)``.
        **options: ``seed``, ``prepend_bos`` and ``padding_side``, as of every generator.

    Raises:
        InputError: there are fewer than ``n`` such prompts; the message says how many.
        TokenizerError: the model has no tokenizer.
    """
    making = begin(model, "subject_verb_agreement", **options)
    people, things = _known(making.reader, NOUNS), _known(making.reader, NEAR_NOUNS)
    relative = _known(making.reader, RELATIVE_VERBS)
    slots = {"subject": people, "other": people, "relative": relative, "thing": things}
    after = relative if structure == "within_rc" else _known(making.reader, VERBS)
    made = [_template(sentence, slots, after, verbs == "all") for sentence in SENTENCES[structure]]
    return making.task(made, n, corruption)


def _known(reader: Reader, pairs: Sequence[str]) -> list[Forms]:
    forms = [(one, other) for one, other in (pair.split() for pair in pairs)]
    single = set(reader.single([form for pair in forms for form in pair]))
    return [pair for pair in forms if single.issuperset(pair)]


def _template(sentence: str, slots: dict[str, list[Forms]], verbs: Sequence[Forms], all_verbs: bool) -> Template:
    used = {name: forms for name, forms in slots.items() if f"{{{name}}}" in sentence}
    counts = {name: len(forms) * (1 if name == "relative" else 2) for name, forms in used.items()}
    if "other" in used:
        counts["other"] -= 2  # the other person is not the subject
    size = max(math.prod(counts.values()), 0) if verbs and all(used.values()) else 0

    def make(index: int, draw: Draw) -> Pair:
        chosen: dict[str, tuple[Forms, int]] = {}
        for name in used:
            options = [forms for forms in used[name] if name != "other" or forms != chosen["subject"][0]]
            number = 0
            if name != "relative":
                number, index = one_of((0, 1), index)
            forms, index = one_of(options, index)
            chosen[name] = forms, chosen["other"][1] if name == "relative" else number
        words = {name: forms[number] for name, (forms, number) in chosen.items()}
        forms, number = chosen["subject"]
        after = verbs if all_verbs else [draw.one(verbs)]
        right, wrong = (tuple(f" {verb[which]}" for verb in after) for which in (number, 1 - number))
        return Pair(fill(sentence, words), fill(sentence, words | {"subject": forms[1 - number]}), right, wrong)

    return Template(size, make)
