"""Direct logit attribution and the Jacobian lens against TransformerLens 3.9's, from a golden file.

``tests/golden/make_lenses.py`` made the file and says what is in it.
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import hf_models
from fingerprint import fingerprint, same
from safetensors import safe_open
from test_cache_methods import raw_model
from test_transformerlens import GOLDEN

from tljax import HookedTransformer
from tljax.analysis.direct_logit_attribution import direct_logit_attribution
from tljax.analysis.jacobian_lens import JacobianLens

TOLERANCE = 1e-4


@functools.cache
def goldens() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with safe_open(GOLDEN / "lenses_transformerlens.safetensors", framework="numpy") as file:
        return json.loads(file.metadata()["record"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


RECORD, TENSORS = goldens()


@pytest.mark.parametrize("case", ["gpt2", "llama", "gemma2"])
def test_direct_logit_attribution(case: str) -> None:
    raw = raw_model(case)
    folded = raw.process_weights(center_unembed=raw.cfg.output_logits_soft_cap <= 0)
    called = [name for name in RECORD["labels"] if name.startswith(f"{case}/")]
    assert len(called) == (4 if case == "gemma2" else 6)
    for name in called:
        _, unit, pos = name.split("/")
        position = None if pos == "None" else int(pos)
        answer, wrong = RECORD["tokens"]
        found = direct_logit_attribution(folded, TENSORS["input"], answer, wrong, unit=unit, pos=position)
        expected, labels = TENSORS[name], RECORD["labels"][name]
        assert list(found.labels[: len(labels)]) == labels
        np.testing.assert_allclose(found.attribution[: len(labels)], expected, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("variant", list(RECORD["fingerprints"]))
def test_jacobian_lens(variant: str, tmp_path: Path) -> None:
    hf_models.make_hf_model(variant, tmp_path)
    assert same(fingerprint(tmp_path), RECORD["fingerprints"][variant])
    model = HookedTransformer.from_pretrained_no_processing(tmp_path)
    lens = JacobianLens.fit(model, RECORD["prompts"], skip_first_positions=RECORD["skip"])
    expected = TENSORS[f"jacobian/{variant}"]
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(lens.matrices, expected, atol=TOLERANCE * scale)
    assert np.abs(expected - np.eye(len(expected[0]))).max() > 0.1
