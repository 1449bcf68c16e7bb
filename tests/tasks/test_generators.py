"""Every generator: what its corruption changes, where labelled parts stand, that answers are single tokens."""

import inspect
import re
from typing import Any

import numpy as np
import pytest
from task_models import untrained, word_tokenizer
from tiny_tokenizers import TINY

from tljax import HookedTransformer, tasks
from tljax.errors import InputError, TokenizerError
from tljax.tasks import Task

ARGUMENTS = {"before1", "before2", "arg1", "arg2", "arg3", "after1"}
CASES: list[tuple[str, dict[str, Any], set[str]]] = [
    ("ioi", {"corruption": "abc"}, {"IO", "S1", "S2"}),
    ("ioi", {"corruption": "s2_random", "variant": "long"}, {"S2"}),
    ("ioi", {"corruption": "s2_io_flip", "variant": "late"}, {"S2"}),
    ("ioi", {"corruption": "swap", "variant": "early", "order": "baba"}, {"IO", "S1", "S2"}),
    *(("greater_than", {"variant": one}, {"YY"}) for one in ("year", "price", "sequence")),
    ("gender_bias", {}, {"person"}),
    ("gendered_pronouns", {}, {"name"}),
    *(("subject_verb_agreement", {"structure": one}, {"subject"}) for one in ("simple", "rc", "within_rc", "nounpp")),
    ("subject_verb_agreement", {"verbs": "all"}, {"subject"}),
    ("capitals", {}, {"city"}),
    ("hypernymy", {}, {"first", "second"}),
    ("coloured_objects", {"corruption": "other_object"}, {"asked"}),
    ("coloured_objects", {"corruption": "other_colors"}, {"c1", "c2", "c3"}),
    ("mcqa", {"corruption": "letters"}, {"L1", "L2", "L3", "L4"}),
    ("arithmetic", {"corruption": "ones"}, {"a"}),
    ("arithmetic", {"corruption": "tens", "operator": "-"}, {"a"}),
    ("docstring", {"corruption": "random_def"}, ARGUMENTS),
    ("docstring", {"corruption": "random_doc"}, {"doc1", "doc2"}),
    ("docstring", {"corruption": "random_random"}, {*ARGUMENTS, "doc1", "doc2"}),
    ("induction", {"corruption": "answer", "length": 8}, {"answer"}),
    ("induction", {"corruption": "first_copy", "length": 8}, {"first"}),
]
"""A generator, its options, and the parts that its corruption changes in every prompt."""
SOME: list[tuple[str, dict[str, Any], set[str]]] = [
    ("gendered_pronouns", {"corruption": "that_person"}, {"name"}),
    ("mcqa", {"corruption": "position", "letters": "random"}, {"A1", "A2", "A3", "A4"}),
    ("arithmetic", {"corruption": "random"}, {"a", "b"}),
]
"""The same where the corruption changes some of the parts, or a word besides."""
N = 30


@pytest.fixture(scope="module", params=["words", "gpt2"])
def model(request: pytest.FixtureRequest) -> HookedTransformer:
    return request.getfixturevalue(request.param)


def made(model: HookedTransformer, name: str, options: dict[str, Any], n: int = N, **more: Any) -> Task:
    return getattr(tasks, name)(model, n, **options, **more)


def rows(task: Task) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(task.clean.tokens), np.asarray(task.corrupted.tokens)


def inside(span: np.ndarray, width: int) -> np.ndarray:
    """Marks the positions of a part, ``[batch, pos]``."""
    place = np.arange(width)
    return (span[:, :1] <= place) & (place < span[:, 1:])


@pytest.mark.parametrize(("name", "options", "changed"), [*CASES, *SOME])
def test_prompts(model: HookedTransformer, name: str, options: dict[str, Any], changed: set[str]) -> None:
    task = made(model, name, options)
    clean, corrupted = rows(task)
    assert len({tuple(row) for row in clean.tolist()}) == len(task) == N
    assert (np.asarray(task.clean.mask) == np.asarray(task.corrupted.mask)).all()
    assert (task.pos("end") == task.lengths - 1).all()
    differs = clean != corrupted
    assert differs.any(axis=1).all()
    parts = {label: inside(task.spans[label], clean.shape[1]) for label in changed}
    if (name, options, changed) in CASES:
        assert all((differs & part).any(axis=1).all() for part in parts.values())
        assert not (differs & ~np.logical_or.reduce(list(parts.values()))).any()
    for label, span in task.spans.items():
        assert (span == task.corrupted_spans[label]).all()
        assert (span[:, 0] < span[:, 1]).all()
    for right, counted, wrong, other in zip(task.answers, task.answer_mask, task.wrongs, task.wrong_mask, strict=True):
        assert len(right[counted])
        assert len(wrong[other])
        assert not set(right[counted]) & set(wrong[other])


@pytest.mark.parametrize(("name", "options", "changed"), CASES)
def test_parts_stand_where_the_text_has_them(
    model: HookedTransformer, name: str, options: dict[str, Any], changed: set[str]
) -> None:
    """The tokens of a part make up a word (or a year, a letter, an example) of the text."""
    task = made(model, name, options, 8)
    if task.clean_texts is None:
        assert (task.clean.tokens[:, task.pos("answer")[0]] == task.answer).all()
        return
    for number, text in enumerate(task.clean_texts):
        row = np.asarray(task.clean.row(number))
        for label, span in task.spans.items():
            part = str(model.to_string(row[slice(*span[number])]))
            assert part.strip() in text
            assert label in ("end", "example") or re.fullmatch(r"[A-Za-z ]+|\d+", part.strip()), (label, part)


def test_ioi_names_stand_at_their_parts(model: HookedTransformer) -> None:
    task = tasks.ioi(model, N)
    clean, corrupted = rows(task)
    index = np.arange(N)
    assert (clean[index, task.pos("IO")] == task.answer).all()
    assert (clean[index, task.pos("S1")] == task.wrong).all()
    assert (clean[index, task.pos("S2")] == task.wrong).all()
    fresh = np.stack([corrupted[index, task.pos(label)] for label in ("IO", "S1", "S2")], axis=1)
    names = np.concatenate([fresh, task.answers, task.wrongs], axis=1)
    assert all(len(set(row)) == 5 for row in names.tolist())
    assert len(np.unique(task.templates)) == 30  # each of them once


def test_ioi_corruptions_turn_the_answer(model: HookedTransformer) -> None:
    index = np.arange(N)
    flip, swap = (tasks.ioi(model, N, corruption=one) for one in ("s2_io_flip", "swap"))
    assert (rows(flip)[1][index, flip.pos("S2")] == flip.answer).all()
    assert (rows(swap)[1][index, swap.pos("IO")] == swap.wrong).all()
    assert (rows(swap)[1][index, swap.pos("S2")] == swap.answer).all()


def test_answers_are_what_continues_the_text(model: HookedTransformer) -> None:
    for name in ("ioi", "gender_bias", "capitals", "mcqa", "docstring", "coloured_objects", "arithmetic"):
        task = getattr(tasks, name)(model, 6)
        for text, answer in zip(task.clean_texts, task.answers[:, 0], strict=True):
            longer = text + str(model.to_string(answer))
            assert np.asarray(model.to_tokens(longer))[0].tolist() == [*model.to_tokens(text)[0].tolist(), answer]


@pytest.mark.parametrize("variant", ["year", "price", "sequence"])
def test_greater_than_sets(model: HookedTransformer, variant: Any) -> None:
    task = tasks.greater_than(model, N, variant=variant)
    for text, right, counted, wrong, other in zip(
        task.clean_texts, task.answers, task.answer_mask, task.wrongs, task.wrong_mask, strict=True
    ):
        *earlier, (century, year) = re.findall(r"(\d\d)(\d\d)", text)
        assert len(earlier) == (3 if variant == "sequence" else 0)
        assert earlier == sorted(set(earlier))
        assert all(int(before) == int(century) - 1 for before, _ in earlier)
        assert 11 <= int(century) <= 17
        assert text.endswith(f" {century}")
        later = [int(one) for one in model.to_str_tokens(right[counted], prepend_bos=False)]
        before = [int(one) for one in model.to_str_tokens(wrong[other], prepend_bos=False)]
        assert later == list(range(int(year) + 1, 100))
        assert before == list(range(int(year) + 1))


def test_arithmetic_is_right(model: HookedTransformer) -> None:
    for operator, sign in (("+", 1), ("-", -1)):
        task = tasks.arithmetic(model, N, operator=operator, corruption="random")
        for text, number in zip(task.clean_texts, task.answer, strict=True):
            first, second = map(int, re.findall(r"\d+", text))
            high, low = (first, second) if "How" in text or sign > 0 else (second, first)
            assert int(str(model.to_string(number))) == high + sign * low


def test_agreement_agrees(model: HookedTransformer) -> None:
    """Singular subjects have the verb's singular form, whatever the number of another noun."""
    for structure in ("simple", "rc", "within_rc", "nounpp"):
        task = tasks.subject_verb_agreement(model, N, structure=structure)
        subjects = [
            str(model.to_string(np.asarray(task.clean.row(number))[span[0]])).strip()
            for number, span in enumerate(task.spans["subject"])
        ]
        plural = np.array([one.endswith(("s", "men", "children")) and one != "witness" for one in subjects])
        verbs = [str(model.to_string(one)).strip() for one in task.answer]
        ends = np.array([one.endswith("s") for one in verbs])
        assert (ends == ~plural).all()
        assert 0 < plural.sum() < N


@pytest.mark.parametrize(("name", "options", "changed"), CASES)
def test_a_seed_decides(words: HookedTransformer, name: str, options: dict[str, Any], changed: set[str]) -> None:
    one, same, other = (made(words, name, options, 12, seed=seed) for seed in (3, 3, 4))
    for first, second in zip(rows(one), rows(same), strict=True):
        assert (first == second).all()
    assert rows(one)[0].shape != rows(other)[0].shape or (rows(one)[0] != rows(other)[0]).any()


def test_pinned(tiny: HookedTransformer) -> None:
    """The prompts of a seed, on this and every later version of Python."""
    assert tasks.ioi(tiny, 2, seed=1).clean_texts == (
        "After Simon and Rachel met at the school, Rachel handed a computer to",
        "At the garden, Clara met Susan. In the evening, Clara gave a necklace to",
    )
    induction = tasks.induction(tiny, 1, length=5, seed=1)
    assert np.asarray(induction.clean.tokens).tolist() == [[0, 131, 821, 740, 250, 482, 131, 821, 740, 250]]


def test_pinned_with_gpt2s_tokenizer(gpt2: HookedTransformer) -> None:
    assert tasks.greater_than(gpt2, 2, seed=1).clean_texts == (
        "The deal lasted from the year 1470 to the year 14",
        "From the year 1442 the investigation went on until the year 14",
    )
    assert tasks.capitals(gpt2, 1, seed=1).corrupted_texts == ("Many people in Tirana, the capital of",)


def test_enough_with_gpt2s_tokenizer(gpt2: HookedTransformer) -> None:
    """A thousand of each, whose years come from every century."""
    for name in ("ioi", "greater_than", "gender_bias", "gendered_pronouns", "capitals", "subject_verb_agreement"):
        assert len(getattr(tasks, name)(gpt2, 1000)) == 1000
    years = [re.findall(r"\d\d", text)[0] for text in tasks.greater_than(gpt2, 300).clean_texts]
    assert min(years.count(str(century)) for century in range(11, 18)) > 20


def test_too_many(words: HookedTransformer) -> None:
    few = {"names": ("Mary", "John", "Bob", "Tom", "Alice"), "order": "abba"}
    template = ("When {first} met {second} at the {place}, {S2} gave it to",)
    with pytest.raises(InputError, match=r"n=10000 is more .* at most 160 different.* n=160 or fewer"):
        tasks.ioi(words, 10_000, templates=template, **few)
    every = tasks.ioi(words, 160, templates=template, **few)
    assert len(set(every.clean_texts)) == 160
    with pytest.raises(InputError, match="a word that the vocabulary lacks"):
        tasks.ioi(words, 1, templates=("When {first} met {second} at the zzyzx, {S2} gave it to",), **few)


@pytest.mark.parametrize("name", [one for one in tasks.__all__ if one[0].islower() and "_from" not in one])
def test_signatures_are_alike(name: str) -> None:
    parameters = inspect.signature(getattr(tasks, name)).parameters
    if name.startswith("load") or name == "from_prompts":
        assert {"prepend_bos", "padding_side"} <= set(parameters)
        return
    assert list(parameters)[:3] == ["model", "n", "corruption"]
    assert {"seed", "prepend_bos", "padding_side"} <= set(parameters)
    assert parameters["seed"].default == 0


@pytest.mark.parametrize("kind", TINY)
def test_a_vocabulary_without_the_words(kind: str) -> None:
    model = untrained(TINY[kind](), 300, default_prepend_bos=kind not in ("olmo", "qwen"))
    for name in ("ioi", "greater_than", "capitals", "docstring", "mcqa"):
        with pytest.raises(InputError, match=f"tasks.{name} can make no prompt with this model's tokenizer"):
            getattr(tasks, name)(model, 1)
    assert len(tasks.induction(model, 3)) == 3


def test_induction_needs_no_tokenizer() -> None:
    model = untrained(None, 8)
    task = tasks.induction(model, 30, length=3)
    clean, _ = rows(task)
    assert clean.shape == (30, 5)
    assert (clean[:, :2] == clean[:, 3:]).all()
    assert (clean[:, 2] == task.answer).all()
    with pytest.raises(InputError, match="at most 336 different"):
        tasks.induction(model, 337, length=3)
    with pytest.raises(TokenizerError, match=r"tasks.ioi needs a tokenizer"):
        tasks.ioi(model, 1)


def test_without_bos_and_padded_left(words: HookedTransformer) -> None:
    assert word_tokenizer().bos_token_id == 0
    right, left = (tasks.ioi(words, 12, padding_side=side) for side in ("right", "left"))
    assert right.clean.padding_side == "right"
    assert left.clean.padding_side == "left"
    bare = tasks.ioi(words, 12, prepend_bos=False)
    for label, span in right.spans.items():
        assert (span == left.spans[label]).all()
        assert (span - 1 == bare.spans[label]).all()
