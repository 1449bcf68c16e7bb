"""Export to transformers and back, and tljax's own format."""

from pathlib import Path

import jax
import numpy as np
from family_case import TOKENS, FamilyCase, hf_logits
from hf_gpt_like import UNUSED_ROWS
from safetensors.numpy import load_file

from tljax import HookedTransformer


def test_export_writes_the_tensors_it_read(case: FamilyCase, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    case.raw.save_hf(tmp_path)
    written, original = (load_file(place / "model.safetensors") for place in (tmp_path, case.directory))
    assert written.keys() == original.keys()
    for key, tensor in original.items():
        unused = UNUSED_ROWS.get(key, 0)
        assert written[key].shape == tensor.shape
        got, expected = np.atleast_1d(written[key], tensor)
        np.testing.assert_array_equal(got[unused:], expected[unused:], err_msg=key)
        assert not got[:unused].any()
    again = HookedTransformer.from_pretrained_no_processing(tmp_path)
    assert again.cfg.replace(model_name=case.raw.cfg.model_name) == case.raw.cfg

    back, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_array_equal(hf_logits(back, TOKENS), case.expected)
    case.figures["export"] = "bit-equal"


def test_own_format_keeps_every_bit(case: FamilyCase, tmp_path: Path) -> None:
    case.raw.save_pretrained(tmp_path)
    back = HookedTransformer.from_pretrained_no_processing(tmp_path)
    assert back.cfg == case.raw.cfg
    jax.tree.map(np.testing.assert_array_equal, back.params, case.raw.params)
