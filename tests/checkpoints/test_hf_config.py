"""config.json → our config: what is read, what is known to be inert, and what is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hf_models import LLAMA3_ROPE

from tljax import HookedTransformerConfig
from tljax.checkpoints.description import describe
from tljax.checkpoints.families import family_of
from tljax.checkpoints.formats.hf_config import HFConfig, rotary_fraction
from tljax.errors import CheckpointError, UnsupportedModelError

GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_ctx": 16, "n_embd": 8, "n_head": 2, "n_layer": 2,
    "n_positions": 16, "vocab_size": 10, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "summary_type": "cls_index", "task_specific_params": {"text-generation": {"do_sample": True}},
}  # fmt: skip
NEOX = {
    "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_size": 32, "hidden_act": "gelu",
    "intermediate_size": 20, "layer_norm_eps": 1e-5, "max_position_embeddings": 16, "num_attention_heads": 2,
    "num_hidden_layers": 2, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
    "use_parallel_residual": True, "vocab_size": 10, "torch_dtype": "float16",
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 12,
    "num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 16, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "vocab_size": 10, "pretraining_tp": 1, "rope_scaling": None, "use_cache": True,
}  # fmt: skip

Describe = Callable[[dict[str, Any]], Any]


@pytest.fixture
def read(tmp_path: Path) -> Describe:
    def write_and_read(attributes: dict[str, Any]) -> Any:
        (tmp_path / "config.json").write_text(json.dumps(attributes))
        return describe(tmp_path).cfg

    return write_and_read


def test_gpt2(read: Describe) -> None:
    cfg = read(GPT2 | {"scale_attn_by_inverse_layer_idx": True})
    assert (cfg.d_model, cfg.d_head, cfg.d_mlp, cfg.n_ctx, cfg.act_fn) == (8, 4, 32, 16, "gelu_new")
    assert cfg.normalization_type == "LN"
    assert cfg.scale_attn_by_inverse_layer_idx
    assert cfg.default_prepend_bos
    assert cfg.original_architecture == "GPT2LMHeadModel"


def test_neox(read: Describe) -> None:
    cfg = read(NEOX)
    assert (cfg.rotary_dim, cfg.rotary_base, cfg.parallel_attn_mlp) == (4, 10000.0, True)
    assert not cfg.default_prepend_bos
    assert not read(NEOX | {"use_parallel_residual": False}).parallel_attn_mlp


def test_llama(read: Describe) -> None:
    cfg = read(LLAMA | {"num_key_value_heads": 1, "head_dim": 6, "rope_theta": 500000.0})
    assert (cfg.kv_heads, cfg.d_head, cfg.rotary_dim, cfg.rotary_base) == (1, 6, 6, 500000.0)
    assert (cfg.normalization_type, cfg.gated_mlp, cfg.act_fn) == ("RMS", True, "silu")
    assert read(LLAMA | {"num_key_value_heads": 2}).n_key_value_heads is None


@pytest.mark.parametrize(
    ("base", "old", "new"),
    [
        (
            LLAMA,
            {"rope_theta": 500.0, "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}},
            {"rope_parameters": LLAMA3_ROPE},
        ),
        (
            LLAMA,
            {"rope_theta": 99.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_theta": 99.0, "rope_type": "linear", "factor": 2.0}},
        ),
        (
            {name: value for name, value in NEOX.items() if not name.startswith("rotary")},
            {"rotary_pct": 0.5, "rotary_emb_base": 77},
            {"rope_parameters": {"rope_theta": 77, "partial_rotary_factor": 0.5, "rope_type": "default"}},
        ),
    ],
)
def test_old_and_new_rope_attributes_mean_the_same(read: Describe, base: dict, old: dict, new: dict) -> None:
    cfg = read(base | old)
    assert cfg == read(base | new)
    assert cfg != read(base)


def test_llama3_scaling_is_read(read: Describe) -> None:
    cfg = read(LLAMA | {"rope_parameters": LLAMA3_ROPE})
    assert cfg.use_NTK_by_parts_rope
    assert (cfg.NTK_by_parts_factor, cfg.NTK_original_ctx_len, cfg.NTK_by_parts_high_freq_factor) == (8.0, 16, 4.0)


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (GPT2, {"add_cross_attention": True}, r"add_cross_attention=True"),
        (GPT2, {"activation_function": "mish"}, r"activation_function='mish'.*gelu_new"),
        (GPT2, {"is_encoder_decoder": True}, r"is_encoder_decoder=True"),
        (NEOX, {"hidden_act": "mish"}, r"hidden_act='mish'"),
        (NEOX, {"rope_scaling": {"type": "mrope"}}, r"rope_type='mrope'.*default, linear, dynamic"),
        (LLAMA, {"rope_scaling": {"rope_type": "proportional"}}, r"rope_type='proportional'"),
        (LLAMA, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}}, r"'mscale': 1.0"),
        (LLAMA, {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5"),
        (LLAMA, {"sliding_window": 128}, r"sliding_window=128"),
        (LLAMA, {"quantization_config": {"quant_method": "aqlm"}}, r"quantization_config=.*full-precision"),
        (LLAMA, {"auto_map": {"AutoModel": "a.B"}}, r"auto_map=.*code of its own"),
        (LLAMA, {"qk_norm": True, "logit_scale": 0.5}, r"qk_norm=True, logit_scale=0.5"),
        (LLAMA, {"use_sliding_window": False}, r"use_sliding_window=False"),
    ],
)  # fmt: skip
def test_unsupported_attributes_are_refused_by_name_and_value(
    read: Describe, base: dict, change: dict, message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(base | change)


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (LLAMA, {"head_dim": 2.0}, r"head_dim=2.0: expected an integer"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": "2"}}, r"rope_scaling factor='2': expected a number"),
        (NEOX, {"partial_rotary_factor": 0.5}, r"contradicts itself: .*rotary_pct"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, r"rope_type='linear' without giving 'factor'"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": None}}, r"rope_type='dynamic' without giving 'factor'"),
        (LLAMA, {"rope_scaling": {"type": "yarn"}}, r"rope_type='yarn' without giving 'factor'"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 0.5}}, r"yarn_factor .* at least 1, got 0.5"),
        (LLAMA, {"rope_scaling": {"type": "su", "long_factor": [2.0]}}, r"'longrope' without giving 'short_factor'"),
        (LLAMA, {"hidden_size": "8"}, r"hidden_size='8': expected an integer"),
        (LLAMA, {"num_attention_heads": 0}, r"num_attention_heads=0: expected between 1 and"),
        (LLAMA, {"num_key_value_heads": 3}, r"does not describe a model.*n_key_value_heads"),
    ],
)
def test_incomplete_or_contradictory_configs(read: Describe, base: dict, change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(base | change)


def test_inert_and_null_attributes_are_ignored(read: Describe) -> None:
    noise = {
        "unsloth_version": "1",
        "temperature": 0.7,
        "id2label": {"0": "x"},
        "anything_new": None,
        "pruned_heads": {},
    }
    assert read(LLAMA | noise) == read(LLAMA)


def test_dispatch_is_on_the_architecture() -> None:
    assert family_of({"architectures": None, "model_type": "gpt_neox"}).architecture == "GPTNeoXForCausalLM"
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadCustomModel.*Supported: GPT2LMHeadModel"):
        family_of({"architectures": ["GPT2LMHeadCustomModel"], "model_type": "gpt2"})
    with pytest.raises(UnsupportedModelError, match=r"describes mamba, which.*GPTNeoXForCausalLM, LlamaForCausalLM"):
        family_of({"model_type": "mamba"})


def test_reading_is_accounted_for() -> None:
    hf = HFConfig({"a": 1, "b": 2})
    assert (hf("a"), hf("c", 3)) == (1, 3)
    with pytest.raises(UnsupportedModelError, match=r"b=2"):
        hf.refuse_unread()
    assert hf("b", aka=("d",)) == 2
    hf.refuse_unread()


def test_a_rotated_fraction_is_read_back_as_written() -> None:
    for d_head in range(2, 260, 2):
        for dim in range(2, d_head + 1, 2):
            cfg = HookedTransformerConfig(
                d_model=d_head, n_layers=1, n_ctx=4, d_head=d_head, n_heads=1, d_vocab=5,
                positional_embedding_type="rotary", rotary_dim=dim,
            )  # fmt: skip
            assert int(d_head * rotary_fraction(cfg)) == dim
