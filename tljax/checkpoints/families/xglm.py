"""XGLM (``XGLMForCausalLM``): OPT's block; positions are sines and cosines, computed and not stored."""

import functools
import math
from typing import Any

import numpy as np

from tljax.checkpoints.families.layers import attention, head, layer_norm, mlp
from tljax.checkpoints.family import Family
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

OFFSET = 2
"""The position of the first token."""
MOST_POSITIONS = 2**20


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for an ``XGLMConfig``."""
    width, n_ctx = hf("d_model", aka=("hidden_size",)), hf("max_position_embeddings")
    if n_ctx > MOST_POSITIONS:  # no tensor says how many there are
        raise hf.unsupported("max_position_embeddings", n_ctx, f"at most {MOST_POSITIONS:,}")
    return HookedTransformerConfig(
        d_model=width,
        n_layers=hf("num_layers", aka=("num_hidden_layers",)),
        n_heads=hf("attention_heads", aka=("num_attention_heads",)),
        n_ctx=n_ctx,
        d_vocab=hf("vocab_size"),
        d_mlp=hf("ffn_dim"),
        act_fn=hf.activation("activation_function", "gelu"),
        eps=1e-5,
        embedding_multiplier=math.sqrt(width) if hf("scale_embedding", True) else 1.0,
        normalization_type="LN",
        positional_embedding_type="standard",
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``XGLMConfig`` attributes of ``cfg``."""
    return {
        "d_model": cfg.d_model,
        "num_layers": cfg.n_layers,
        "attention_heads": cfg.n_heads,
        "max_position_embeddings": cfg.n_ctx,
        "vocab_size": cfg.d_vocab,
        "ffn_dim": cfg.d_mlp,
        "activation_function": cfg.act_fn,
        "scale_embedding": cfg.embedding_multiplier != 1.0,
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    embedding, block = "model.embed_tokens.weight", "model.layers.{l}"
    return [
        Row(embedding, "d_vocab d_model", "embed.W_E"),
        *layer_norm(f"{block}.self_attn_layer_norm", "blocks.{l}.ln1"),
        *attention(f"{block}.self_attn", biased=True, out_biased=True),
        *layer_norm(f"{block}.final_layer_norm", "blocks.{l}.ln2"),
        *mlp(f"{block}.fc1", f"{block}.fc2"),
        *layer_norm("model.layer_norm", "ln_final"),
        *head(embedding, tied=hf("tie_word_embeddings", True)),
    ]


def positions(cfg: HookedTransformerConfig) -> np.ndarray:
    """Returns the position embedding: sines in the first half of its width, cosines of the same angles in the second.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.5; in float32 throughout, as in the original.
    """
    half = cfg.d_model // 2
    slowing = np.float32(math.log(10000.0) / max(half - 1, 1))
    speeds = np.exp(-slowing * np.arange(half, dtype=np.float32))
    angles = np.arange(OFFSET, cfg.n_ctx + OFFSET, dtype=np.float32)[:, None] * speeds
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return np.pad(table, ((0, 0), (0, cfg.d_model - 2 * half)))


XGLM = Family(
    architecture="XGLMForCausalLM",
    model_type="xglm",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=(r"(model\.)?embed_positions\.weights",),
    computed=lambda cfg: {"pos_embed.W_pos": functools.partial(positions, cfg)},
    defaults={
        "d_model": 1024,
        "num_layers": 24,
        "attention_heads": 16,
        "vocab_size": 256008,
        "ffn_dim": 4096,
        "max_position_embeddings": 2048,
    },
    aliases={"num_attention_heads": "attention_heads", "hidden_size": "d_model", "num_hidden_layers": "num_layers"},
)
