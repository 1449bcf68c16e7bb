"""Attributes of families in GPT-2's manner that real checkpoints carry and that are read, or refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from read_config import read

from tljax.checkpoints import load_checkpoint, save_hf
from tljax.checkpoints.layout import flatten, unflatten
from tljax.errors import CheckpointError, UnsupportedModelError


def test_gpt_neo_layers() -> None:
    cfg = read("gpt_neo", attention_layers=None)
    assert cfg.attn_types == ("global", "local", "local")
    assert (cfg.use_local_attn, cfg.window_size, cfg.attn_scale) == (True, 5, 1.0)
    assert not read("gpt_neo_global_untied").use_local_attn
    with pytest.raises(CheckpointError, match=r"attention_layers=.*attention_types"):
        read("gpt_neo", attention_layers=["global"] * 3)
    with pytest.raises(CheckpointError, match=r"attention_types of 3 layers, but its num_layers=4"):
        read("gpt_neo", num_layers=4)


def test_gptj_attributes_of_old_checkpoints() -> None:
    cfg = read("gptj", rotary=True, scale_attn_weights=True, n_ctx=2048, gradient_checkpointing=False)
    assert (cfg.rotary_dim, cfg.rotary_adjacent_pairs, cfg.parallel_attn_mlp, cfg.n_ctx) == (4, True, True, 24)


def test_gpt_bigcode_attributes_of_old_checkpoints() -> None:
    left_over = {
        "inference_runner": 0, "max_batch_size": None, "pad_key_length": True, "pre_allocate_kv_cache": False,
        "validate_runner_input": True, "attention_softmax_in_fp32": False, "n_ctx": 2048,
    }  # fmt: skip
    assert read("gpt_bigcode_mqa", **left_over).kv_heads == 1
    assert read("gpt_bigcode_mha_untied").n_key_value_heads is None
    with pytest.raises(CheckpointError, match=r"num_key_value_heads=2, but its multi_query=True"):
        read("gpt_bigcode_mqa", num_key_value_heads=2)


def test_starcoder2_attributes_of_old_checkpoints() -> None:
    old = {"rope_parameters": None, "rope_theta": 999999.4, "mlp_type": "default", "norm_type": "layer_norm"}
    cfg = read("starcoder2", sliding_window=4096, **old)
    assert (cfg.rotary_base, cfg.window_size, cfg.attn_types) == (999999.4, 4096, ("local",) * 3)
    assert (cfg.kv_heads, cfg.default_prepend_bos) == (2, False)


@pytest.mark.parametrize(
    ("variant", "attribute", "value"),
    [
        ("gptj", "rotary", False),
        ("gptj", "scale_attn_weights", False),
        ("gpt_bigcode_mha_untied", "add_cross_attention", True),
        ("starcoder2", "mlp_type", "gated"),
        ("starcoder2", "norm_type", "rms_norm"),
        ("starcoder2", "rope_type", "proportional"),
        ("starcoder2", "partial_rotary_factor", 0.5),
        ("opt", "_remove_final_layer_norm", True),
        ("opt", "word_embed_proj_dim", 16),
    ],
)
def test_refused_attributes(variant: str, attribute: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=f"sets {attribute}={value!r}, which tljax does not implement"):
        read(variant, **({"rope_scaling": {"rope_type": value}} if attribute == "rope_type" else {attribute: value}))


def test_norms_that_gptj_cannot_keep_apart_are_not_exported(
    hf_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    loaded = load_checkpoint(
        hf_checkpoint("gptj"),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    flat = flatten(loaded.params)
    params = unflatten(flat | {"blocks.1.ln2.b": flat["blocks.1.ln2.b"] + 1})
    message = r"blocks\.1\.ln1\.b and blocks\.1\.ln2\.b differ, but GPTJForCausalLM has one tensor for both"
    with pytest.raises(UnsupportedModelError, match=message):
        save_hf(params, loaded.cfg, tmp_path / "x")
    assert not (tmp_path / "x").exists()
