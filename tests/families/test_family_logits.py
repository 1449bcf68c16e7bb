"""Logits against transformers' PyTorch: float32 and bfloat16, raw and processed, padded and not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_case import PROMPT, SHORT, TOKENS, FamilyCase, hf_logits, largest, log_softmax

from tljax import HookedTransformer
from tljax.modules.norm import stored_dtype
from tljax.weights.steps import STEPS, why_not

ASKED_FOR = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
TOLERANCE = 5e-5
BFLOAT16_TOLERANCE = 2e-2


def test_raw_logits(case: FamilyCase) -> None:
    logits, _ = case.run
    case.figures["float32"] = largest(logits, case.expected)
    np.testing.assert_allclose(logits, case.expected, atol=TOLERANCE, rtol=0)


def test_processed_log_probabilities(case: FamilyCase) -> None:
    processed = HookedTransformer.from_pretrained(case.directory)
    exact = [step for step in STEPS if step in ASKED_FOR and step not in why_not(case.raw.cfg)]
    assert list(processed.cfg.weight_processing) == exact
    got, expected = log_softmax(processed(TOKENS)), log_softmax(case.expected)
    case.figures |= {"processed": largest(got, expected), "steps": exact}
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.one_variant_a_family
def test_bfloat16(case: FamilyCase) -> None:
    """Both in bfloat16: root mean square difference over that of the logits.

    Sharp random attention multiplies rounding: where transformers itself is further than the tolerance from float32,
    neither the difference nor tljax's own error may be more than twice that. A mixture of experts is judged by its
    median token: rounding now and then sends one to another expert, in either library.
    """
    choose = np.mean if case.raw.cfg.num_experts is None else np.median

    def relative(got: Any, expected: np.ndarray) -> float:
        squares = ((np.asarray(got).astype(np.float64) - expected) ** 2).mean(axis=-1)
        return float(np.sqrt(choose(squares) / (expected.astype(np.float64) ** 2).mean()))

    cast = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(np.asarray(leaf).astype(stored_dtype(path[-1].key, jnp.dtype("bfloat16")))),
        case.raw.params,
    )
    ours = case.raw.replace(params=cast, cfg=case.raw.cfg.replace(dtype="bfloat16"))(TOKENS)
    assert ours.dtype == "bfloat16"
    theirs = hf_logits(bfloat16_model(case), TOKENS)
    allowed = max(BFLOAT16_TOLERANCE, 2 * relative(theirs, case.expected))
    case.figures["bfloat16"] = relative(ours, theirs)
    case.figures["bfloat16_to_float32"] = [relative(ours, case.expected), relative(theirs, case.expected)]
    assert max(case.figures["bfloat16"], relative(ours, case.expected)) <= allowed


def bfloat16_model(case: FamilyCase) -> Any:
    """transformers' model of the same checkpoint; grouped products of experts refuse matrices this narrow."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(case.directory, dtype=torch.bfloat16)
    if case.raw.cfg.num_experts is not None:
        model.set_experts_implementation("eager")
    return model


@pytest.mark.one_variant_a_family
def test_padded_prompts_equal_single_ones(case: FamilyCase) -> None:
    """On either side, next to a prompt of full length."""
    logits, _ = case.hooked
    alone = hf_logits(case.hf, SHORT[None])[0]
    np.testing.assert_allclose(logits[-2, -len(SHORT) :], alone, atol=TOLERANCE, rtol=0, err_msg="left")
    np.testing.assert_allclose(logits[-1, : len(SHORT)], alone, atol=TOLERANCE, rtol=0, err_msg="right")
    np.testing.assert_allclose(logits[-3], hf_logits(case.hf, PROMPT[None])[0], atol=TOLERANCE, rtol=0)
