"""Logits and log-probabilities against transformers' PyTorch, in float32, for every family and its variants."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import VARIANTS, make_hf_model

from tljax import HookedTransformer

torch = pytest.importorskip("torch")

TOLERANCE = 5e-5
STORIES = Path(__file__).parents[3] / "shared" / "data" / "stories260K"
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 24))


def hf_logits(model: "torch.nn.Module", tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, tmp_path: Path) -> None:
    expected = hf_logits(make_hf_model(variant, tmp_path), TOKENS)
    tokens = jnp.asarray(TOKENS, jnp.int32)

    raw = HookedTransformer.from_pretrained_no_processing(tmp_path)
    np.testing.assert_allclose(raw(tokens), expected, atol=TOLERANCE, rtol=0)

    processed = HookedTransformer.from_pretrained(tmp_path)
    folds = raw.cfg.normalization_type == "RMS" or not raw.cfg.gated_mlp  # a gate has no bias for a layer norm's
    assert processed.cfg.normalization_type == raw.cfg.normalization_type + ("Pre" if folds else "")
    log_probs = torch.log_softmax(torch.tensor(expected), -1).numpy()
    np.testing.assert_allclose(jax.nn.log_softmax(processed(tokens)), log_probs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_model_gives_transformers_the_same_logits(variant: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    original = make_hf_model(variant, tmp_path / "original")
    model = HookedTransformer.from_pretrained_no_processing(tmp_path / "original")
    model.save_hf(tmp_path / "exported")

    back, report = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_array_equal(hf_logits(back, TOKENS), hf_logits(original, TOKENS))


@pytest.mark.skipif(not STORIES.exists(), reason="the real Llama checkpoint is not here")
@pytest.mark.parametrize("processed", [False, True])
def test_a_real_llama_reproduces_its_reference_logits(processed: bool) -> None:
    load = HookedTransformer.from_pretrained if processed else HookedTransformer.from_pretrained_no_processing
    model = load(STORIES)
    with np.load(STORIES / "reference_hf_fp32.npz") as reference:
        tokens, expected = reference["input_ids"], reference["logits"]
    logits = model(jnp.asarray(tokens, jnp.int32))
    if processed:
        logits, expected = jax.nn.log_softmax(logits), torch.log_softmax(torch.tensor(expected), -1).numpy()
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)
    assert model.tokenizer is not None
    assert model.tokenizer.decode(tokens[0]).startswith("<s> Once upon a time")


@pytest.mark.skipif(not STORIES.is_dir(), reason="the real Llama checkpoint is not on this machine")
def test_greedy_text_of_the_real_llama_is_english() -> None:
    model = HookedTransformer.from_pretrained(STORIES)
    prompt = model.to_tokens("Once upon a time")
    buffer = np.zeros((1, 40), np.int32)  # one length, one compilation: causal attention ignores what comes later
    buffer[:, : prompt.shape[1]] = prompt
    for pos in range(prompt.shape[1], buffer.shape[1]):
        buffer[0, pos] = int(model(buffer)[0, pos - 1].argmax())
    text = model.to_string(buffer[0])
    assert "there was a little girl named Lily. She loved to play" in text
