"""Qwen 1.5, 2 and 2.5 (``Qwen2ForCausalLM``): Llama with query, key and value biases, and a window in later layers."""

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
    """Returns our config for a ``Qwen2Config``."""
    hf.only(use_mrope=False)
    return read_decoder(hf, kv_heads=32, default_prepend_bos=False, **read_switched_window(hf))


def read_switched_window(hf: HFConfig) -> dict[str, Any]:
    """Returns our window fields: a window from ``max_window_layers`` on, where ``use_sliding_window`` is on."""
    size, first = hf("sliding_window", 4096, null=None), hf("max_window_layers", 28)
    size = size if hf("use_sliding_window", False) else None
    return read_window(hf, size, [layer >= first for layer in range(hf("num_hidden_layers"))])


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``Qwen2Config`` attributes of ``cfg``."""
    return write_decoder(cfg) | {
        "use_sliding_window": cfg.use_local_attn,
        "sliding_window": cfg.window_size,
        "layer_types": write_layer_types(cfg),
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    return decoder_rows(hf, attention_rows(qkv_bias=True, out_bias=False), GATED_MLP)


QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=4096, n_layers=32, n_heads=32, d_mlp=22016, n_ctx=32768, d_vocab=151936),
)
