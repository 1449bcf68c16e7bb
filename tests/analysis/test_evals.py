"""Evaluations of the bundled model, the data sets they make, and singular vectors read in the vocabulary."""

from typing import Any

import numpy as np
import pytest
from variants import build

from tljax import HookedTransformer, utils
from tljax.analysis import evals
from tljax.analysis.svd_interpreter import SVDInterpreter
from tljax.errors import ConfigError, InputError, TokenizerError

FACTS = ["The Eiffel Tower is in the city of Paris.", "The Colosseum is in the city of Rome."] * 60


def test_sanity_check(tiny: HookedTransformer) -> None:
    loss = evals.sanity_check(tiny, "When John and Mary went to the store, John gave a drink to Mary.")
    assert float(loss) < 3


def test_induction_loss(tiny: HookedTransformer) -> None:
    loss = float(evals.induction_loss(tiny, subseq_len=20))
    assert loss < np.log(tiny.cfg.d_vocab) - 2.5
    assert loss == float(evals.induction_loss(tiny, subseq_len=20))
    without = float(evals.induction_loss(tiny, subseq_len=20, prepend_bos=False))
    assert without != loss
    tokens = np.tile(np.arange(300, 320), (2, 2))
    logits = np.asarray(tiny(tokens), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.mean([log_probs[b, p - 1, tokens[b, p]] for b in range(2) for p in range(22, 40)])
    assert float(evals.induction_loss(tiny, tokens=tokens)) == pytest.approx(expected, abs=1e-4)
    assert evals.induction_loss(build("gpt2")).shape == ()


def test_ioi(tiny: HookedTransformer) -> None:
    data = evals.IOIDataset(tiny.tokenizer, num_samples=24, symmetric=True, seed=1)
    assert len(data) == 24
    assert [sample.text for sample in data.samples] == [
        sample.text for sample in evals.IOIDataset(tiny.tokenizer, num_samples=24, symmetric=True, seed=1).samples
    ]
    first, second = data[0:2]
    assert tiny.to_string(first["IO"]) == tiny.to_string(second["S"])
    assert first["prompt"][0] == tiny.tokenizer.bos_token_id
    assert first["prompt"][-1] == first["IO"][0]
    result = evals.ioi_eval(tiny, data)
    assert result["Accuracy"] == 1
    assert result["Logit Difference"] > 5
    singly = evals.ioi_eval(tiny, data, batch_size=1)
    assert singly["Logit Difference"] == pytest.approx(result["Logit Difference"], abs=1e-4)
    assert evals.ioi_eval(tiny, num_samples=4)["Accuracy"] == 1


def test_ioi_reads_where_the_names_first_differ() -> None:
    model = build("gpt2")
    sample = {"prompt": np.array([1, 2, 3, 4, 5]), "IO": np.array([4, 5]), "S": np.array([4, 6, 7])}
    logits = np.asarray(model(sample["prompt"][None])[0, 3])
    assert evals.ioi_eval(model, [sample])["Logit Difference"] == pytest.approx(float(logits[5] - logits[6]), abs=1e-5)


def test_custom_ioi(tiny: HookedTransformer) -> None:
    data = evals.IOIDataset(
        tiny.tokenizer, ["[A] met [B]. [B] gave the [OBJECT] to [A]"], ["Alice", "Bob", "Tom"],
        {"OBJECT": ["ball", "book"]}, num_samples=9, prepend_bos=False, seed=0,
    )  # fmt: skip
    assert {sample.text.split(" to ")[1] for sample in data.samples} <= {"Alice", "Bob", "Tom"}
    assert all(sample.text.endswith(sample.IO) and "[" not in sample.text for sample in data.samples)
    assert data[0]["prompt"][0] != tiny.tokenizer.bos_token_id


def test_evaluate_on_texts(tiny: HookedTransformer) -> None:
    batches = evals.make_data_loader(FACTS, tiny.tokenizer, batch_size=2, max_length=32)
    assert all(batch["tokens"].shape == (2, 32) for batch in batches)
    every = evals.evaluate_on_dataset(tiny, batches)
    first = float(tiny(batches[0]["tokens"], return_type="loss"))
    assert evals.evaluate_on_dataset(tiny, batches, truncate=1) == pytest.approx(first, abs=1e-5)
    assert 0 < every < 4
    assert set(evals.evaluate(tiny, {"facts": FACTS}, batch_size=2)) == {"facts_loss"}


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda m: evals.evaluate(m), InputError, r"downloads nothing\. Pass texts by name, data="),
        (lambda m: evals.evaluate_on_dataset(m, []), InputError, "no batch to evaluate on"),
        (lambda m: evals.induction_loss(m, subseq_len=65), InputError, "subseq_len=65 tokens do not fit n_ctx=128"),
        (lambda m: evals.induction_loss(m, tokens=np.ones((1, 7), int)), InputError, r"got shape \(1, 7\)"),
        (lambda m: evals.make_data_loader(["a"], m.tokenizer), InputError, "1 rows of 1024 tokens, less than"),
        (lambda m: evals.IOIDataset(m.tokenizer, names=["A"]), InputError, "needs two names"),
        (lambda m: evals.IOIDataset(m.tokenizer, ["[A] saw [B]"]), InputError, "ends in \\[A\\]"),
        (lambda m: evals.ioi_eval(build("gpt2")), TokenizerError, "no tokenizer: pass tokenizer="),
        (lambda m: evals.ioi_eval(m, []), InputError, "has no samples"),
        (
            lambda m: evals.ioi_eval(m, [{"prompt": np.array([1, 2]), "IO": np.array([3]), "S": np.array([4])}]),
            InputError, r"Prompt 0 does not end in the tokens of its IO, \[3\]",
        ),
        (
            lambda m: evals.ioi_eval(m, [{"prompt": np.array([1, 3]), "IO": np.array([3]), "S": np.array([3, 4])}]),
            InputError, r"begin with the same tokens \[3\]",
        ),
    ],
)  # fmt: skip
def test_refusals(tiny: HookedTransformer, act: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act(tiny)


def test_singular_vectors_have_a_fixed_sign(tiny: HookedTransformer) -> None:
    vectors = SVDInterpreter(tiny).get_singular_vectors("OV", 2, num_vectors=4, head_index=1)
    assert vectors.shape == (tiny.cfg.d_vocab, 1, 4)
    largest = np.take_along_axis(np.asarray(vectors), np.abs(vectors).argmax(axis=0)[None], axis=0)
    assert (largest > 0).all()
    first = np.linalg.svd(np.asarray(tiny.OV[2, 1].AB))[2][0] @ np.asarray(tiny.W_U)
    np.testing.assert_allclose(np.abs(vectors[:, 0, 0]), np.abs(first), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ov", 0), "one of 'OV', 'w_in', 'w_out'; got 'ov'"),
        (("w_ins", 0), "Did you mean 'w_in'"),
        (("OV", 0), "'OV' is a matrix of one head: give head_index"),
        (("OV", 0, 3, 4), "head_index=4 is out of range: 0 to 3"),
        (("w_in", -1), "layer_index=-1 is out of range: 0 to 3"),
        (("OV", 0, 17, 0), "num_vectors=17: this matrix has 1 to 16"),
    ],
)
def test_vectors_that_are_not_there(tiny: HookedTransformer, arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SVDInterpreter(tiny).get_singular_vectors(*arguments)


def test_models_without_such_matrices() -> None:
    with pytest.raises(ConfigError, match="attention-only"):
        SVDInterpreter(build("attn_only")).get_singular_vectors("w_in", 0)
    experts = build("llama", num_experts=4, experts_per_token=2, gated_mlp=True, act_fn="silu")
    with pytest.raises(ConfigError, match="mixture of experts"):
        SVDInterpreter(experts).get_singular_vectors("w_out", 0)
    with pytest.raises(ConfigError, match="no OV matrix"):
        SVDInterpreter(build("latent")).get_singular_vectors("OV", 0, 2, 0)


def test_reads_the_gain_of_an_offset_norm() -> None:
    model = build("sandwich")
    got = SVDInterpreter(model).get_singular_vectors("w_in", 1, num_vectors=1)
    matrix = np.asarray(model.W_in[1]).T * (1 + np.asarray(model.params["blocks"][1]["ln2"]["w"]))
    expected = np.linalg.svd(matrix)[2][0] @ np.asarray(model.W_U)
    np.testing.assert_allclose(np.abs(got[:, 0, 0]), np.abs(expected), atol=1e-4)
    assert utils.get_corner(model.OV).shape == (2, 3, 3, 3)
