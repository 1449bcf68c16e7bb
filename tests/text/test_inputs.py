"""What a model takes, and what it says of the rest."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import close
from tiny_tokenizers import gpt2_like
from variants import TOKENS, build

from tljax import HookedTransformer, HookedTransformerConfig
from tljax.errors import ConfigError, InputError, TokenizerError


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return build("gpt2")


@pytest.mark.parametrize(
    "make",
    [
        np.asarray,
        jnp.asarray,
        lambda t: t.tolist(),
        lambda t: tuple(map(tuple, t.tolist())),
        lambda t: t.astype(np.int64),
        lambda t: t.astype(np.uint8),
    ],
)
def test_token_forms(model: HookedTransformer, make: Any) -> None:
    close(model(make(TOKENS)), model(TOKENS))


def test_one_sequence_gets_a_batch_axis(model: HookedTransformer) -> None:
    assert model(TOKENS[0]).shape == (1, 6, 13)
    close(model(TOKENS[0].tolist()), model(TOKENS)[:1])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], r"The input holds no tokens \(shape \(0,\)\)"),
        (np.zeros((2, 0), np.int32), "holds no tokens"),
        (5, r"must have shape \[pos\] or \[batch, pos\], got \(\)"),
        (np.zeros((1, 2, 3), np.int32), r"got \(1, 2, 3\)"),
        (np.ones((1, 4)), "must be integers, got dtype float64. To feed a residual stream, also pass start_at_layer="),
        (np.ones((1, 4), bool), "must be integers, got dtype bool"),
        ([[1, 2], [3]], "different lengths"),
        ([[1, 13]], r"Token id 13 at batch 0, position 1 is outside the vocabulary \(0 to 12\)"),
        ([[1, 2], [-1, 3]], "Token id -1 at batch 1, position 0"),
        (np.zeros((1, 13), np.int32), "The sequence has 13 tokens; this model takes at most n_ctx=12"),
        ("text", "The input is text and this model has no tokenizer.*set_tokenizer"),
        (["a", "b"], "The input is text"),
        (None, "must be integers"),
    ],
    ids=str,
)
def test_wrong_tokens(model: HookedTransformer, tokens: Any, message: str) -> None:
    for run in (model, model.run_with_cache, model.run_with_hooks, model.input_to_embed):
        with pytest.raises(InputError, match=message):
            run(tokens)


def test_checks_that_survive_a_trace(model: HookedTransformer) -> None:
    with pytest.raises(InputError, match="n_ctx=12"):
        jax.jit(model)(np.zeros((1, 13), np.int32))
    with pytest.raises(InputError, match="must be integers"):
        jax.jit(model)(np.zeros((1, 3), np.float32))


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (
            np.zeros((2, 6, 15), np.float32),
            r"the residual stream \[batch, pos, 16\], floating point; got shape \(2, 6, 15\)",
        ),
        (np.zeros((6, 16), np.float32), r"got shape \(6, 16\)"),
        (np.zeros((2, 6, 16), np.int32), "dtype int32"),
        (TOKENS.tolist(), "start_at_layer= needs the residual stream.*got list"),
        ("text", "got str"),
        (np.zeros((1, 13, 16), np.float32), "n_ctx=12"),
    ],
    ids=str,
)
def test_wrong_residual_streams(model: HookedTransformer, residual: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model(residual, start_at_layer=1)


def test_layer_bounds(model: HookedTransformer) -> None:
    residual = jnp.zeros((2, 6, 16))
    for options, message in [
        ({"stop_at_layer": 3}, "stop_at_layer=3 is out of range: the model has 2 layers"),
        ({"stop_at_layer": -3}, "stop_at_layer=-3 is out of range"),
        ({"start_at_layer": 3}, "start_at_layer=3 is out of range"),
        ({"start_at_layer": 1, "stop_at_layer": 0}, "start_at_layer=1 comes after stop_at_layer=0"),
    ]:
        with pytest.raises(InputError, match=message):
            model(residual if "start_at_layer" in options else TOKENS, **options)


def test_losses_need_tokens(model: HookedTransformer) -> None:
    residual = jnp.zeros((2, 6, 16))
    with pytest.raises(InputError, match="pass tokens= as well"):
        model(residual, start_at_layer=1, return_type="loss")
    with pytest.raises(InputError, match=r"tokens has shape \(2, 5\); the residual stream has \(2, 6\)"):
        model(residual, start_at_layer=1, return_type="loss", tokens=TOKENS[:, :5])
    with pytest.raises(InputError, match="at least two tokens"):
        model(TOKENS[:, :1], return_type="loss")


def test_masks(model: HookedTransformer) -> None:
    with pytest.raises(InputError, match=r"attention_mask has shape \(2, 5\); the tokens have shape \(2, 6\)"):
        model(TOKENS, attention_mask=np.ones((2, 5)))
    close(model(TOKENS, attention_mask=np.ones((2, 6))), model(TOKENS))
    mask = np.array([0, 0, 1, 1, 1, 1])
    close(model(TOKENS[0], attention_mask=mask), model(TOKENS[:1], attention_mask=mask[None].astype(bool)))
    close(jax.jit(lambda m: model(TOKENS[:1], attention_mask=m))(mask[None]), model(TOKENS[:1], attention_mask=mask))


def test_input_to_embed(model: HookedTransformer) -> None:
    residual, tokens, shortformer, mask = model.input_to_embed(TOKENS)
    close(residual, np.asarray(model.W_E)[TOKENS] + np.asarray(model.W_pos)[:6])
    assert (tokens == TOKENS).all()
    assert shortformer is None
    assert mask is None
    given = np.array([[0, 1, 1, 1, 1, 1], [1] * 6])
    residual, _, _, mask = model.input_to_embed(TOKENS, attention_mask=given)
    assert (mask == given.astype(bool)).all()
    close(residual[0, 1], np.asarray(model.W_E)[TOKENS[0, 1]] + np.asarray(model.W_pos)[0])
    close(model(residual, start_at_layer=0, attention_mask=given), model(TOKENS, attention_mask=given))


def test_text_methods_need_a_tokenizer(model: HookedTransformer) -> None:
    for method in (model.to_tokens, model.to_str_tokens, model.to_single_token):
        with pytest.raises(TokenizerError, match="no tokenizer"):
            method("text")


def test_models_need_a_vocabulary() -> None:
    with pytest.raises(ConfigError, match="d_vocab is not set"):
        HookedTransformer(HookedTransformerConfig(d_model=8, n_heads=2, n_layers=1, n_ctx=4))
    with pytest.raises(ConfigError, match="from_pretrained"):
        HookedTransformer("gpt2")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def text_model() -> HookedTransformer:
    tokenizer = gpt2_like()
    like = build("gpt2", d_vocab=len(tokenizer))
    return HookedTransformer(like.cfg, tokenizer, params=like.params)


def test_text_equals_its_tokens(text_model: HookedTransformer) -> None:
    for text in ("the cat", ["the cat"]):
        close(text_model(text), text_model(text_model.to_tokens(text)))
    assert text_model("the cat", prepend_bos=False).shape[1] == text_model("the cat").shape[1] - 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_of_texts_equal_single_texts(text_model: HookedTransformer, side: Any) -> None:
    texts = ["the cat sat", "the"]
    batched = text_model(texts, padding_side=side)
    for row, text in zip(batched, texts, strict=True):
        single = text_model(text)[0]
        close(row[-len(single) :] if side == "left" else row[: len(single)], single)


def test_batch_loss_ignores_padding(text_model: HookedTransformer) -> None:
    texts = ["the cat sat", "the"]
    singles = [np.asarray(text_model(t, return_type="loss", loss_per_token=True))[0] for t in texts]
    for side in ("left", "right"):
        close(text_model(texts, return_type="loss", padding_side=side), np.concatenate(singles).mean())


def test_long_text_is_refused_unless_cut_on_purpose(text_model: HookedTransformer) -> None:
    text = "the cat sat " * 20
    with pytest.raises(InputError, match=r"n_ctx=12.*to_tokens"):
        text_model(text)
    with pytest.warns(UserWarning, match="longer than n_ctx=12"):
        assert text_model(text_model.to_tokens(text)).shape[1] == 12
