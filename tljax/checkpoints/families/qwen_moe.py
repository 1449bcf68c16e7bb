"""Qwen 2 and 3 with mixtures of experts (``Qwen2MoeForCausalLM``, ``Qwen3MoeForCausalLM``), in all layers or some.

Qwen 2's have an expert that all tokens share, behind a gate of its own.
"""

from typing import Any

from tljax.checkpoints.families import experts
from tljax.checkpoints.families.llama import (
    BLOCK,
    GATED_MLP,
    IGNORED,
    QK_NORM,
    attention_rows,
    decoder_rows,
    read_decoder,
    read_window,
    write_decoder,
    write_layer_types,
)
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig, attention_bias
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

_MOE = f"{BLOCK}.mlp"


def _read(hf: HFConfig, per_token: int, width: int, **fields: Any) -> HookedTransformerConfig:
    return read_decoder(
        hf,
        experts_per_token=hf("num_experts_per_tok", per_token),
        d_expert=hf("moe_intermediate_size", width),
        moe_layers=experts.unless_all(experts.sparse_layers(hf)),
        norm_topk_prob=hf("norm_topk_prob", False),
        default_prepend_bos=False,
        **fields,
    )


def _window(hf: HFConfig) -> int | None:
    size = hf("sliding_window", 4096, null=None)
    return size if hf("use_sliding_window", False) else None


def read_config_2(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``Qwen2MoeConfig``."""
    hf.only(use_mrope=False)
    first = hf("max_window_layers", 28)
    local = [layer % 2 == 0 and layer < first for layer in range(hf("num_hidden_layers"))]
    return _read(
        hf,
        per_token=4,
        width=1408,
        kv_heads=16,
        num_experts=hf("num_experts", 60),
        d_shared_expert=hf("shared_expert_intermediate_size", 5632),
        gate_shared_expert=True,
        **read_window(hf, _window(hf), local),
    )


def read_config_3(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``Qwen3MoeConfig``."""
    hf.only(use_qk_norm=True, qkv_bias=False, shared_expert_intermediate_size=0)  # this family has no other way
    return _read(
        hf,
        per_token=8,
        width=768,
        kv_heads=4,
        num_experts=hf("num_experts", 128, aka=("num_local_experts",)),
        use_qk_norm=True,
        **read_window(hf, _window(hf), [True] * hf("num_hidden_layers")),
    )


def _write(cfg: HookedTransformerConfig) -> dict[str, Any]:
    return write_decoder(cfg) | {
        "use_sliding_window": cfg.use_local_attn,
        "sliding_window": cfg.window_size,
        "num_experts": cfg.num_experts,
        "num_experts_per_tok": cfg.experts_per_token,
        "moe_intermediate_size": cfg.d_expert,
        "norm_topk_prob": cfg.norm_topk_prob,
        "mlp_only_layers": experts.dense_layers(cfg),
    }


def write_config_2(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``Qwen2MoeConfig`` attributes of ``cfg``."""
    return _write(cfg) | {
        "shared_expert_intermediate_size": cfg.d_shared_expert,
        "layer_types": write_layer_types(cfg),
        "qkv_bias": attention_bias(nonzero),
    }


def write_config_3(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``Qwen3MoeConfig`` attributes of ``cfg``."""
    return _write(cfg) | {"attention_bias": attention_bias(nonzero)}


def rows_2(hf: HFConfig) -> list[Row]:
    """Returns Qwen 2's table: checkpoint tensor, its axes, our parameters."""
    shared = [
        *experts.shared(f"{_MOE}.shared_expert"),
        Row(f"{_MOE}.shared_expert_gate.weight", "one d_model", f"{experts.MLP}.W_shared_gate"),
    ]
    mixture = [experts.router(f"{_MOE}.gate.weight"), *experts.one_by_one(_MOE), *shared]
    attention = attention_rows(qkv_bias=hf("qkv_bias", True), out_bias=False)
    return decoder_rows(hf, attention, experts.by_layer(experts.sparse_layers(hf), mixture, GATED_MLP))


def rows_3(hf: HFConfig) -> list[Row]:
    """Returns Qwen 3's table: checkpoint tensor, its axes, our parameters."""
    biased = hf("attention_bias", False)
    mixture = [experts.router(f"{_MOE}.gate.weight"), *experts.one_by_one(_MOE)]
    attention = [*attention_rows(biased, biased), *QK_NORM]
    return decoder_rows(hf, attention, experts.by_layer(experts.sparse_layers(hf), mixture, GATED_MLP))


QWEN2_MOE = Family(
    architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    read_config=read_config_2,
    write_config=write_config_2,
    rows=rows_2,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=2048, n_layers=24, n_heads=16, d_mlp=5632, n_ctx=32768, d_vocab=151936),
)
QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    read_config=read_config_3,
    write_config=write_config_3,
    rows=rows_3,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=2048, n_layers=24, n_heads=32, d_mlp=6144, n_ctx=32768, d_vocab=151936),
    aliases={"num_experts": "num_local_experts"},
    inert={"the window is in every layer": "max_window_layers"},
)
