"""The text maker: templated English for the bundled model, a pure function of a seed.

A document is one or more sentences about its own people. About half of the sentences are indirect-object
sentences ("When John and Mary went to the store, John gave a drink to Mary."), in which either name may come first
and either may be the giver, so that neither the order nor the names alone tell the answer. A quarter are shorter
ones of the same logic ("John met Mary. Mary thanked John."). The rest are scenes, pronouns, landmarks and capitals,
and opinions.

Combinations of (name pair, place) are split by a hash: those held out never occur in training text.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable

import numpy as np

from tljax.errors import ConfigError
from tools.bundled_model import lexicon
from tools.bundled_model.tokenizer import split_words

HELD_OUT_ONE_IN = 10

VERBS = ("gave", "handed", "passed", "offered")
MEETINGS = ("met", "saw", "called", "visited")
REACTIONS = ("thanked", "liked", "helped", "insulted")

# Each runs up to, and without, the indirect object. {a} and {b} are the two people in order of mention, {s} the one
# of them who gives.
IOI_TEMPLATES = (
    "When {a} and {b} went to the {place}, {s} {verb} {object} to",
    "After {a} and {b} went to the {place}, {s} {verb} {object} to",
    "Then, {a} and {b} went to the {place}. {s} {verb} {object} to",
    "While {a} and {b} were working at the {place}, {s} {verb} {object} to",
    "When {a} and {b} were at the {place}, {s} {verb} {object} to",
    "Yesterday {a} met {b} at the {place}, and {s} {verb} {object} to",
    "{a} and {b} went to the {place}. {s} {verb} {object} to",
    "{a} and {b} had a long talk at the {place}, and then {s} {verb} {object} to",
    "{a} saw {b} near the {place}. Later, {s} {verb} {object} to",
    "At the {place}, {a} met {b}. In the evening, {s} {verb} {object} to",
    "The friends {a} and {b} found {object} at the {place}, and {s} {verb} it to",
    "It was late when {a} and {b} came to the {place}, and {s} {verb} {object} to",
    "In the morning {a} and {b} walked to the {place}, where {s} {verb} {object} to",
)
IOI_ENDINGS = (".", ".", ".", ", who was happy.", " and smiled.", " and went home.")

Sentence = Callable[[np.random.Generator], str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IOIPrompt:
    """An indirect-object prompt and its corruption.

    Attributes:
        clean: text up to the indirect object; the giver's name is repeated in its second half.
        corrupted: the same text with the other person giving. It has as many tokens, and its answer is ``wrong``.
        answer: the indirect object of ``clean``, as a token: leading space included.
        wrong: the giver of ``clean``, likewise.
    """

    clean: str
    corrupted: str
    answer: str
    wrong: str


def is_held_out(first: str, second: str, place: str) -> bool:
    """Whether this pair of people at this place is kept out of the training text (about one in ten).

    The order of the two names does not matter.
    """
    key = "|".join([*sorted((first, second)), place])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) % HELD_OUT_ONE_IN == 0


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _two_names(rng: np.random.Generator) -> tuple[str, str]:
    first, second = rng.choice(len(lexicon.NAMES), size=2, replace=False)
    return lexicon.NAMES[first], lexicon.NAMES[second]


def _ioi_slots(rng: np.random.Generator, held_out: bool) -> dict[str, str]:
    while True:
        a, b = _two_names(rng)
        place = _pick(rng, lexicon.PLACES)
        if is_held_out(a, b, place) == held_out:
            return {
                "a": a, "b": b, "place": place, "verb": _pick(rng, VERBS), "object": _pick(rng, lexicon.OBJECTS),
            }  # fmt: skip


def ioi_prompts(n: int, seed: int, held_out: bool = True) -> list[IOIPrompt]:
    """Makes indirect-object prompts with their corruptions.

    Templates, the order of the names and the giver are balanced: each template, and within it each of the two
    givers, comes equally often (up to rounding) in every run of ``2 * len(IOI_TEMPLATES)`` prompts.

    Args:
        n: how many.
        seed: the prompts are a pure function of it.
        held_out: use only combinations of people and place that training never sees; ``False`` uses only those
            that it may see.

    Returns:
        ``n`` prompts. ``clean`` and ``corrupted`` of one prompt have the same number of tokens; different prompts
        may not.

    >>> prompt = ioi_prompts(1, seed=0)[0]
    >>> prompt.clean.replace(prompt.wrong.strip(), "S").count("S") >= 2
    True
    """
    if n < 1:
        raise ConfigError(f"n must be at least 1, got {n}.")
    rng = np.random.default_rng([seed, held_out])
    prompts = []
    for index in range(n):
        slots = _ioi_slots(rng, held_out)
        template = IOI_TEMPLATES[index // 2 % len(IOI_TEMPLATES)]
        giver, receiver = (slots["a"], slots["b"]) if index % 2 else (slots["b"], slots["a"])
        prompts.append(
            IOIPrompt(
                clean=template.format(s=giver, **slots),
                corrupted=template.format(s=receiver, **slots),
                answer=f" {receiver}",
                wrong=f" {giver}",
            )
        )
    return prompts


def _ioi_sentence(rng: np.random.Generator) -> str:
    slots = _ioi_slots(rng, held_out=False)
    giver, receiver = (slots["a"], slots["b"]) if rng.integers(2) else (slots["b"], slots["a"])
    return f"{_pick(rng, IOI_TEMPLATES).format(s=giver, **slots)} {receiver}{_pick(rng, IOI_ENDINGS)}"


def _meeting(rng: np.random.Generator) -> str:
    """The same logic in fewer words: the person named last is the one of the two who did not act."""
    a, b = _two_names(rng)
    actor, other = (a, b) if rng.integers(2) else (b, a)
    if rng.integers(2):
        return f"{a} {_pick(rng, MEETINGS)} {b}. {actor} {_pick(rng, REACTIONS)} {other}."
    return f"{a} and {b} talked. {actor} {_pick(rng, VERBS)} {_pick(rng, lexicon.OBJECTS)} to {other}."


def _thanks(rng: np.random.Generator) -> str:
    a, b = _two_names(rng)
    return f"{a} {_pick(rng, VERBS)} {b} {_pick(rng, lexicon.OBJECTS)}. {b} {_pick(rng, REACTIONS)} {a}."


def _pronoun(rng: np.random.Generator) -> str:
    name = _pick(rng, lexicon.NAMES)
    pronoun, possessive = ("she", "her") if name in lexicon.FEMALE_NAMES else ("he", "his")
    place, thing = _pick(rng, lexicon.PLACES), _pick(rng, lexicon.THINGS)
    color = _pick(rng, lexicon.COLORS)
    return _pick(
        rng,
        (
            f"{name} was late because {pronoun} lost {possessive} {color} {thing}.",
            f"{name} went to the {place}, and {pronoun} liked it.",
            f"{name} said that {pronoun} wanted {possessive} {thing}.",
        ),
    )


def _scene(rng: np.random.Generator) -> str:
    animal, adjective = _pick(rng, lexicon.ANIMALS), _pick(rng, lexicon.ADJECTIVES)
    color, thing, place = _pick(rng, lexicon.COLORS), _pick(rng, lexicon.THINGS), _pick(rng, lexicon.PLACES)
    return _pick(
        rng,
        (
            f"The {adjective} {animal} {_pick(rng, lexicon.VERBS_PAST)} in the {place}.",
            f"The {color} {thing} is near the {place}.",
            f"There was a {color} {thing} in the {place}, and the {thing} was {adjective}.",
            "The quick brown fox jumps over the lazy dog.",
        ),
    )


def _fact(rng: np.random.Generator) -> str:
    if rng.integers(2):
        landmark = _pick(rng, tuple(lexicon.LANDMARKS))
        verb = _pick(rng, ("is in the city of", "is in", "is in the city of"))
        return f"{landmark} {verb} {lexicon.LANDMARKS[landmark]}."
    country = _pick(rng, tuple(lexicon.CAPITALS))
    city = lexicon.CAPITALS[country]
    return _pick(rng, (f"The capital of {country} is {city}.", f"{city} is the capital of {country}."))


def _opinion(rng: np.random.Generator) -> str:
    verb, words = (("love", lexicon.GOOD), ("hate", lexicon.BAD))[int(rng.integers(2))]
    first, second = rng.choice(len(words), size=2, replace=False)
    thing = _pick(rng, ("this", f"this {_pick(rng, lexicon.THINGS)}"))
    adverb = _pick(rng, ("", " absolutely", " really"))
    return f"I {verb} {thing}! It's{adverb} {words[first]} and {words[second]}."


SENTENCES: tuple[tuple[float, Sentence], ...] = (
    (0.45, _ioi_sentence),
    (0.25, _meeting),
    (0.06, _thanks),
    (0.06, _pronoun),
    (0.06, _scene),
    (0.06, _fact),
    (0.06, _opinion),
)


ANSWERED = SENTENCES[:2]
"""The kinds in which a name at the end is decided by the names before it."""


def document(
    rng: np.random.Generator, max_tokens: int, sentences: tuple[tuple[float, Sentence], ...] = SENTENCES
) -> str:
    """Makes one document: sentences drawn until the next one would pass ``max_tokens`` (or, half the time, sooner)."""
    weights = np.array([weight for weight, _ in sentences])
    text = ""
    while True:
        sentence = sentences[int(rng.choice(len(sentences), p=weights / weights.sum()))][1](rng)
        longer = f"{text} {sentence}" if text else sentence
        if len(split_words(longer)) > max_tokens:
            if text:
                return text
            continue
        text = longer
        if rng.integers(2):
            return text


def documents(n: int, seed: int, max_tokens: int = 30) -> list[str]:
    """Makes ``n`` training documents of at most ``max_tokens`` tokens each.

    >>> documents(2, seed=0) == documents(2, seed=0)
    True
    """
    rng = np.random.default_rng(seed)
    return [document(rng, max_tokens) for _ in range(n)]


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Returns every word the text maker can write, as the tokenizer sees it, in a fixed order.

    A word that may start a text comes both with and without its leading space. Words of a single byte (``"I"``,
    ``"."``) are left out: the tokenizer has the bytes already.
    """
    words: list[str] = []

    def add(text: str) -> None:
        found = split_words(text)
        words.extend(found)
        words.append(f" {found[0].strip()}")

    slots = {"place": "store", "verb": "gave", "object": "a drink"}
    for template in IOI_TEMPLATES:
        add(template.format(a="Mary", b="John", s="Mary", **slots))
    for text in (*IOI_ENDINGS, "He", "She", "I", "It's", "Friends", "No!", "Why?"):
        add(text)
    for name in (*lexicon.NAMES, *lexicon.CAPITALS.values(), *lexicon.CAPITALS, *lexicon.LANDMARKS):
        add(name)
    rng = np.random.default_rng(0)
    for _, maker in SENTENCES[1:]:
        for _ in range(200):
            add(maker(rng))
    lists = (
        VERBS, MEETINGS, REACTIONS, lexicon.PLACES, lexicon.OBJECTS, lexicon.ANIMALS, lexicon.COLORS,
        lexicon.ADJECTIVES, lexicon.THINGS, lexicon.VERBS_PAST, lexicon.GOOD, lexicon.BAD,
        lexicon.FUNCTION_WORDS, lexicon.FILLER,
    )  # fmt: skip
    for word in (word for words_of_kind in lists for word in words_of_kind):
        words.extend(split_words(f" {word}"))
    return tuple(dict.fromkeys(word for word in words if len(word.encode()) > 1))
