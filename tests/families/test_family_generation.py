"""Greedy text against transformers, and cached, steered logits against full runs."""

from typing import Any

import numpy as np
import pytest
from family_case import LENGTH, FamilyCase

import tljax

N_PROMPT = 6
PROMPTS = np.random.default_rng(0).integers(2, 40, (2, N_PROMPT))
MASK = np.array([[1] * 6, [0, 0, 1, 1, 1, 1]])
STEERED_LAYER = 1


@pytest.fixture
def options() -> dict[str, Any]:
    return {
        "do_sample": False, "eos_token_id": 1, "verbose": False, "attention_mask": MASK, "output_logits": True,
    }  # fmt: skip


def steering(strength: float) -> list[Any]:
    """For one program whatever the strength; at zero the model is as it is."""
    return [(f"blocks.{STEERED_LAYER}.hook_resid_post", tljax.Add(strength, pos="new"))]


def test_greedy_text_is_that_of_transformers(case: FamilyCase, options: dict[str, Any]) -> None:
    """Next to a prompt padded on the left."""
    import torch

    n_new = LENGTH - N_PROMPT
    with torch.no_grad():
        theirs = case.hf.generate(
            torch.tensor(PROMPTS), attention_mask=torch.tensor(MASK), max_new_tokens=n_new, do_sample=False,
            pad_token_id=1, eos_token_id=1,
        )  # fmt: skip
    ours = case.raw.generate(PROMPTS, n_new, fwd_hooks=steering(0.0), **options)
    np.testing.assert_array_equal(ours.sequences, theirs.numpy())


@pytest.mark.one_variant_a_family
def test_cached_logits_are_those_of_a_full_run(case: FamilyCase, options: dict[str, Any]) -> None:
    """Steered while it writes; the full run is done in two parts with the steering between them."""
    steered = case.raw.generate(PROMPTS, LENGTH - N_PROMPT, fwd_hooks=steering(0.5), **options)
    written = steered.sequences.shape[1]
    tokens, mask = case.rows(), np.ones((case.n_rows, LENGTH), bool)
    tokens[:2, :written] = steered.sequences
    mask[:2, :N_PROMPT] = MASK
    model, cut = case.switched(case.points), case.points.index(f"blocks.{STEERED_LAYER}.hook_resid_post") + 1
    residual, _ = model.run_with_cache(
        tokens, attention_mask=mask, stop_at_layer=STEERED_LAYER + 1, names_filter=case.points[:cut]
    )
    residual = np.array(residual)
    residual[:2, N_PROMPT:] += 0.5
    logits, _ = model.run_with_cache(
        residual, attention_mask=mask, start_at_layer=STEERED_LAYER + 1, names_filter=case.points[cut:]
    )
    expected = np.asarray(logits)[:2, N_PROMPT - 1 : written - 1]
    np.testing.assert_allclose(np.stack(steered.logits, axis=1), expected, atol=1e-4)
