"""Granite 3 (``GraniteForCausalLM``): Llama with multipliers for embeddings, scores, the residual stream and logits."""

from typing import Any

from tljax.checkpoints.families import llama
from tljax.checkpoints.families.llama import IGNORED, read_decoder, read_mlp_bias, write_decoder
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig, attention_bias
from tljax.config import HookedTransformerConfig


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``GraniteConfig``."""
    return read_decoder(
        hf,
        **read_mlp_bias(hf),
        attn_scale=1.0 / hf("attention_multiplier", 1.0),
        embedding_multiplier=float(hf("embedding_multiplier", 1.0)),
        residual_multiplier=float(hf("residual_multiplier", 1.0)),
        logits_multiplier=1.0 / hf("logits_scaling", 1.0),
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``GraniteConfig`` attributes of ``cfg``."""
    return write_decoder(cfg) | {
        "attention_bias": attention_bias(nonzero),
        "mlp_bias": cfg.gated_mlp_bias,
        "attention_multiplier": 1.0 / cfg.attn_scale,
        "embedding_multiplier": cfg.embedding_multiplier,
        "residual_multiplier": cfg.residual_multiplier,
        "logits_scaling": 1.0 / cfg.logits_multiplier,
    }


GRANITE = Family(
    architecture="GraniteForCausalLM",
    model_type="granite",
    read_config=read_config,
    write_config=write_config,
    rows=llama.rows_with_mlp_bias,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=4096, n_layers=32, n_heads=32, d_mlp=11008, n_ctx=2048, d_vocab=32000),
)
