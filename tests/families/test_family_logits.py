"""Logits against transformers' PyTorch: float32 and bfloat16, raw and processed, padded and not."""

from pathlib import Path

import numpy as np
import pytest
from family_case import PROMPT, SHORT, TOKENS, FamilyCase, hf_logits, largest, log_softmax
from hf_models import make_hf_model

from tljax import HookedTransformer
from tljax.weights.steps import STEPS, why_not

ASKED_FOR = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
TOLERANCE = 5e-5
BFLOAT16_TOLERANCE = 2e-2


def test_raw_logits(case: FamilyCase) -> None:
    logits, _ = case.run
    case.figures["float32"] = largest(logits, case.expected)
    np.testing.assert_allclose(logits, case.expected, atol=TOLERANCE, rtol=0)


@pytest.mark.one_variant_a_family
def test_attention_by_blocks(case: FamilyCase) -> None:
    """The run with every point makes the whole matrix; by blocks of five queries the residual stream is the same."""
    _, cache = case.run
    cfg = case.raw.cfg.replace(
        attention_path="blockwise", attention_block=5 * case.raw.cfg.n_heads // case.raw.cfg.kv_heads
    )
    stream = case.raw.replace(cfg=cfg)(cache["resid_pre", 0], start_at_layer=0, stop_at_layer=cfg.n_layers)
    whole = np.asarray(cache["resid_post", cfg.n_layers - 1])
    np.testing.assert_allclose(stream, whole, rtol=0, atol=1e-5 * np.abs(whole).max())  # of its largest entry


def test_processed_log_probabilities(case: FamilyCase) -> None:
    processed = HookedTransformer.from_pretrained(case.directory)
    exact = [step for step in STEPS if step in ASKED_FOR and step not in why_not(case.raw.cfg)]
    assert list(processed.cfg.weight_processing) == exact
    got, expected = log_softmax(processed(TOKENS)), log_softmax(case.expected)
    case.figures |= {"processed": largest(got, expected), "steps": exact}
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)


def test_bfloat16(case: FamilyCase, tmp_path: Path) -> None:
    """Root mean square difference over that of the logits, to transformers in bfloat16 and in float32.

    The parameters are a third as large as elsewhere, where sharp random attention multiplies rounding, transformers' as
    well. A mixture of experts is judged by its median token: rounding now and then sends one to another expert, in
    either library.
    """
    import torch
    from transformers import AutoModelForCausalLM

    choose = np.mean if case.raw.cfg.num_experts is None else np.median

    def relative(got: np.ndarray, expected: np.ndarray) -> float:
        squares = ((got.astype(np.float64) - expected) ** 2).mean(axis=-1)
        return float(np.sqrt(choose(squares) / (expected.astype(np.float64) ** 2).mean()))

    exact = hf_logits(make_hf_model(case.name, tmp_path, spread=0.1), TOKENS)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    if case.raw.cfg.num_experts is not None:
        narrow.set_experts_implementation("eager")  # grouped products of experts refuse matrices this narrow
    theirs = hf_logits(narrow, TOKENS)
    ours = HookedTransformer.from_pretrained_no_processing(tmp_path, dtype="bfloat16")(TOKENS)
    assert ours.dtype == "bfloat16"
    ours = np.asarray(ours).astype(np.float32)
    case.figures["bfloat16"] = relative(ours, theirs)
    case.figures["bfloat16_to_float32"] = [relative(ours, exact), relative(theirs, exact)]
    assert max(case.figures["bfloat16"], relative(ours, exact)) <= BFLOAT16_TOLERANCE


def test_padded_prompts_equal_single_ones(case: FamilyCase) -> None:
    """On either side, next to a prompt of full length."""
    logits, _ = case.hooked
    alone = hf_logits(case.hf, SHORT[None])[0]
    np.testing.assert_allclose(logits[-2, -len(SHORT) :], alone, atol=TOLERANCE, rtol=0, err_msg="left")
    np.testing.assert_allclose(logits[-1, : len(SHORT)], alone, atol=TOLERANCE, rtol=0, err_msg="right")
    np.testing.assert_allclose(logits[-3], hf_logits(case.hf, PROMPT[None])[0], atol=TOLERANCE, rtol=0)
