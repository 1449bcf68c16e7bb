"""The text maker and its tokenizer: balanced, held out, reproducible, round-tripping."""

import re
from collections import Counter

import numpy as np
import pytest

from tljax.errors import ConfigError, InputError
from tools.bundled_model import data, lexicon
from tools.bundled_model.make import ANSWER_WEIGHT, STAGES, TEXT_POS, Batches
from tools.bundled_model.repeats import repeated_words, repeating_rows
from tools.bundled_model.tokenizer import (
    BOS_ID,
    FIRST_WORD_ID,
    SPECIAL_TOKEN,
    build_tokenizer,
    encode_rows,
    split_words,
)

NAME = re.compile(rf"\b({'|'.join(lexicon.NAMES)})\b")
PLACE = re.compile(rf"the ({'|'.join(sorted(lexicon.PLACES, key=len, reverse=True))})\b")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(data.vocabulary())


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return data.documents(4000, seed=11)


def test_lists_hold_no_repeats() -> None:
    for words in (lexicon.NAMES, lexicon.PLACES, lexicon.OBJECTS, lexicon.FILLER):
        assert len(set(words)) == len(words)
    assert not set(lexicon.FEMALE_NAMES) & set(lexicon.MALE_NAMES)


def test_text_is_a_function_of_the_seed(texts: list[str]) -> None:
    assert data.documents(50, seed=11) == texts[:50]
    assert data.documents(50, seed=12) != texts[:50]
    assert data.ioi_prompts(8, seed=0) == data.ioi_prompts(8, seed=0)
    assert data.ioi_prompts(8, seed=0) != data.ioi_prompts(8, seed=1)


def test_held_out_combinations_never_occur_in_text(texts: list[str]) -> None:
    seen = set()
    for sentence in texts:
        for template in data.IOI_TEMPLATES:
            slots = {slot: rf"(?P<{slot}>\w+)" for slot in ("a", "b", "place")}
            pattern = template.format(**slots, s=r"\w+", verb=r"\w+", object=r".+?")
            for match in re.finditer(pattern.replace(". ", r"\. "), sentence):
                seen.add((frozenset((match["a"], match["b"])), match["place"]))
    assert len(seen) > 1500
    assert not [combination for combination in seen if data.is_held_out(*combination[0], combination[1])]
    held_out = data.ioi_prompts(400, seed=3)
    for prompt in held_out:
        people = sorted({prompt.answer.strip(), prompt.wrong.strip()})
        place = PLACE.search(prompt.clean)
        assert place is not None
        assert data.is_held_out(*people, place[1])
    for prompt in data.ioi_prompts(50, seed=3, held_out=False):
        place = PLACE.search(prompt.clean)
        assert place is not None
        assert not data.is_held_out(prompt.wrong.strip(), prompt.answer.strip(), place[1])


def test_about_one_combination_in_ten_is_held_out_in_either_order() -> None:
    names = lexicon.NAMES
    held = [data.is_held_out(a, b, place) for a in names[:20] for b in names[30:40] for place in lexicon.PLACES]
    assert 0.08 < np.mean(held) < 0.12
    assert all(data.is_held_out(a, "Mary", "park") == data.is_held_out("Mary", a, "park") for a in names)


def test_prompts_are_balanced() -> None:
    prompts = data.ioi_prompts(10 * 2 * len(data.IOI_TEMPLATES), seed=5)
    first_gives = sum(NAME.findall(prompt.clean)[0] == prompt.wrong.strip() for prompt in prompts)
    assert first_gives == len(prompts) // 2
    shapes = Counter(NAME.sub("N", PLACE.sub("the P", prompt.clean)).split(" N ")[0] for prompt in prompts)
    assert len(shapes) >= 8


def test_prompts_follow_the_pattern(tokenizer) -> None:
    for prompt in data.ioi_prompts(200, seed=9):
        clean, corrupted = NAME.findall(prompt.clean), NAME.findall(prompt.corrupted)
        receiver, giver = prompt.answer.strip(), prompt.wrong.strip()
        assert sorted(clean) == sorted([receiver, giver, giver])
        assert (clean[2], corrupted[2]) == (giver, receiver)
        assert clean[:2] == corrupted[:2]
        assert NAME.sub("N", prompt.clean) == NAME.sub("N", prompt.corrupted)
        assert prompt.clean.endswith(" to")
        assert len(tokenizer.encode(prompt.clean).ids) == len(tokenizer.encode(prompt.corrupted).ids)
        assert all(len(tokenizer.encode(token).ids) == 1 for token in (prompt.answer, prompt.wrong))


def test_either_order_either_giver_in_training_text(texts: list[str]) -> None:
    orders = Counter()
    for text in texts:
        for match in re.finditer(r"(\w+) and (\w+) went to the \w+, (\w+) \w+ [^.]*? to (\w+)", text):
            first, second, giver, receiver = match.groups()
            assert {giver, receiver} == {first, second}
            orders[giver == first] += 1
    assert 0.4 < orders[True] / orders.total() < 0.6


def test_every_word_of_every_text_is_one_token(texts: list[str], tokenizer) -> None:
    vocabulary = {*data.vocabulary(), *(chr(byte) for byte in range(128))}
    assert tokenizer.get_vocab_size() == FIRST_WORD_ID + len(data.vocabulary())
    for text, encoded in zip(texts, tokenizer.encode_batch(texts), strict=True):
        words = split_words(text)
        assert "".join(words) == text
        assert set(words) <= vocabulary, text
        assert len(encoded.ids) == len(words)
        assert tokenizer.decode(encoded.ids) == text


@pytest.mark.parametrize(
    "text",
    [
        "When John and Mary went to the store, Mary gave a drink to",
        "Zogriv met Mary at the Louvre!",
        "naïve ☃ 数\n\ttabs  and   spaces ",
        "",
        " leading, trailing ",
        "It's 1984.",
    ],
)
def test_any_text_round_trips(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_words_that_users_will_type_are_single_tokens(tokenizer) -> None:
    for name in ("John", "Mary", "Tom", "James", "Dan", "Sid", "Martin", "Amy", "Alice", "Bob"):
        assert len({*tokenizer.encode(name).ids, *tokenizer.encode(f" {name}").ids}) == 2
    for word in ("When", " when", " When", " store", " Paris", " Rome", " Eiffel", " Tower", " milk", " love"):
        assert len(tokenizer.encode(word).ids) == 1, word


def test_a_word_outside_the_vocabulary_is_spelled_not_swallowed(tokenizer) -> None:
    ids = tokenizer.encode(" Zog").ids
    assert len(ids) == 4
    assert max(ids) < FIRST_WORD_ID
    assert tokenizer.token_to_id(SPECIAL_TOKEN) == BOS_ID


def test_encoded_rows(tokenizer) -> None:
    rows, weights = encode_rows(tokenizer, ["Mary met John.", "Why?"], 8)
    assert rows.shape == (2, 8)
    assert weights.shape == (2, 7)
    assert rows[:, 0].tolist() == [BOS_ID, BOS_ID]
    assert weights.sum(axis=1).tolist() == [5, 3]
    assert rows[0, 5:].tolist() == [BOS_ID] * 3
    with pytest.raises(InputError, match="has 4 tokens; a row of 5 holds at most 3"):
        encode_rows(tokenizer, ["Mary met John."], 5)


def test_repeated_words() -> None:
    rows = repeated_words(5, 7, seed=2)
    assert rows.shape == (5, 15)
    assert (rows[:, 0] == BOS_ID).all()
    np.testing.assert_array_equal(rows[:, 1:8], rows[:, 8:])
    assert rows[:, 1:].min() >= FIRST_WORD_ID
    np.testing.assert_array_equal(rows, repeated_words(5, 7, seed=2))
    assert (rows != repeated_words(5, 7, seed=3)).any()
    with pytest.raises(InputError, match="at least 1, got n=0"):
        repeated_words(0, 7, seed=2)


def test_repeating_rows_count_only_what_an_earlier_copy_predicts() -> None:
    rows, weights = repeating_rows(np.random.default_rng(0), 64, 40, d_vocab=10**6)
    for row, weight in zip(rows, weights, strict=True):
        for p in np.flatnonzero(weight):
            earlier = [q for q in range(1, p) if row[q] == row[p]]
            assert any(row[q + 1] == row[p + 1] for q in earlier)
    assert 0.3 < weights.mean() < 0.9


def test_training_batches() -> None:
    batches = Batches(steps=100, seed=4)
    decode = build_tokenizer(data.vocabulary()).decode
    for step, stage in ((0, STAGES[0]), (98, STAGES[-1])):
        tokens, weights = batches(step)
        again, _ = Batches(steps=100, seed=4)(step)
        np.testing.assert_array_equal(tokens, again)
        assert tokens.shape == (stage.text_rows, TEXT_POS)
        answers = np.argwhere(weights == (1 if stage.answers_only else ANSWER_WEIGHT))
        assert len(answers) > len(tokens) / 2
        assert {decode([tokens[row, p + 1]]).strip() for row, p in answers} <= set(lexicon.NAMES)
        assert set(np.unique(weights)) == ({0, 1} if stage.answers_only else {0, 1, ANSWER_WEIGHT})
        assert batches(step + 1)[0].shape == (stage.repeat_rows, stage.repeat_pos)


def test_too_few_prompts() -> None:
    with pytest.raises(ConfigError, match="n must be at least 1, got 0"):
        data.ioi_prompts(0, seed=0)
