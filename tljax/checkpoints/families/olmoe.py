"""OLMoE (``OlmoeForCausalLM``): Llama with experts, and with norms over all heads' queries, and keys, together."""

from typing import Any

from tljax.checkpoints.families import experts
from tljax.checkpoints.families.llama import (
    BLOCK,
    IGNORED,
    attention_rows,
    decoder_rows,
    read_decoder,
    write_decoder,
)
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig, attention_bias
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

_MOE = f"{BLOCK}.mlp"
_NORMS = (
    Row(f"{BLOCK}.self_attn.q_norm.weight", "q_width", "blocks.{l}.attn.q_norm.w"),
    Row(f"{BLOCK}.self_attn.k_norm.weight", "kv_width", "blocks.{l}.attn.k_norm.w"),
)


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for an ``OlmoeConfig``."""
    return read_decoder(
        hf,
        eps=1e-5,
        num_experts=hf("num_experts", 64),
        experts_per_token=hf("num_experts_per_tok", 8),
        norm_topk_prob=hf("norm_topk_prob", False),
        use_qk_norm=True,
        qk_norm_span="joint",
        clip_qkv=hf("clip_qkv", None),
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``OlmoeConfig`` attributes of ``cfg``."""
    return write_decoder(cfg) | {
        "num_experts": cfg.num_experts,
        "num_experts_per_tok": cfg.experts_per_token,
        "norm_topk_prob": cfg.norm_topk_prob,
        "clip_qkv": cfg.clip_qkv,
        "attention_bias": attention_bias(nonzero),
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    biased = hf("attention_bias", False)
    mixture = [experts.router(f"{_MOE}.gate.weight"), *experts.one_by_one(_MOE)]
    return decoder_rows(hf, [*attention_rows(biased, biased), *_NORMS], mixture)


OLMOE = Family(
    architecture="OlmoeForCausalLM",
    model_type="olmoe",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=2048, n_layers=16, n_heads=16, d_mlp=2048, n_ctx=4096, d_vocab=50304),
    aliases={"num_local_experts": "num_experts"},
)
