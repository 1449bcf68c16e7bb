"""A real Llama checkpoint: its reference logits and the text it writes. Every family: ``tests/families``."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import HookedTransformer

torch = pytest.importorskip("torch")

TOLERANCE = 5e-5
STORIES = Path(__file__).parents[3] / "shared" / "data" / "stories260K"


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
