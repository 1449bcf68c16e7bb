"""What models know: capitals and their countries, kinds of things."""

from typing import Any, Literal, Unpack

from tljax.tasks.drawing import Draw
from tljax.tasks.making import TaskOptions, Template, arrangement, arrangements, begin, generator
from tljax.tasks.task import Task
from tljax.tasks.texts import Pair, Reader, fill
from tljax.tasks.words.facts import CAPITALS, KINDS

CITIES = (
    "The city of {city} is the capital of", "Many people in {city}, the capital of",
    "We flew to {city}, the capital of",
    "Last year she moved to {city}, the capital of", "The train stopped in {city}, the capital of",
    "They first met in {city}, the capital of", "He was born in {city}, the capital of",
    "The meeting was held in {city}, the capital of", "As everybody knows, {city} is the capital of",
    "The road leads to {city}, the capital of", "I once lived in {city}, the capital of",
    "The museums in {city}, the capital of",
)  # fmt: skip
LISTS = (
    "They talked about {first}, {second} and other", "The book is about {first}, {second} and other",
    "We learned a lot about {first}, {second} and other", "She wrote a list of {first}, {second} and other",
    "I dreamed of {first}, {second} and other",
)  # fmt: skip


@generator
def capitals(
    model: Any, n: int, *, corruption: Literal["other_city"] = "other_city", **options: Unpack[TaskOptions]
) -> Task:
    """Makes prompts that ask for a country: "We flew to Kabul, the capital of", then "Afghanistan".

    Labelled parts: ``city``, which may be several tokens, and ``end``.

    Args:
        model: the model whose tokenizer the words must suit: countries are single tokens.
        n: number of prompts, all different.
        corruption: ``"other_city"``: another capital of equally many tokens, whose country is the wrong answer.
        **options: ``seed``, ``prepend_bos`` and ``padding_side``, as of every generator.

    Raises:
        InputError: there are fewer than ``n`` such prompts; the message says how many.
        TokenizerError: the model has no tokenizer.
    """
    making = begin(model, "capitals", **options)
    countries = set(making.reader.single(country for _, country in CAPITALS))
    known = [(city, country) for city, country in CAPITALS if country in countries]
    lengths = dict(zip(known, making.reader.lengths([city for city, _ in known], before="to"), strict=True))
    alike = {pair: [one for one in known if lengths[one] == lengths[pair] and one != pair] for pair in known}
    asked = [pair for pair in known if lengths[pair] is not None and alike[pair]]

    def template(sentence: str) -> Template:
        def make(index: int, draw: Draw) -> Pair:
            city, country = asked[index]
            other, other_country = draw.one(alike[city, country])
            clean, corrupted = (fill(sentence, {"city": one}) for one in (city, other))
            return Pair(clean, corrupted, (f" {country}",), (f" {other_country}",))

        return Template(len(asked), make)

    return making.task([template(sentence) for sentence in CITIES], n, corruption)


@generator
def hypernymy(
    model: Any, n: int, *, corruption: Literal["other_kind"] = "other_kind", **options: Unpack[TaskOptions]
) -> Task:
    """Makes prompts that ask for the kind of two things: "They talked about guns, rifles and other", then "weapons".

    Each kind has several names, and there may be more of them on one side: measure with ``ProbDiff(**task.sets)``.
    Labelled parts: ``first``, ``second``, ``end``.

    Args:
        model: the model whose tokenizer the words must suit: all are single tokens.
        n: number of prompts, all different.
        corruption: ``"other_kind"``: two things of another kind, whose names are the wrong answers.
        **options: ``seed``, ``prepend_bos`` and ``padding_side``, as of every generator.

    Raises:
        InputError: there are fewer than ``n`` such prompts; the message says how many.
        TokenizerError: the model has no tokenizer.
    """
    making = begin(model, "hypernymy", **options)
    kinds = _kinds(making.reader)
    sizes = [arrangements(members, 2) for _, members in kinds] if len(kinds) > 1 else []

    def template(sentence: str) -> Template:
        def make(index: int, draw: Draw) -> Pair:
            number = 0
            while index >= sizes[number]:
                index, number = index - sizes[number], number + 1
            names, members = kinds[number]
            pair, _ = arrangement(members, 2, index)
            other_names, others = draw.one([one for one in kinds if not set(one[0]) & set(names)])
            clean, corrupted = (
                fill(sentence, {"first": one, "second": two})
                for one, two in (pair, draw.some([word for word in others if word not in pair], 2))
            )
            right, wrong = (tuple(f" {name}" for name in own) for own in (names, other_names))
            return Pair(clean, corrupted, right, wrong)

        return Template(sum(sizes), make)

    return making.task([template(sentence) for sentence in LISTS], n, corruption)


def _kinds(reader: Reader) -> list[tuple[list[str], list[str]]]:
    """Returns the kinds with a name and four members that are single tokens: so that two are left beside any two."""
    single = set(reader.single(word for names, members in KINDS for word in (*names, *members)))
    kept = [([name for name in names if name in single], [one for one in members if one in single])
            for names, members in KINDS]  # fmt: skip
    return [(names, members) for names, members in kept if names and len(members) >= 4]
