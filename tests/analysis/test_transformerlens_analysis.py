"""FactoredMatrix, circuits, detectors, singular vectors and utilities against TransformerLens 3.9, from golden files.

``tests/golden/make_analysis.py`` made the results and says what they are.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from words import word_tokenizer

from tljax import FactoredMatrix, HookedTransformer, utils
from tljax.analysis.head_detector import PATTERNS, PatternValuesWarning, detect_head
from tljax.analysis.svd_interpreter import SVDInterpreter
from tljax.config import HookedTransformerConfig

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-4
CASES = ("gpt2", "llama", "softcaps")
STATES = ("plain", "processed")


@functools.cache
def read() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with safe_open(GOLDEN / "analysis_transformerlens.safetensors", framework="numpy") as file:
        return json.loads(file.metadata()["record"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


RECORD = read()[0]


def expected(case: str, state: str, prefix: str = "") -> dict[str, np.ndarray]:
    start = f"{case}/{state}/{prefix}"
    return {key.removeprefix(start): value for key, value in read()[1].items() if key.startswith(start)}


@functools.cache
def model_of(case: str, state: str = "plain") -> HookedTransformer:
    with safe_open(GOLDEN / f"transformerlens_{case}.safetensors", framework="numpy") as file:
        record = json.loads(file.metadata()["record"])
        stored = {name: record["aliases"].get(f"params/{name}", f"params/{name}") for name in record["params"]}
        params: dict[str, Any] = {"blocks": tuple({} for _ in range(record["config"]["n_layers"]))}
        for name, key in stored.items():
            value, (*path, leaf) = file.get_tensor(key), name.split(".")
            leaf, node = leaf.lstrip("_"), params
            for part in path:
                node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
            node[leaf] = jnp.asarray(np.swapaxes(value, 0, 1) if leaf in ("W_Q", "W_K", "W_V") else value)
    model = HookedTransformer(HookedTransformerConfig.from_dict(record["config"]), word_tokenizer(), params)
    return model if state == "plain" else model.process_weights()


def assert_close(got: Any, wanted: np.ndarray, name: str) -> None:
    got = np.asarray(got.AB if isinstance(got, FactoredMatrix) else got)
    assert got.shape == wanted.shape, name
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE, rtol=0, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_factored_matrix(case: str) -> None:
    wanted = expected(case, "plain")
    model = model_of(case)
    QK, OV = model.QK, model.OV
    stream, even = jnp.asarray(wanted["stream"]), OV.make_even()
    got = {
        "QK.AB": QK.AB, "OV.AB": OV.AB, "QK.S": QK.S, "OV.S": OV.S, "OV.norm": OV.norm(), "QK.T": QK.T, "OV.BA": OV.BA,
        "OV.trace": OV.eigenvalues.sum(-1).real, "OV.largest": jnp.abs(OV.eigenvalues).max(-1),
        "QK@OV": QK @ OV, "stream@OV": stream @ OV, "OV@stream": OV @ stream[0], "stream[0]@OV": stream[0] @ OV,
        "OV*2": OV * 2, "OV[1]": OV[1], "OV[:, 2]": OV[:, 2], "OV[1, 2, 3]": OV[1, 2, 3],
        "OV[0, 1, 2:5, 4]": OV[0, 1, 2:5, 4], "unsqueeze": OV.unsqueeze(1), "corner": OV.get_corner(),
        "even.left": jnp.swapaxes(even.A, -1, -2) @ even.A, "even.AB": even,
        "collapse_l": jnp.linalg.norm(OV.collapse_l(), axis=-1),
        "collapse_r": jnp.linalg.norm(OV.collapse_r(), axis=-2),
        "U@V": OV.U @ jnp.swapaxes(OV.V, -1, -2),
        "paired": utils.composition_scores(OV, QK, broadcast_dims=False),
    }  # fmt: skip
    for name, value in got.items():
        assert_close(value, wanted[name], name)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("case", CASES)
def test_composition_scores_and_accumulated_biases(case: str, state: str) -> None:
    model, wanted = model_of(case, state), expected(case, state)
    for mode in "QKV":
        scores = model.all_composition_scores(mode)
        assert_close(scores, wanted[f"composition.{mode}"], mode)
        assert float(jnp.abs(scores).max()) > 0.1
    biases = expected(case, state, "bias.")
    assert len(biases) == 10
    for name, value in biases.items():
        layer, mlp_input, mlp = map(int, name.split("."))
        assert_close(model.accumulated_bias(layer, bool(mlp_input), bool(mlp)), value, name)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("case", CASES)
def test_singular_vectors_up_to_sign(case: str, state: str) -> None:
    wanted = expected(case, state, "svd.")
    for kind, layer, head in RECORD["svd"]:
        value = wanted[f"{kind}.{layer}.{head}"]
        got = SVDInterpreter(model_of(case, state)).get_singular_vectors(kind, layer, value.shape[2], head)
        assert got.shape == value.shape
        flipped = np.sign((np.asarray(got) * value).sum(axis=0, keepdims=True))
        assert_close(got * flipped, value, kind)


@pytest.mark.parametrize("measure", ["mul", "abs"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("case", CASES)
def test_detected_heads(case: str, pattern: str, measure: str) -> None:
    wanted = expected(case, "plain", f"detect.{pattern}.{measure}.")
    assert len(wanted) == 4
    for name, value in wanted.items():
        bos, current = (flag == "1" for flag in name.split("."))
        got = detect_head(
            model_of(case), RECORD["sequences"][0], pattern,
            exclude_bos=bos, exclude_current_token=current, error_measure=measure,
        )  # fmt: skip
        assert_close(got, value, name)


@pytest.mark.parametrize("case", CASES)
def test_detection_in_lists_in_some_heads_and_of_shares(case: str) -> None:
    model, sequences, wanted = model_of(case), RECORD["sequences"], expected(case, "plain", "detect.")
    assert_close(detect_head(model, sequences, "induction_head"), wanted["list"], "list")
    heads = [(layer, head) for layer, head in RECORD["heads"]]
    assert_close(detect_head(model, sequences[0], "previous_token_head", heads=heads), wanted["heads"], "heads")
    shares = np.tril(np.ones((8, 8)))
    shares /= shares.sum(axis=-1, keepdims=True)
    assert_close(detect_head(model, sequences[0], shares, error_measure="abs"), wanted["shares"], "shares")
    with pytest.warns(PatternValuesWarning, match="values other than 0 and 1"):
        assert_close(detect_head(model, sequences[0], shares), wanted["shares.mul"], "shares, mul")


@pytest.mark.parametrize("case", CASES)
def test_loss_and_accuracy(case: str) -> None:
    wanted = expected(case, "plain")
    tokens, mask, logits = (jnp.asarray(wanted[name]) for name in ("tokens", "mask", "logits"))
    got = {
        "loss": utils.lm_cross_entropy_loss(logits, tokens),
        "loss.masked": utils.lm_cross_entropy_loss(logits, tokens, mask),
        "loss.each": utils.lm_cross_entropy_loss(logits, tokens, mask, per_token=True),
        "accuracy": utils.lm_accuracy(logits, tokens),
        "accuracy.each": utils.lm_accuracy(logits, tokens, per_token=True),
    }
    for name, value in got.items():
        assert_close(value, wanted[name], name)


@pytest.mark.parametrize("name", RECORD["prompts"])
@pytest.mark.parametrize("case", CASES)
def test_prompts_print_what_transformerlens_prints(case: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompt, answer, options = RECORD["prompts"][name]
    utils.test_prompt(prompt, answer, model_of(case), **options)
    number = re.compile(r" *-?\d+\.\d+")
    got, wanted = capsys.readouterr().out, RECORD["printed"][case][name]
    assert number.sub(" #", got) == number.sub(" #", wanted)
    np.testing.assert_allclose(*([float(n) for n in number.findall(text)] for text in (got, wanted)), atol=0.0101)
