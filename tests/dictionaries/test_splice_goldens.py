"""Splices against SAELens's: logits, values, ablations, gradients, excluded tokens; where the goldens lie beside us."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tljax import HookedTransformer, Zero
from tljax.dictionaries import Dictionary
from tljax.errors import UnknownHookError
from tljax.model.splice_sites import UnfittedWarning

SHARED = Path(__file__).parents[3] / "shared" / "goldens" / "dictionaries"
GOLDENS = SHARED / "saelens" / "splice"
ALONE = ("standard_resid_pre", "jumprelu_mlp_out", "topk_hook_z", "transcoder_mlp", "skip_transcoder_mlp")
MODES = {"no_error": "drop", "error": "keep"}
pytestmark = pytest.mark.skipif(not GOLDENS.exists(), reason="no goldens beside this checkout")


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return HookedTransformer.from_pretrained_no_processing(SHARED / "base_model")


def golden(case: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    facts = json.loads((GOLDENS / "cases.json").read_text())[case]
    values = load_file(GOLDENS / case / "io.safetensors")
    return facts, values | {name: values[kept] for name, kept in facts.get("bit_equal", {}).items()}


def dictionary(case: str) -> Dictionary:
    found = Dictionary.load(GOLDENS / case / "sae")
    assert isinstance(found, Dictionary)
    return found


def assert_equal(got: Any, want: np.ndarray) -> None:
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def values(golden: dict[str, np.ndarray], prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    yield from ((name.removeprefix(prefix), value) for name, value in golden.items() if name.startswith(prefix))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ALONE)
def test_one_dictionary(model: HookedTransformer, case: str, mode: Any) -> None:
    facts, want = golden(case)
    tokens, site = want["tokens"], facts["hook_name_out"] or facts["hook_name"]
    spliced = model.with_dictionaries([dictionary(case)], error=MODES[mode], skip=False)
    logits, cache = spliced.run_with_cache(tokens)
    assert_equal(logits, want[f"{mode}.logits"])
    for point, value in values(want, f"{mode}.hook_sae_"):
        assert_equal(cache[f"{site}.hook_sae_{point}"], value)

    feature, pos = facts["ablated_latent"], facts["ablated_position"]
    features = f"{site}.hook_sae_acts_post"
    for name, zero in {"all": Zero(feature=feature), "pos": Zero(batch=0, pos=pos, feature=feature)}.items():
        assert_equal(spliced.run_with_hooks(tokens, fwd_hooks=[(features, zero)]), want[f"{mode}.ablate_{name}.logits"])

    answer, wrong = facts["logit_diff_tokens"]
    names = {"hook_sae_acts_post": features, "hook_sae_input": f"{site}.hook_sae_input"}
    names["blocks.0.hook_resid_pre"] = "blocks.0.hook_resid_pre"
    _, _, grads = spliced.run_with_grads(tokens, lambda out: out[0, -1, answer] - out[0, -1, wrong], [*names.values()])
    for point, value in values(want, f"{mode}.grad."):
        assert_equal(grads[names[point]], value)

    excluding = model.with_dictionaries([dictionary(case)], error=MODES[mode], skip=False, exclude_tokens=[0])
    logits, cache = excluding.run_with_cache(tokens)
    for point, value in values(want, f"{mode}.exclude_token_0."):
        assert_equal(logits if point == "logits" else cache[f"{site}.{point}"], value)


@pytest.mark.parametrize("mode", MODES)
def test_three_together(model: HookedTransformer, mode: str) -> None:
    facts, want = golden("three_together")
    saes = [dictionary(case) for case in facts["saes"]]
    logits, cache = model.run_with_cache_with_saes(want["tokens"], saes=saes, use_error_term=mode == "error")
    for point, value in values(want, f"{mode}."):
        assert_equal(logits if point == "logits" else cache[point], value)


@pytest.mark.parametrize("mode", MODES)
def test_in_a_processed_model(mode: str) -> None:
    """The dictionary is of raw weights: SAELens says nothing, we warn, and the numbers are the same."""
    facts, want = golden("processed_weights")
    model = HookedTransformer.from_pretrained(SHARED / "base_model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnfittedWarning)
        spliced = model.with_dictionaries([dictionary(facts["sae"])], error=MODES[mode])
    logits, cache = spliced.run_with_cache(want["tokens"])
    for point, value in values(want, f"{mode}."):
        assert_equal(logits if point == "logits" else cache[f"blocks.1.hook_resid_pre.{point}"], value)


def test_a_missing_site_is_an_error(model: HookedTransformer) -> None:
    facts = json.loads((GOLDENS / "cases.json").read_text())["missing_site"]
    with pytest.raises(UnknownHookError, match="The model has 3 layers"):
        model.with_dictionaries({facts["hook_name"]: dictionary("standard_resid_pre")})
