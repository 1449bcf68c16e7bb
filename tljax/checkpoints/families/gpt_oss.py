"""gpt-oss (``GptOssForCausalLM``): experts with biases and a clipped gate, attention sinks, windows in turn, YaRN."""

from typing import Any

from tljax.checkpoints.families import experts
from tljax.checkpoints.families.llama import (
    BLOCK,
    IGNORED,
    attention_rows,
    decoder_rows,
    read_decoder,
    read_window,
    write_decoder,
    write_layer_types,
)
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig, attention_bias, rope_scaling
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

_MOE = f"{BLOCK}.mlp"
_OURS = "blocks.{l}.mlp.experts"
_ROPE = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
"""Rotary parameters that transformers assumes if a config has none."""


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``GptOssConfig``."""
    if not hf("rope_parameters", {}) and not hf("rope_scaling", {}):
        hf = hf.changed(rope_parameters=_ROPE)
    hf.only(hidden_act="silu", swiglu_alpha=1.702)  # the activation is silu with that gain
    hf("initial_context_length", None)  # of OpenAI's own code; the rotary scaling says it again
    alternate = [layer % 2 == 0 for layer in range(hf("num_hidden_layers"))]
    return read_decoder(
        hf,
        kv_heads=8,
        d_head=64,
        eps=1e-5,
        theta=150000.0,
        act_fn="silu",
        num_experts=hf("num_local_experts", 128, aka=("num_experts",)),
        experts_per_token=hf("num_experts_per_tok", 4, aka=("experts_per_token",)),
        router="chosen_softmax",
        expert_biases=True,
        swiglu_limit=float(hf("swiglu_limit", 7.0)),
        use_attention_sinks=True,
        **read_window(hf, hf("sliding_window", 128), alternate),
    ).replace(act_fn="quick_gelu")


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``GptOssConfig`` attributes of ``cfg``."""
    return write_decoder(cfg) | {
        "rope_parameters": {"rope_theta": cfg.rotary_base} | (rope_scaling(cfg) or {"rope_type": "default"}),
        "rope_scaling": None,
        "hidden_act": "silu",
        "swiglu_alpha": 1.702,
        "swiglu_limit": cfg.swiglu_limit,
        "attention_bias": attention_bias(nonzero),
        "num_local_experts": cfg.num_experts,
        "num_experts_per_tok": cfg.experts_per_token,
        "sliding_window": cfg.window_size,
        "layer_types": write_layer_types(cfg),
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    biased = hf("attention_bias", True)
    attention = [
        *attention_rows(biased, biased),
        Row(f"{BLOCK}.self_attn.sinks", "n_heads", "blocks.{l}.attn.sinks"),
    ]
    mixture = [
        experts.router(f"{_MOE}.router.weight"),
        Row(f"{_MOE}.router.bias", "n_experts", "blocks.{l}.mlp.b_router"),
        Row(f"{_MOE}.experts.gate_up_proj", "n_experts d_model (d_expert 2)", f"{_OURS}.W_gate|W_in"),
        Row(f"{_MOE}.experts.gate_up_proj_bias", "n_experts (d_expert 2)", f"{_OURS}.b_gate|b_in"),
        Row(f"{_MOE}.experts.down_proj", "n_experts d_expert d_model", f"{_OURS}.W_out"),
        Row(f"{_MOE}.experts.down_proj_bias", "n_experts d_model", f"{_OURS}.b_out"),
    ]
    return decoder_rows(hf, attention, mixture)


GPT_OSS = Family(
    architecture="GptOssForCausalLM",
    model_type="gpt_oss",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=2880, n_layers=36, n_heads=64, d_mlp=2880, n_ctx=131072, d_vocab=201088),
    aliases={"num_experts": "num_local_experts"},
)
