"""Mixtral (``MixtralForCausalLM``): Mistral with a mixture of experts in every layer."""

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
)
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

_MOE = f"{BLOCK}.block_sparse_moe"


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``MixtralConfig``."""
    size = hf("sliding_window", None)
    return read_decoder(
        hf,
        kv_heads=8,
        eps=1e-5,
        theta=1e6,
        num_experts=hf("num_local_experts", 8),
        experts_per_token=hf("num_experts_per_tok", 2),
        norm_topk_prob=True,
        **read_window(hf, size, [True] * hf("num_hidden_layers")),
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``MixtralConfig`` attributes of ``cfg``."""
    return write_decoder(cfg) | {
        "sliding_window": cfg.window_size,
        "num_local_experts": cfg.num_experts,
        "num_experts_per_tok": cfg.experts_per_token,
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    mixture = [
        experts.router(f"{_MOE}.gate.weight", aka=f"{BLOCK}.mlp.gate.weight"),
        *experts.one_by_one(_MOE, "w1", "w3", "w2"),
    ]
    return decoder_rows(hf, attention_rows(qkv_bias=False, out_bias=False), mixture)


MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=4096, n_layers=32, n_heads=32, d_mlp=14336, n_ctx=131072, d_vocab=32000),
    aliases={"num_experts": "num_local_experts"},
)
