"""``tljax.utils``: what TransformerLens's users import, and where the rest is."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from variants import build

import tljax
from tljax import FactoredMatrix, HookedTransformer, utils
from tljax.errors import InputError, TokenizerError

X = np.arange(24).reshape(2, 3, 4)


def test_everything_listed_is_there() -> None:
    assert all(getattr(utils, name) is not None for name in utils.__all__ if name != "USE_DEFAULT_VALUE")
    assert utils.lm_cross_entropy_loss is tljax.lm_cross_entropy_loss
    assert utils.get_act_name("k", 6, "a") == "blocks.6.attn.hook_k"
    assert utils.sample_logits is tljax.sample_logits


@pytest.mark.parametrize("name", ["get_device", "LocallyOverridenDefaults", "get_dataset"])
def test_what_is_elsewhere_is_named(name: str) -> None:
    with pytest.raises(AttributeError, match=f"tljax.utils has no {name}: "):
        getattr(utils, name)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = utils.nonsense


@pytest.mark.parametrize(
    ("given", "mode", "expected"),
    [
        (1, "int", X[:, 1]), ((2,), "slice", X[:, :2]), ((1, 3), "slice", X[:, 1:3]), ((0, 3, 2), "slice", X[:, 0:3:2]),
        (slice(1, None), "slice", X[:, 1:]), ([0, 2], "array", X[:, [0, 2]]), (jnp.array([2]), "array", X[:, [2]]),
        (np.array([True, False, True]), "array", X[:, [0, 2]]), (None, "identity", X),
    ],
)  # fmt: skip
def test_slice(given: Any, mode: str, expected: np.ndarray) -> None:
    own = utils.Slice(given)
    assert own.mode == mode
    for array in (X, jnp.asarray(X)):
        np.testing.assert_array_equal(own.apply(array, dim=1), expected)
        np.testing.assert_array_equal(own.apply(array, dim=-2), expected)
    np.testing.assert_array_equal(own.indices(3), np.atleast_1d(np.arange(3)[own.slice]))
    assert utils.Slice.unwrap(own) is own


def test_slice_unwrap_keeps_the_axis_and_refuses_nonsense() -> None:
    assert utils.Slice.unwrap(2).apply(X, dim=1).shape == (2, 1, 4)
    assert repr(utils.Slice((1, 3))) == "Slice: slice(1, 3, None) Mode: slice"
    assert utils.Slice(4).indices().tolist() == [4]
    with pytest.raises(InputError, match=r"A slice is a number.*got 'a'"):
        utils.Slice("a")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="indices needs max_ctx"):
        utils.Slice((1, 3)).indices()


def test_arrays() -> None:
    assert utils.to_numpy(jnp.ones(2, "bfloat16")).dtype == np.float32
    assert utils.to_numpy([1, 2]).tolist() == [1, 2]
    assert utils.get_corner(X, 2).tolist() == X[:2, :2, :2].tolist()
    assert utils.remove_batch_dim(X[:1]).shape == (3, 4)
    assert utils.remove_batch_dim(X).shape == (2, 3, 4)
    assert utils.transpose(X).shape == (2, 4, 3)
    f = FactoredMatrix(jnp.ones((5, 2)), jnp.ones((2, 4)))
    assert utils.transpose(f).shape == (4, 5)
    assert utils.get_matrix_corner(f, 2).tolist() == [[2, 2], [2, 2]]
    assert utils.is_lower_triangular(np.tril(np.ones((3, 3))))
    assert not utils.is_lower_triangular(np.ones((3, 3)))
    assert not utils.is_square(X)
    np.testing.assert_array_equal(utils.get_cumsum_along_dim(X, -1), X.cumsum(-1))
    np.testing.assert_array_equal(utils.get_cumsum_along_dim(X, 1, reverse=True), X[:, ::-1].cumsum(1)[:, ::-1])
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert utils.get_offset_position_ids(1, mask).tolist() == [[0, 0, 1], [1, 2, 3]]
    assert utils.repeat_along_head_dimension(X, 5).shape == (2, 3, 5, 4)
    assert utils.filter_dict_by_prefix({"a.b": 1, "ab.c": 2}, "a") == {"b": 1}


def test_activations() -> None:
    x = jnp.array([-1.0, 0.5, 2.0])
    np.testing.assert_allclose(utils.solu(x), x * np.exp(x) / np.exp(x).sum(), rtol=1e-5)
    np.testing.assert_allclose(utils.gelu_new(x), [-0.158808, 0.345714, 1.954598], atol=1e-5)
    np.testing.assert_allclose(utils.apply_softcap(x, 2.0), 2 * np.tanh(x / 2), rtol=1e-5)
    assert utils.apply_softcap(x, utils.SOFTCAP_DISABLED) is x
    assert not utils.softcap_enabled(utils.SOFTCAP_DISABLED)


def test_tokenize_and_concatenate(tiny: HookedTransformer) -> None:
    hf = tiny.tokenizer
    texts = ["John gave Mary a book.", "The red car is near the park."]
    ids = [hf(text, add_special_tokens=False).input_ids for text in texts]
    joined = [*ids[0], hf.eos_token_id, *ids[1]]
    rows = utils.tokenize_and_concatenate(texts, hf, max_length=5)["tokens"]
    assert rows.shape == (len(joined) // 4, 5)
    assert (rows[:, 0] == hf.bos_token_id).all()
    assert rows[:, 1:].reshape(-1).tolist() == joined[: rows.shape[0] * 4]
    as_rows = utils.tokenize_and_concatenate([{"text": text} for text in texts], hf, max_length=5)["tokens"]
    np.testing.assert_array_equal(as_rows, rows)
    plain = utils.tokenize_and_concatenate({"body": texts}, hf, max_length=4, column_name="body", add_bos_token=False)
    assert plain["tokens"].reshape(-1).tolist() == joined[: len(joined) // 4 * 4]
    short = utils.tokenize_and_concatenate(texts[:1], hf, max_length=20)["tokens"]
    assert short.shape == (1, 20)
    assert short[0, 1 + len(ids[0]) :].tolist() == [hf.pad_token_id] * (19 - len(ids[0]))


def test_bos(tiny: HookedTransformer) -> None:
    hf, tokens = tiny.tokenizer, tiny.to_tokens(["John", "John gave"], padding_side="left")
    assert utils.get_input_with_manually_prepended_bos("<b>", ["a", "b"]) == ["<b>a", "<b>b"]
    assert utils.get_input_with_manually_prepended_bos(None, "a") == "a"
    assert utils.get_tokens_with_bos_removed(hf, tokens, "right").shape == (2, 2)
    removed = utils.get_tokens_with_bos_removed(hf, tokens, "left")
    assert removed.tolist() == [[hf.pad_token_id, int(tokens[0, 2])], tokens[1, 1:].tolist()]
    assert utils.get_attention_mask(hf, tokens, True, "left").tolist() == [[0, 1, 1], [1, 1, 1]]
    assert utils.get_tokenizer_with_bos(hf).encode("John")[0] == hf.bos_token_id
    with pytest.raises(InputError, match="does not start with BOS"):
        utils.get_tokens_with_bos_removed(hf, tokens[:, 2:], "left")


def test_logits_to_df(tiny: HookedTransformer) -> None:
    logits = tiny("The Eiffel Tower is in the city of")[0, -1]
    table = utils.logits_to_df(logits, tiny.tokenizer, top_k=3)
    assert list(table.columns) == ["token_index", "token_string", "logit", "log_prob", "probability"]
    assert table.token_string[0] == " Paris"
    assert table.logit[0] == pytest.approx(float(logits.max()))
    assert utils.logits_to_df(logits).probability.sum() == pytest.approx(1, abs=1e-4)
    with pytest.raises(InputError, match="one position"):
        utils.logits_to_df(logits[None])


def test_prompt(tiny: HookedTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    assert utils.test_prompt("When John and Mary went to the store, John gave a drink to", "Mary", tiny) is None
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "Ranks of the answer tokens: [(' Mary', 0)]"
    assert printed[1] == "Tokenized answer: [' Mary']"
    assert sum(line.startswith("Top ") for line in printed) == 10
    utils.test_prompt("John", ["Mary", " and"], tiny, print_details=False)
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (
            lambda m: utils.test_prompt("a", "b", build("gpt2")),
            TokenizerError,
            r"needs text.*set_tokenizer",
        ),
        (lambda m: utils.test_prompt("a", [], m), InputError, "needs an answer"),
        (lambda m: utils.test_prompt("a", "", m), InputError, "needs an answer"),
        (lambda m: utils.tokenize_and_concatenate([], m.tokenizer), InputError, "no text to tokenize"),
        (lambda m: utils.tokenize_and_concatenate("a", m.tokenizer), InputError, r"list of documents: \[text\]"),
        (
            lambda m: utils.tokenize_and_concatenate([{"x": "a"}], m.tokenizer),
            InputError,
            r"only \['x'\]: pass col",
        ),
        (lambda m: utils.tokenize_and_concatenate(["a"], m.tokenizer, max_length=1), InputError, "no room for text"),
        (lambda m: utils.repeat_along_head_dimension(X[0], 2), InputError, r"got shape \(3, 4\)"),
    ],
)
def test_refusals(tiny: HookedTransformer, act: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act(tiny)
