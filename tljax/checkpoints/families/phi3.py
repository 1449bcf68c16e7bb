"""Phi-3 and Phi-4 (``Phi3ForCausalLM``): Llama with fused projections, partial rotary and a window."""

from typing import Any

from tljax.checkpoints.families.llama import (
    BLOCK,
    FUSED_MLP,
    IGNORED,
    decoder_rows,
    read_decoder,
    read_window,
    write_decoder,
)
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig, rope_scaling, rotary_fraction
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

OWN_CODE = ("configuration_phi3.", "modeling_phi3.")
"""The modules that Microsoft's checkpoints bring along; transformers has the same code and prefers its own."""


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``Phi3Config``."""
    hf.only(attention_bias=False, mlp_bias=False, lm_head_bias=False, full_attn_mod=1, interpolate_factor=1)
    hf("original_max_position_embeddings", None)  # of long rope, without which it says nothing
    window = read_window(hf, hf("sliding_window", None), [True] * hf("num_hidden_layers"))
    cfg = read_decoder(hf, rotated=1.0, eps=1e-5, **window)
    scaling = rope_scaling(cfg)
    if scaling is not None and not cfg.uses_longrope:
        raise hf.unsupported("rope_type", scaling["rope_type"], "default, longrope")
    if cfg.uses_longrope:
        hf("original_max_position_embeddings")  # only there does transformers look for it
    return cfg


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``Phi3Config`` attributes of ``cfg``."""
    attributes = write_decoder(cfg) | {
        "sliding_window": cfg.window_size,
        "partial_rotary_factor": rotary_fraction(cfg),
        "pad_token_id": None,
    }
    if cfg.uses_longrope:
        attributes["original_max_position_embeddings"] = cfg.longrope_original_max_position_embeddings
    return attributes


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    attention = [
        Row(
            f"{BLOCK}.self_attn.qkv_proj.weight",
            "(n_heads+n_kv+n_kv d_head) d_model",
            "blocks.{l}.attn.W_Q|W_K|W_V",
        ),
        Row(f"{BLOCK}.self_attn.o_proj.weight", "d_model (n_heads d_head)", "blocks.{l}.attn.W_O"),
    ]
    return decoder_rows(hf, attention, FUSED_MLP)


PHI3 = Family(
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=3072, n_layers=32, n_heads=32, d_mlp=8192, n_ctx=4096, d_vocab=32064),
    own_code="phi3",
)
