"""Tokens against TransformerLens's recorded answers, and every refusal by its message."""

import json
import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_tokenizers import TINY

from tljax import DoubledBosWarning
from tljax.errors import InputError, TokenizerError
from tljax.text import (
    Tokenizer,
    TruncationWarning,
    get_attention_mask,
    get_token_position,
    to_single_str_token,
    to_single_token,
    to_str_tokens,
    to_string,
    to_tokens,
    wrap_tokenizer,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tokens.json").read_text())
N_CTX = GOLDEN["n_ctx"]
RECORDED = GOLDEN["tokenizers"]
WRAPPED = {}


def tiny(name: str) -> Tokenizer:
    if name not in WRAPPED:
        WRAPPED[name] = wrap_tokenizer(TINY[name](), add_bos=name != "olmo")
    return WRAPPED[name]


def cases(kind: str):
    return [
        pytest.param(name, case, id=f"{name}-{index}")
        for name, recorded in RECORDED.items()
        for index, case in enumerate(recorded[kind])
    ]


@pytest.fixture(autouse=True)
def _truncation_and_spelled_bos_are_expected():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        warnings.simplefilter("ignore", DoubledBosWarning)
        yield


# TransformerLens 3.9's answers


@pytest.mark.parametrize(("name", "case"), cases("batches"))
def test_to_tokens_and_attention_mask_equal_transformerlens(name, case):
    options = {"prepend_bos": case["prepend_bos"], "padding_side": case["padding_side"]}
    tokens = to_tokens(tiny(name), case["text"], truncate=case["truncate"], n_ctx=N_CTX, **options)
    assert tokens.dtype == np.int32
    assert tokens.ndim == 2
    assert tokens.tolist() == case["tokens"]
    mask = get_attention_mask(tiny(name), tokens, **options)
    assert mask.dtype == np.int32
    assert mask.tolist() == case["mask"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_attention_mask_of_traced_tokens(name, side):
    tokens = to_tokens(tiny(name), ["The cat sat", "", "the"], padding_side=side)
    mask = jax.jit(lambda ids: get_attention_mask(tiny(name), ids, True, side))(jnp.asarray(tokens))
    assert isinstance(mask, jax.Array)
    assert mask.dtype == jnp.int32
    np.testing.assert_array_equal(mask, get_attention_mask(tiny(name), tokens, True, side))


@pytest.mark.parametrize(("name", "case"), cases("texts"))
def test_strings_and_positions_equal_transformerlens(name, case):
    text, prepend_bos = case["text"], case["prepend_bos"]
    options = {"prepend_bos": prepend_bos, "n_ctx": N_CTX}
    tokens = to_tokens(tiny(name), text, **options)
    assert to_string(tiny(name), tokens) == case["string"]
    if "str_tokens" in case:
        assert to_str_tokens(tiny(name), text, **options) == case["str_tokens"]
        if isinstance(text, str):
            assert to_str_tokens(tiny(name), tokens) == case["str_tokens"]
    for token, positions in case.get("positions", {}).items():
        for mode, expected in zip(("first", "last"), positions, strict=True):
            if expected is not None:
                assert get_token_position(tiny(name), token, text, mode, **options) == expected
            else:
                with pytest.raises((InputError, TokenizerError)):
                    get_token_position(tiny(name), token, text, mode, **options)


def test_golden_file_covers_what_the_rules_turn_on():
    habits = {
        (recorded["prepends_bos"], recorded["bos_token_id"] == recorded["pad_token_id"])
        for recorded in RECORDED.values()
    }
    assert habits == {(True, True), (True, False), (False, True), (False, False)}
    for recorded in RECORDED.values():
        assert any(case["text"] == "" for case in recorded["batches"])
        assert any(len(case["tokens"][0]) == N_CTX for case in recorded["batches"])
        assert any(len(case["tokens"][0]) > N_CTX for case in recorded["batches"])
        assert any(value for case in recorded["texts"] for value in case.get("positions", {}).values())


# BOS and padding, in words


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_rows_hold_the_single_rows(name, side):
    texts = ["The cat sat", "", "the", "naïve 🙂"]
    for prepend_bos in (True, False):
        batch = to_tokens(tiny(name), texts, prepend_bos=prepend_bos, padding_side=side)
        for row, text in zip(batch, texts, strict=True):
            alone = to_tokens(tiny(name), text, prepend_bos=prepend_bos)[0]
            pads = len(row) - len(alone)
            kept, filled = (row[pads:], row[:pads]) if side == "left" else (row[: len(alone)], row[len(alone) :])
            np.testing.assert_array_equal(kept, alone)
            assert set(filled.tolist()) <= {tiny(name).pad_token_id}


@pytest.mark.parametrize("name", TINY)
def test_bos_comes_once_and_goes_wholly(name):
    bos = tiny(name).bos_token_id
    with_bos = to_tokens(tiny(name), "The cat")[0].tolist()
    assert with_bos.count(bos) == 1
    assert with_bos[0] == bos
    assert to_tokens(tiny(name), "The cat", prepend_bos=False)[0].tolist() == with_bos[1:]


@pytest.mark.parametrize("name", TINY)
def test_text_survives_the_round_trip(name):
    text = "the naïve 日本 🙂  cat\n\t."
    tokens = to_tokens(tiny(name), text, prepend_bos=False)[0]
    assert to_string(tiny(name), tokens) == text
    pieces = to_str_tokens(tiny(name), text, prepend_bos=False)
    assert len(pieces) == len(tokens)
    assert pieces == [to_single_str_token(tiny(name), int(token)) for token in tokens]


def test_default_padding_side_is_the_tokenizers():
    left = wrap_tokenizer(tiny("gpt2"), "left")
    texts = ["the", "the cat"]
    np.testing.assert_array_equal(to_tokens(left, texts), to_tokens(tiny("gpt2"), texts, padding_side="left"))
    assert get_attention_mask(left, to_tokens(left, texts)).tolist() == [[0, 1, 1], [1, 1, 1]]


def test_mask_of_a_tokenizer_without_pad_is_all_ones():
    bare = Tokenizer(
        hf=None, prepends_bos=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        padding_side="left", d_vocab=3,
    )  # fmt: skip
    assert get_attention_mask(bare, np.zeros((1, 2), np.int32)).tolist() == [[1, 1]]


# Truncation


def test_truncation_warns_once_and_counts():
    with pytest.warns(TruncationWarning) as caught:
        tokens = to_tokens(tiny("gpt2"), ["the cat sat", "the cat sat the", "the"], n_ctx=3)
    assert tokens.shape == (3, 3)
    assert [str(warning.message) for warning in caught] == [
        "2 of 3 texts are longer than n_ctx=3: 3 tokens dropped. "
        "Shorten the text, or pass truncate=False to to_tokens and split the tokens yourself."
    ]
    assert caught[0].filename == __file__
    with pytest.warns(TruncationWarning, match=r"^The text is longer than n_ctx=3: 1 token dropped\."):
        to_tokens(tiny("olmo"), "the cat sat", n_ctx=3)


def test_no_truncation_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_tokens(tiny("gpt2"), "the cat sat", n_ctx=4).shape == (1, 4)
        assert to_tokens(tiny("gpt2"), "the cat sat", n_ctx=3, truncate=False).shape == (1, 4)
        assert to_tokens(tiny("gpt2"), "the cat sat").shape == (1, 4)


def test_a_bos_the_tokenizer_adds_counts_when_truncating():
    assert to_tokens(tiny("llama"), "the cat sat", prepend_bos=False, n_ctx=3).shape == (1, 2)
    assert to_tokens(tiny("olmo"), "the cat sat", prepend_bos=False, n_ctx=3).shape == (1, 3)
    assert to_tokens(tiny("olmo"), "the cat sat", n_ctx=1).tolist() == [[tiny("olmo").bos_token_id]]


# Kinds of input


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray, list, lambda ids: np.asarray(ids)[None]])
def test_tokens_may_be_any_array(array):
    ids = array(to_tokens(tiny("gpt2"), "the cat sat the")[0].tolist())
    assert to_str_tokens(tiny("gpt2"), ids)[1:] == ["the", " cat", " sat", " the"]
    assert get_token_position(tiny("gpt2"), " sat", ids) == 3
    assert "".join(to_string(tiny("gpt2"), ids)).endswith("the cat sat the")


def test_lists_of_rows():
    gpt2 = tiny("gpt2")
    rows = [to_tokens(gpt2, text, prepend_bos=False)[0] for text in ("the cat", "the")]
    assert to_string(gpt2, rows) == ["the cat", "the"]
    assert to_str_tokens(gpt2, rows) == [["the", " cat"], ["the"]]
    assert to_str_tokens(gpt2, ["the cat", "the"], prepend_bos=False) == [["the", " cat"], ["the"]]
    assert to_str_tokens(gpt2, []) == []
    assert to_str_tokens(gpt2, ["", "the"], prepend_bos=False) == [[], ["the"]]
    assert to_string(gpt2, rows[0][0]) == "the"
    assert to_string(gpt2, []) == ""


@pytest.mark.parametrize("kind", [int, np.int32, np.int64, jnp.asarray, lambda i: np.array([i])])
def test_one_token_in_any_integer_type(kind):
    gpt2 = tiny("gpt2")
    token = to_single_token(gpt2, " cat")
    assert type(token) is int
    assert to_single_str_token(gpt2, kind(token)) == " cat"
    position = get_token_position(gpt2, kind(token), "the cat the cat", "last")
    assert position == 4
    assert type(position) is int


def test_ids_between_the_tokenizers_and_the_models_vocabulary_have_no_text():
    gpt2 = tiny("gpt2")
    beyond = [to_single_token(gpt2, "the"), gpt2.d_vocab + 1]
    assert to_string(gpt2, beyond, d_vocab=gpt2.d_vocab + 2) == "the"
    assert to_str_tokens(gpt2, beyond, d_vocab=gpt2.d_vocab + 2) == ["the", ""]


# Refusals


def refuses(error, message):
    return pytest.raises(error, match="^" + re.escape(message))


def test_to_tokens_refuses_what_is_not_text():
    gpt2 = tiny("gpt2")
    with refuses(InputError, "Got an empty list: there is nothing to tokenize."):
        to_tokens(gpt2, [])
    with refuses(InputError, "Expected text to tokenize, a string or a list of strings, got ndarray."):
        to_tokens(gpt2, np.zeros(3, np.int32))
    with refuses(InputError, "Expected a list of strings, got int 7 at index 1."):
        to_tokens(gpt2, ["the", 7])
    with refuses(InputError, "Expected text to tokenize, a string or a list of strings, got NoneType."):
        to_tokens(gpt2, None)


@pytest.mark.parametrize("side", ["middle", "", 1])
def test_unknown_padding_side(side):
    message = f"padding_side must be 'left', 'right' or None (the tokenizer's own), got {side!r}."
    gpt2 = tiny("gpt2")
    calls = [
        lambda: to_tokens(gpt2, "the", padding_side=side),
        lambda: to_str_tokens(gpt2, "the", padding_side=side),
        lambda: get_token_position(gpt2, "the", "the", padding_side=side),
        lambda: get_attention_mask(gpt2, np.zeros((1, 2), np.int32), padding_side=side),
        lambda: wrap_tokenizer(TINY["gpt2"](), side),
    ]
    for call in calls:
        with refuses(InputError, message):
            call()


def test_to_single_token_shows_the_pieces_and_a_spelling_that_works():
    gpt2 = tiny("gpt2")
    with refuses(TokenizerError, "'sat' is 2 tokens, not one: ['s', 'at']. ' sat' is one token: use that if the"):
        to_single_token(gpt2, "sat")
    with refuses(TokenizerError, "' The' is 2 tokens, not one: [' ', 'The']. 'The' is one token: use that if the"):
        to_single_token(gpt2, " The")
    with refuses(TokenizerError, "'dog' is 3 tokens, not one: ['d', 'o', 'g']. Choose a word that is one token, or"):
        to_single_token(gpt2, "dog")
    with refuses(TokenizerError, "'' is 0 tokens, not one: []."):
        to_single_token(gpt2, "")
    with refuses(InputError, "to_single_token takes a string, got int 5."):
        to_single_token(gpt2, 5)
    assert to_single_token(gpt2, "<|endoftext|>") == 267


@pytest.mark.parametrize("token", [-1, 268, 10**6])
def test_token_id_out_of_range(token):
    message = f"Token id {token} is out of range: the vocabulary has ids 0 to 267."
    gpt2 = tiny("gpt2")
    calls = [
        lambda: to_string(gpt2, [0, token]),
        lambda: to_string(gpt2, [[0, 1, 2], [token]]),
        lambda: to_str_tokens(gpt2, np.array([0, token])),
        lambda: to_single_str_token(gpt2, token),
        lambda: get_token_position(gpt2, token, "the"),
        lambda: get_token_position(gpt2, 0, [0, token]),
    ]
    for call in calls:
        with refuses(InputError, message):
            call()


def test_tokens_that_are_not_integers():
    gpt2 = tiny("gpt2")
    with refuses(InputError, "Token ids must be integers, got list of dtype float64."):
        to_string(gpt2, [0.5])
    with refuses(InputError, "Token ids must be integers, got ndarray of dtype bool."):
        to_str_tokens(gpt2, np.array([True]))
    with refuses(InputError, "Token ids must be integers, got float of dtype float64."):
        to_single_str_token(gpt2, 3.0)
    with refuses(InputError, "Expected token ids, got the text 'the'. Use to_tokens to turn text into ids."):
        to_string(gpt2, "the")
    with refuses(InputError, "Expected one token id, got 2 of them."):
        to_single_str_token(gpt2, [1, 2])


def test_shapes_that_are_not_one_row():
    gpt2, batch = tiny("gpt2"), np.zeros((2, 3), np.int32)
    with refuses(InputError, "Expected one row of tokens, [pos] or [1, pos], got shape [2, 3]."):
        to_str_tokens(gpt2, batch)
    with refuses(InputError, "Expected one row of tokens, [pos] or [1, pos], got shape [2, 3]."):
        get_token_position(gpt2, 0, batch)
    with refuses(InputError, "to_string takes tokens of shape [pos] or [batch, pos], got [1, 2, 3]."):
        to_string(gpt2, batch[None])


def test_token_that_does_not_occur_shows_the_prompt():
    message = (
        "The token ' sat' (id 263) does not occur in the prompt, whose tokens are "
        "['<|endoftext|>', 'the', ' cat']. A leading space makes another token"
    )
    with refuses(InputError, message):
        get_token_position(tiny("gpt2"), " sat", "the cat")
    with refuses(InputError, "mode must be 'first' or 'last', got 'middle'."):
        get_token_position(tiny("gpt2"), "the", "the cat", "middle")
    with refuses(TokenizerError, "'the cat' is 2 tokens, not one:"):
        get_token_position(tiny("gpt2"), "the cat", "the cat")
