"""Command R (``CohereForCausalLM``): parallel blocks behind one layer norm without bias, and scaled logits."""

from typing import Any

from tljax.checkpoints.families.layers import head
from tljax.checkpoints.families.llama import (
    BLOCK,
    GATED_MLP,
    IGNORED,
    attention_rows,
    read_decoder,
    write_decoder,
)
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig, attention_bias
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

QK_NORM = (
    Row(f"{BLOCK}.self_attn.q_norm.weight", "n_heads d_head", "blocks.{l}.attn.q_norm.w"),
    Row(f"{BLOCK}.self_attn.k_norm.weight", "n_kv d_head", "blocks.{l}.attn.k_norm.w"),
)


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``CohereConfig``."""
    fields = {"use_qk_norm": True, "qk_norm_type": "LN", "qk_norm_span": "per_head"}
    return read_cohere(hf, theta=500000.0, **(fields if hf("use_qk_norm", False) else {}))


def read_cohere(hf: HFConfig, **options: Any) -> HookedTransformerConfig:
    """Returns what all Coheres share; ``options`` go to :func:`tljax.checkpoints.families.llama.read_decoder`."""
    cfg = read_decoder(
        hf,
        parallel_attn_mlp=True,
        rotary_adjacent_pairs=True,
        logits_multiplier=float(hf("logit_scale", 0.0625)),
        **options,
    )
    return cfg.replace(normalization_type="LN", eps=hf("layer_norm_eps", 1e-5))


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``CohereConfig`` attributes of ``cfg``."""
    return write_cohere(cfg, nonzero) | {"use_qk_norm": cfg.use_qk_norm}


def write_cohere(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the attributes that :func:`read_cohere` reads back."""
    attributes = write_decoder(cfg)
    return attributes | {
        "layer_norm_eps": attributes.pop("rms_norm_eps"),
        "logit_scale": cfg.logits_multiplier,
        "attention_bias": attention_bias(nonzero),
        "pad_token_id": None,  # transformers' default may lie outside a smaller vocabulary
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    embedding, biased = "model.embed_tokens.weight", hf("attention_bias", False)
    return [
        Row(embedding, "d_vocab d_model", "embed.W_E"),
        *(Row(f"{BLOCK}.input_layernorm.weight", "d_model", f"blocks.{{l}}.{norm}.w") for norm in ("ln1", "ln2")),
        *attention_rows(biased, biased),
        *(QK_NORM if hf("use_qk_norm", False) else ()),
        *GATED_MLP,
        Row("model.norm.weight", "d_model", "ln_final.w"),
        *head(embedding, tied=hf("tie_word_embeddings", True)),
    ]


COHERE = Family(
    architecture="CohereForCausalLM",
    model_type="cohere",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=8192, n_layers=40, n_heads=64, d_mlp=22528, n_ctx=8192, d_vocab=256000),
    own_code="cohere",
)
