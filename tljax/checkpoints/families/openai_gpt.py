"""GPT-1 (``OpenAIGPTLMHeadModel``): GPT-2's tensors, with norms of the residual stream itself and no final one."""

from typing import Any

from tljax.checkpoints.families.gpt2 import ALIASES
from tljax.checkpoints.families.layers import head, layer_norm
from tljax.checkpoints.family import Family
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu", "silu": "silu", "swish": "silu"}
"""Its own names: what it calls gelu is the approximation by tanh."""


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for an ``OpenAIGPTConfig``."""
    activation = hf("afn", "gelu")
    if activation not in ACTIVATIONS:
        raise hf.unsupported("afn", activation, ", ".join(ACTIVATIONS))
    return HookedTransformerConfig(
        d_model=hf("n_embd"),
        n_layers=hf("n_layer"),
        n_heads=hf("n_head"),
        n_ctx=hf("n_positions"),
        d_vocab=hf("vocab_size"),
        act_fn=ACTIVATIONS[activation],
        eps=hf("layer_norm_epsilon", 1e-5),
        normalization_type="LN",
        use_normalization_of_residual=True,
        positional_embedding_type="standard",
        default_prepend_bos=False,  # its vocabulary has no token that starts a text
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``OpenAIGPTConfig`` attributes of ``cfg``."""
    return {
        "n_embd": cfg.d_model,
        "n_layer": cfg.n_layers,
        "n_head": cfg.n_heads,
        "n_positions": cfg.n_ctx,
        "vocab_size": cfg.d_vocab,
        "afn": next((name for name, ours in ACTIVATIONS.items() if ours == cfg.act_fn), cfg.act_fn),
        "layer_norm_epsilon": cfg.eps,
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    embedding, block = "transformer.tokens_embed.weight", "transformer.h.{l}"
    ours = "blocks.{l}"
    return [
        Row(embedding, "d_vocab d_model", "embed.W_E"),
        Row("transformer.positions_embed.weight", "n_ctx d_model", "pos_embed.W_pos"),
        Row(f"{block}.attn.c_attn.weight", "d_model (3 n_heads d_head)", f"{ours}.attn.W_Q|W_K|W_V"),
        Row(f"{block}.attn.c_attn.bias", "(3 n_heads d_head)", f"{ours}.attn.b_Q|b_K|b_V"),
        Row(f"{block}.attn.c_proj.weight", "(n_heads d_head) d_model", f"{ours}.attn.W_O"),
        Row(f"{block}.attn.c_proj.bias", "d_model", f"{ours}.attn.b_O"),
        *layer_norm(f"{block}.ln_1", f"{ours}.ln1"),
        Row(f"{block}.mlp.c_fc.weight", "d_model d_mlp", f"{ours}.mlp.W_in"),
        Row(f"{block}.mlp.c_fc.bias", "d_mlp", f"{ours}.mlp.b_in"),
        Row(f"{block}.mlp.c_proj.weight", "d_mlp d_model", f"{ours}.mlp.W_out"),
        Row(f"{block}.mlp.c_proj.bias", "d_model", f"{ours}.mlp.b_out"),
        *layer_norm(f"{block}.ln_2", f"{ours}.ln2"),
        *head(embedding, tied=hf("tie_word_embeddings", True)),
    ]


OPENAI_GPT = Family(
    architecture="OpenAIGPTLMHeadModel",
    model_type="openai-gpt",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="transformer.",
    ignored=(r"(transformer\.)?(position_ids|h\.\d+\.attn\.bias)",),
    defaults={"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 512, "vocab_size": 40478},
    aliases=ALIASES,
    inert={"written next to n_positions by old versions": "n_ctx"},
)
