"""Mistral and Ministral: Llama with a window, in every layer (``MistralForCausalLM``) or in some."""

import dataclasses
from typing import Any

from tljax.checkpoints.families.llama import (
    GATED_MLP,
    IGNORED,
    attention_rows,
    decoder_rows,
    read_decoder,
    read_window,
    write_decoder,
    write_layer_types,
)
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``MistralConfig`` or a ``MinistralConfig``.

    A Mistral config with ``layer_types`` describes a Ministral, and transformers takes it for one.
    """
    size = hf("sliding_window", 4096, null=None)
    return read_decoder(hf, kv_heads=8, **read_window(hf, size, [True] * hf("num_hidden_layers")))


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``MistralConfig`` or ``MinistralConfig`` attributes of ``cfg``."""
    kinds = write_layer_types(cfg)
    mixed = {"layer_types": kinds} if cfg.use_local_attn and "full_attention" in kinds else {}
    return write_decoder(cfg) | {"sliding_window": cfg.window_size} | mixed


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    return decoder_rows(hf, attention_rows(qkv_bias=False, out_bias=False), GATED_MLP)


MISTRAL = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=4096, n_layers=32, n_heads=32, d_mlp=14336, n_ctx=131072, d_vocab=32000),
)
MINISTRAL = dataclasses.replace(MISTRAL, architecture="MinistralForCausalLM", model_type="ministral")
