"""Mixtures of experts: both ways to store them, what is refused, defaults of absent attributes, broken checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hf_models import rewrite
from hf_moe import VARIANTS
from hf_rotary import LONGROPE
from read_config import read

from tljax.checkpoints import load_checkpoint, save_hf
from tljax.errors import CheckpointError, UnsupportedModelError

RAW = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
Tensors = dict[str, np.ndarray]


def test_phimoe_sharpens_short_and_long_texts_alike() -> None:
    assert read("phimoe_longrope").longrope_attention_factor == 1.2
    rope = LONGROPE | {"short_mscale": 1.2, "long_mscale": 1.3, "original_max_position_embeddings": 20}
    with pytest.raises(UnsupportedModelError, match=r"\(short_mscale, long_mscale\)=\(1\.2, 1\.3\).*the same for both"):
        read("phimoe_longrope", rope_parameters=rope)


@pytest.mark.parametrize("variant", VARIANTS)
def test_configs_of_transformers_are_read_whole(variant: str) -> None:
    cfg = read(variant)
    assert (cfg.n_layers, cfg.num_experts) == (3, 6)


@pytest.mark.parametrize(
    ("variant", "absent", "expected"),
    [
        ("mixtral_gqa", "num_local_experts", {"num_experts": 8}),
        ("mixtral_gqa", "num_experts_per_tok", {"experts_per_token": 2}),
        ("qwen2_moe_shared", "num_experts", {"num_experts": 60}),
        ("qwen2_moe_shared", "moe_intermediate_size", {"d_expert": 1408}),
        ("qwen2_moe_shared", "shared_expert_intermediate_size", {"d_shared_expert": 5632}),
        ("qwen3_moe_gqa", "num_local_experts", {"num_experts": 128}),
        ("qwen3_moe_gqa", "norm_topk_prob", {"norm_topk_prob": False}),
        ("phimoe_gqa", "router_jitter_noise", {"router_jitter": 0.01}),
        ("olmoe_mha", "clip_qkv", {"clip_qkv": None}),
        ("olmoe_mha", "num_experts", {"num_experts": 64}),
    ],
)
def test_absent_attributes(variant: str, absent: str, expected: dict[str, Any]) -> None:
    cfg = read(variant, without=(absent,))
    assert {name: getattr(cfg, name) for name in expected} == expected


def test_layers_with_experts() -> None:
    assert read("qwen2_moe_shared").moe_layers is None
    assert read("qwen2_moe_mixed").moe_layers == (False, True, False)
    assert read("qwen3_moe_mixed").moe_layers == (False, True, True)
    assert read("qwen3_moe_gqa", decoder_sparse_step=3, mlp_only_layers=[2]).moe_layers == (False, False, False)


@pytest.mark.parametrize(
    ("variant", "changes", "named"),
    [
        ("mixtral_gqa", {"rope_parameters": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
        ("mixtral_gqa", {"hidden_act": "gelu_10"}, "gelu_10"),
        ("qwen2_moe_shared", {"use_mrope": True}, "use_mrope"),
        ("granitemoe_bias_tied", {"mlp_bias": True}, "mlp_bias"),
        ("olmoe_mha", {"sliding_window": 4}, "sliding_window"),
        ("qwen3_moe_gqa", {"n_shared_experts": 1}, "n_shared_experts"),
    ],
)
def test_what_cannot_be_computed_is_refused(variant: str, changes: dict[str, object], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        read(variant, **changes)


def together(tensors: Tensors) -> Tensors:
    """The tensors of a checkpoint as transformers 5 holds them: all experts of a layer in one."""
    whole = {key: tensor for key, tensor in tensors.items() if ".experts." not in key}
    for layer in range(3):
        for block in ("block_sparse_moe", "mlp"):
            start = f"model.layers.{layer}.{block}.experts."

            def stack(name: str, start: str = start) -> np.ndarray:
                return np.stack([tensors[f"{start}{expert}.{name}.weight"] for expert in range(6)])

            gate, up, down = (
                ("w1", "w3", "w2") if block == "block_sparse_moe" else ("gate_proj", "up_proj", "down_proj")
            )
            if f"{start}0.{gate}.weight" in tensors:
                ours = f"model.layers.{layer}.mlp.experts."
                whole[f"{ours}gate_up_proj"] = np.concatenate([stack(gate), stack(up)], axis=1)
                whole[f"{ours}down_proj"] = stack(down)
    renamed = {
        "block_sparse_moe.gate.weight": "mlp.gate.weight",
        "block_sparse_moe.router.layer.weight": "block_sparse_moe.router.weight",
        "block_sparse_moe.input_linear.weight": "block_sparse_moe.experts.gate_up_proj",
        "block_sparse_moe.output_linear.weight": "block_sparse_moe.experts.down_proj",
    }
    ours = {key: next((new for old, new in renamed.items() if key.endswith(old)), "") for key in whole}
    return {
        (".".join(key.split(".")[:3]) + f".{ours[key]}" if ours[key] else key): tensor for key, tensor in whole.items()
    }


@pytest.mark.parametrize("variant", ["mixtral_gqa", "qwen2_moe_mixed", "olmoe_mha", "granitemoe_bias_tied"])
def test_experts_in_one_tensor(variant: str, hf_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = hf_checkpoint(variant)
    fused = rewrite(source, tmp_path / "fused", tensors=together)
    one_by_one, in_one = load_checkpoint(source, **RAW), load_checkpoint(fused, **RAW)
    assert in_one.cfg.replace(model_name="") == one_by_one.cfg.replace(model_name="")
    jax.tree.map(np.testing.assert_array_equal, in_one.params, one_by_one.params)


def test_a_missing_expert_is_named(hf_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    lost = "model.layers.1.block_sparse_moe.experts.4.w3.weight"
    broken = rewrite(
        hf_checkpoint("mixtral_gqa"), tmp_path, tensors=lambda t: {key: t[key] for key in t if key != lost}
    )
    with pytest.raises(CheckpointError, match=rf"1 missing: {lost} \[44, 32\]"):
        load_checkpoint(broken)


def test_another_number_of_experts_than_the_config_says(hf_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    def claim(number: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return lambda config: config | {"num_local_experts": number}

    source = hf_checkpoint("mixtral_gqa")
    more = rewrite(source, tmp_path / "more", config=claim(7))
    with pytest.raises(CheckpointError, match=r"(?s)missing: .*experts\.6\.w1\.weight.*another shape: .*gate\.weight"):
        load_checkpoint(more)
    fewer = rewrite(source, tmp_path / "fewer", config=claim(5))
    with pytest.raises(CheckpointError, match=r"unexpected: .*experts\.5\.w1\.weight"):
        load_checkpoint(fewer)


def test_more_experts_a_token_than_there_are(hf_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    wrong = rewrite(hf_checkpoint("mixtral_gqa"), tmp_path, config=lambda c: c | {"num_experts_per_tok": 9})
    with pytest.raises(CheckpointError, match=r"experts_per_token=9 is more than num_experts=6"):
        load_checkpoint(wrong)


def test_fewer_layers_of_a_mixed_model(hf_checkpoint: Callable[[str], Path]) -> None:
    loaded = load_checkpoint(hf_checkpoint("qwen2_moe_mixed"), first_n_layers=2)
    assert loaded.cfg.moe_layers == (False, True)
    assert set(loaded.params["blocks"][0]["mlp"]) == {"W_in", "W_gate", "W_out", "b_in", "b_out"}
    assert set(loaded.params["blocks"][1]["mlp"]) == {"W_router", "W_shared_gate", "experts", "shared"}


def test_processed_experts_are_not_exported(hf_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    loaded = load_checkpoint(hf_checkpoint("qwen3_moe_gqa"))
    with pytest.raises(UnsupportedModelError, match="were folded"):
        save_hf(loaded.params, loaded.cfg, tmp_path / "x")
    raw = load_checkpoint(hf_checkpoint("qwen3_moe_gqa"), **RAW)
    save_hf(raw.params, raw.cfg.replace(original_architecture=None), tmp_path / "y")
    assert json.loads((tmp_path / "y" / "config.json").read_text())["architectures"] == ["Qwen3MoeForCausalLM"]
