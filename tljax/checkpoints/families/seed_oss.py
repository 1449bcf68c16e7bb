"""Seed-OSS (``SeedOssForCausalLM``): Llama with query, key and value biases, and an output bias on its own switch."""

from typing import Any

from tljax.checkpoints.families.llama import (
    IGNORED,
    attention_rows,
    decoder_rows,
    gated_mlp_rows,
    read_decoder,
    read_mlp_bias,
    write_decoder,
)
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig, attention_bias
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``SeedOssConfig``."""
    return read_decoder(hf, kv_heads=8, d_head=128, default_prepend_bos=False, **read_mlp_bias(hf))


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``SeedOssConfig`` attributes of ``cfg``."""
    return write_decoder(cfg) | {
        "attention_bias": attention_bias(nonzero - {"attn.b_O"}),
        "attention_out_bias": "attn.b_O" in nonzero,
        "mlp_bias": cfg.gated_mlp_bias,
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    attention = attention_rows(hf("attention_bias", True), hf("attention_out_bias", False))
    return decoder_rows(hf, attention, gated_mlp_rows(hf("mlp_bias", False)))


SEED_OSS = Family(
    architecture="SeedOssForCausalLM",
    model_type="seed_oss",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=4096, n_layers=64, n_heads=80, d_mlp=27648, n_ctx=524288, d_vocab=155136),
)
