"""Qwen 3 (``Qwen3ForCausalLM``): Qwen 2 with an RMS norm over each head's queries and keys instead of their biases."""

from typing import Any

from tljax.checkpoints.families import qwen2
from tljax.checkpoints.families.llama import (
    GATED_MLP,
    IGNORED,
    QK_NORM,
    attention_rows,
    decoder_rows,
    read_decoder,
)
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig, attention_bias
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``Qwen3Config``."""
    return read_decoder(
        hf, kv_heads=32, d_head=128, use_qk_norm=True, default_prepend_bos=False, **qwen2.read_switched_window(hf)
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``Qwen3Config`` attributes of ``cfg``."""
    return qwen2.write_config(cfg, nonzero) | {"attention_bias": attention_bias(nonzero)}


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    biased = hf("attention_bias", False)
    return decoder_rows(hf, [*attention_rows(biased, biased), *QK_NORM], GATED_MLP)


QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=4096, n_layers=32, n_heads=32, d_mlp=22016, n_ctx=32768, d_vocab=151936),
)
