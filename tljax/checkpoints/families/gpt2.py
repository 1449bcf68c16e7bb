"""GPT-2 (``GPT2LMHeadModel``): layer norms, learned positions, fused query-key-value, tied embeddings."""

from typing import Any

from tljax.checkpoints.families.layers import head, layer_norm
from tljax.checkpoints.family import Family
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""Other names of the sizes of GPT-2 and its relatives."""


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``GPT2Config``."""
    return HookedTransformerConfig(
        d_model=hf("n_embd"),
        n_layers=hf("n_layer"),
        n_heads=hf("n_head"),
        n_ctx=hf("n_positions"),
        d_vocab=hf("vocab_size"),
        d_mlp=hf("n_inner", None),
        act_fn=hf.activation("activation_function", "gelu_new"),
        eps=hf("layer_norm_epsilon", 1e-5),
        use_attn_scale=hf("scale_attn_weights", True),
        scale_attn_by_inverse_layer_idx=hf("scale_attn_by_inverse_layer_idx", False),
        normalization_type="LN",
        positional_embedding_type="standard",
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``GPT2Config`` attributes of ``cfg``."""
    return {
        "n_embd": cfg.d_model,
        "n_layer": cfg.n_layers,
        "n_head": cfg.n_heads,
        "n_positions": cfg.n_ctx,
        "vocab_size": cfg.d_vocab,
        "n_inner": cfg.d_mlp,
        "activation_function": cfg.act_fn,
        "layer_norm_epsilon": cfg.eps,
        "scale_attn_weights": cfg.use_attn_scale,
        "scale_attn_by_inverse_layer_idx": cfg.scale_attn_by_inverse_layer_idx,
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    embedding, block = "transformer.wte.weight", "transformer.h.{l}"
    return [
        Row(embedding, "d_vocab d_model", "embed.W_E"),
        Row("transformer.wpe.weight", "n_ctx d_model", "pos_embed.W_pos"),
        *layer_norm(f"{block}.ln_1", "blocks.{l}.ln1"),
        Row(f"{block}.attn.c_attn.weight", "d_model (3 n_heads d_head)", "blocks.{l}.attn.W_Q|W_K|W_V"),
        Row(f"{block}.attn.c_attn.bias", "(3 n_heads d_head)", "blocks.{l}.attn.b_Q|b_K|b_V"),
        Row(f"{block}.attn.c_proj.weight", "(n_heads d_head) d_model", "blocks.{l}.attn.W_O"),
        Row(f"{block}.attn.c_proj.bias", "d_model", "blocks.{l}.attn.b_O"),
        *layer_norm(f"{block}.ln_2", "blocks.{l}.ln2"),
        Row(f"{block}.mlp.c_fc.weight", "d_model d_mlp", "blocks.{l}.mlp.W_in"),
        Row(f"{block}.mlp.c_fc.bias", "d_mlp", "blocks.{l}.mlp.b_in"),
        Row(f"{block}.mlp.c_proj.weight", "d_mlp d_model", "blocks.{l}.mlp.W_out"),
        Row(f"{block}.mlp.c_proj.bias", "d_model", "blocks.{l}.mlp.b_out"),
        *layer_norm("transformer.ln_f", "ln_final"),
        *head(embedding, tied=hf("tie_word_embeddings", True)),
    ]


GPT2 = Family(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="transformer.",
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
    defaults={"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
    aliases=ALIASES,
    inert={"written next to n_positions by old versions": "n_ctx"},
)
