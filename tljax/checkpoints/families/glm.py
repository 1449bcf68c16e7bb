"""GLM-4-9B and GLM-Edge (``GlmForCausalLM``): Llama with a fused gated MLP and half of each head rotated in pairs."""

from typing import Any

from tljax.checkpoints.families.llama import (
    FUSED_MLP,
    IGNORED,
    attention_rows,
    decoder_rows,
    read_decoder,
    write_decoder,
)
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig, attention_bias, rotary_fraction
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``GlmConfig``."""
    return read_decoder(
        hf,
        kv_heads=2,
        d_head=128,
        rotated=0.5,
        eps=1.5625e-7,
        rotary_adjacent_pairs=True,
        default_prepend_bos=False,
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``GlmConfig`` attributes of ``cfg``."""
    return write_decoder(cfg) | {
        "attention_bias": attention_bias(nonzero),
        "partial_rotary_factor": rotary_fraction(cfg),
        "pad_token_id": None,
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    return decoder_rows(hf, attention_rows(hf("attention_bias", True), out_bias=False), FUSED_MLP)


GLM = Family(
    architecture="GlmForCausalLM",
    model_type="glm",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=4096, n_layers=40, n_heads=32, d_mlp=13696, n_ctx=131072, d_vocab=151552),
)
