"""OLMo 2 (``Olmo2ForCausalLM``): Llama whose norms come after attention and MLP, and over all queries and all keys."""

from typing import Any

from tljax.checkpoints.families.llama import (
    BLOCK,
    GATED_MLP,
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

JOINT_QK_NORM = (
    Row(f"{BLOCK}.self_attn.q_norm.weight", "q_width", "blocks.{l}.attn.q_norm.w"),
    Row(f"{BLOCK}.self_attn.k_norm.weight", "kv_width", "blocks.{l}.attn.k_norm.w"),
)
NORMS_AFTER = (
    Row(f"{BLOCK}.post_attention_layernorm.weight", "d_model", "blocks.{l}.ln1_post.w"),
    Row(f"{BLOCK}.post_feedforward_layernorm.weight", "d_model", "blocks.{l}.ln2_post.w"),
)


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for an ``Olmo2Config``."""
    return read_olmo2(hf)


def read_olmo2(hf: HFConfig, **options: Any) -> HookedTransformerConfig:
    """Returns what OLMo 2 and 3 share; ``options`` go to :func:`tljax.checkpoints.families.llama.read_decoder`."""
    return read_decoder(
        hf, eps=1e-5, use_normalization_after_only=True, use_qk_norm=True, qk_norm_span="joint", **options
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``Olmo2Config`` attributes of ``cfg``."""
    return write_decoder(cfg) | {
        "attention_bias": attention_bias(nonzero),
        "pad_token_id": None,  # transformers' default may lie outside a smaller vocabulary
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    biased = hf("attention_bias", False)
    return norms_after(decoder_rows(hf, [*attention_rows(biased, biased), *JOINT_QK_NORM], GATED_MLP))


def norms_after(table: list[Row]) -> list[Row]:
    """Returns a decoder's table with the two norms of a block behind attention and MLP."""
    return [row for row in table if row.paths not in ("blocks.{l}.ln1.w", "blocks.{l}.ln2.w")] + list(NORMS_AFTER)


OLMO2 = Family(
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=4096, n_layers=32, n_heads=32, d_mlp=11008, n_ctx=2048, d_vocab=50304),
)
