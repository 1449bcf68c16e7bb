"""Llama's relatives: attributes that are refused, defaults of absent ones, and config.json as published."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hf_models import rewrite

from tljax.checkpoints import load_checkpoint, save_hf
from tljax.checkpoints.description import describe
from tljax.config import HookedTransformerConfig
from tljax.errors import CheckpointError, UnsupportedModelError

SIZES = {
    "hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 32, "num_hidden_layers": 3, "hidden_act": "silu",
    "max_position_embeddings": 16, "rms_norm_eps": 1e-6, "vocab_size": 10, "num_key_value_heads": 8,
}  # fmt: skip
QWEN2 = SIZES | {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 8,
    "max_window_layers": 3, "rope_theta": 1e6, "use_mrope": False, "attention_dropout": 0.0, "use_cache": True,
}  # fmt: skip
MISTRAL = SIZES | {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 6, "rope_theta": 10000.0,
}  # fmt: skip
MINISTRAL = MISTRAL | {"architectures": ["MinistralForCausalLM"], "model_type": "ministral"}
PHI3 = SIZES | {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "sliding_window": 7, "rope_scaling": None,
    "original_max_position_embeddings": 16, "attention_bias": False, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        "AutoTokenizer": ["somebody/tokenizer", None],
    },
}  # fmt: skip
ARCEE = SIZES | {"architectures": ["ArceeForCausalLM"], "model_type": "arcee", "hidden_act": "relu2"}
SEED_OSS = SIZES | {
    "architectures": ["SeedOssForCausalLM"], "model_type": "seed_oss", "attention_bias": True, "head_dim": 128,
    "attention_out_bias": False, "mlp_bias": False, "rope_scaling": {"rope_type": "default"}, "residual_dropout": 0.1,
}  # fmt: skip
GLM = SIZES | {
    "architectures": ["GlmForCausalLM"], "model_type": "glm", "attention_bias": True, "partial_rotary_factor": 0.5,
}  # fmt: skip

LONG = {"short_factor": [1.0], "long_factor": [2.0]}
MIXED = ["full_attention", "sliding_attention", "full_attention"]

Read = Callable[[dict[str, Any]], HookedTransformerConfig]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def write_and_read(attributes: dict[str, Any]) -> HookedTransformerConfig:
        (tmp_path / "config.json").write_text(json.dumps(attributes))
        return describe(tmp_path).cfg

    return write_and_read


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (QWEN2, {"use_mrope": True}, r"use_mrope=True"),
        (QWEN2, {"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, r"'mrope'.*linear, dynamic, yarn, longrope"),
        (QWEN2, {"rope_scaling": {"type": "yarn", "factor": 4.0, "odd": True}}, r"'yarn'.*'odd': True"),
        (QWEN2, {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5.*supported: 1.0"),
        (QWEN2, {"layer_types": ["chunked_attention"] * 3}, r"layer_types=\['chunked_attention'\].*full_attention"),
        (QWEN2, {"layer_types": MIXED}, r"layer_types='sliding_attention'.*sliding_window is not set"),
        (QWEN2, {"qk_norm": True}, r"qk_norm=True"),
        (MISTRAL, {"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, r"rope_type='ntk'"),
        (MISTRAL, {"attention_bias": True}, r"attention_bias=True"),
        (MINISTRAL, {"sliding_window": None, "layer_types": MIXED}, r"layer_types='sliding_attention'"),
        (PHI3, {"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_type='linear'.*default, longrope"),
        (PHI3, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, r"rope_type='yarn'.*default, longrope"),
        (PHI3, {"rope_scaling": {"type": "su", "short_mscale": 1.2} | LONG}, r"'longrope'.*'short_mscale': 1.2"),
        (PHI3, {"attention_bias": True}, r"attention_bias=True"),
        (PHI3, {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Phi3"}}, r"auto_map=.*modeling_mine.*of its own"),
        (ARCEE, {"rope_scaling": {"rope_type": "proportional"}}, r"rope_type='proportional'"),
        (SEED_OSS, {"auto_map": {"AutoConfig": "a.B"}}, r"auto_map=.*code of its own"),
        (GLM, {"sliding_window": 4}, r"sliding_window=4"),
        (GLM, {"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 3.0}}, r"'dynamic'.*'alpha': 3.0"),
    ],
)  # fmt: skip
def test_what_is_not_implemented_is_refused_by_name(read: Read, base: dict, change: dict, message: str) -> None:
    read(base)
    with pytest.raises(UnsupportedModelError, match=message):
        read(base | change)


def test_layer_types_of_another_length(read: Read) -> None:
    with pytest.raises(CheckpointError, match=r"does not describe a model.*attn_types has 1 entries"):
        read(MISTRAL | {"layer_types": ["full_attention"]})


@pytest.mark.parametrize(
    ("change", "size", "kinds"),
    [
        ({}, None, None),
        ({"use_sliding_window": True}, 8, ("global",) * 3),
        ({"use_sliding_window": True, "max_window_layers": 1}, 8, ("global", "local", "local")),
        ({"use_sliding_window": True, "layer_types": MIXED}, 8, ("global", "local", "global")),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None, None),
    ],
)
def test_windows_of_qwen2(read: Read, change: dict, size: int | None, kinds: tuple[str, ...] | None) -> None:
    cfg = read(QWEN2 | change)
    assert (cfg.use_local_attn, cfg.window_size, cfg.attn_types) == (size is not None, size, kinds)
    assert not cfg.default_prepend_bos


@pytest.mark.parametrize("base", [MISTRAL, MINISTRAL])
def test_windows_of_mistral(read: Read, base: dict) -> None:
    cfg = read(base)
    assert (cfg.window_size, cfg.attn_types) == (6, ("local",) * 3)
    assert not read(base | {"sliding_window": None}).use_local_attn
    assert read({key: value for key, value in base.items() if key != "sliding_window"}).window_size == 4096
    assert read(base | {"layer_types": MIXED}).attn_types == ("global", "local", "global")


@pytest.mark.parametrize(
    ("base", "kv_heads", "d_head"),
    [
        (QWEN2, 32, 2), (MISTRAL, 8, 2), (MINISTRAL, 8, 2), (PHI3, 32, 2), (ARCEE, 32, 2), (SEED_OSS, 8, 128),
        (GLM, 2, 128),
    ],
)  # fmt: skip
def test_absent_attributes_have_transformers_defaults(read: Read, base: dict, kv_heads: int, d_head: int) -> None:
    from transformers import AutoConfig

    left = {key: value for key, value in base.items() if key not in ("num_key_value_heads", "head_dim", "rms_norm_eps")}
    cfg = read(left | {"hidden_act": None})
    theirs = AutoConfig.for_model(base["model_type"])
    assert (cfg.kv_heads, cfg.d_head, cfg.eps) == (kv_heads, d_head, theirs.rms_norm_eps)
    assert cfg.act_fn == theirs.hidden_act
    assert read(left | {"num_key_value_heads": None}).kv_heads == 32


def test_rotated_part_of_a_head(read: Read) -> None:
    cfg = read(GLM | {"head_dim": 12})
    assert (cfg.rotary_dim, cfg.rotary_adjacent_pairs) == (6, True)
    assert read({key: value for key, value in GLM.items() if key != "partial_rotary_factor"}).rotary_dim == 64
    assert read(PHI3 | {"head_dim": 8, "partial_rotary_factor": 0.75}).rotary_dim == 6
    assert read(PHI3).rotary_dim == 2


@pytest.mark.parametrize("variant", ["qwen2_gqa_window", "ministral_mixed"])
def test_first_layers_without_a_window_are_exported(
    variant: str, hf_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    loaded = load_checkpoint(
        hf_checkpoint(variant), first_n_layers=1, fold_ln=False, center_writing_weights=False, center_unembed=False,
        fold_value_biases=False,
    )  # fmt: skip
    save_hf(loaded.params, loaded.cfg, tmp_path)
    assert describe(tmp_path).cfg.attn_types == loaded.cfg.attn_types


def test_a_mistral_with_layer_types_is_read_like_a_ministral(
    hf_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = hf_checkpoint("ministral_mixed")
    named = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    directory = rewrite(source, tmp_path, config=lambda config: config | named)
    cfg = describe(directory).cfg
    assert cfg.replace(original_architecture="MinistralForCausalLM") == describe(source).cfg
