"""GPT-J (``GPTJForCausalLM``): attention and MLP in parallel after one norm, rotary in adjacent pairs."""

from typing import Any

from tljax.checkpoints.families.gpt2 import ALIASES
from tljax.checkpoints.families.layers import attention, head, layer_norm, mlp
from tljax.checkpoints.family import Family
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``GPTJConfig``."""
    hf.only(rotary=True, scale_attn_weights=True)  # written by old versions; GPT-J has no other way
    return HookedTransformerConfig(
        d_model=hf("n_embd"),
        n_layers=hf("n_layer"),
        n_heads=hf("n_head"),
        n_ctx=hf("n_positions"),
        d_vocab=hf("vocab_size"),
        d_mlp=hf("n_inner", None),
        act_fn=hf.activation("activation_function", "gelu_new"),
        eps=hf("layer_norm_epsilon", 1e-5),
        parallel_attn_mlp=True,
        normalization_type="LN",
        positional_embedding_type="rotary",
        rotary_dim=hf("rotary_dim", 64),
        rotary_adjacent_pairs=True,
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``GPTJConfig`` attributes of ``cfg``."""
    return {
        "n_embd": cfg.d_model,
        "n_layer": cfg.n_layers,
        "n_head": cfg.n_heads,
        "n_positions": cfg.n_ctx,
        "vocab_size": cfg.d_vocab,
        "n_inner": cfg.d_mlp,
        "activation_function": cfg.act_fn,
        "layer_norm_epsilon": cfg.eps,
        "rotary_dim": cfg.rotary_dim,
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    embedding, block = "transformer.wte.weight", "transformer.h.{l}"
    return [
        Row(embedding, "d_vocab d_model", "embed.W_E"),
        *layer_norm(f"{block}.ln_1", "blocks.{l}.ln1", "blocks.{l}.ln2"),
        *attention(f"{block}.attn", biased=False, out_biased=False),
        *mlp(f"{block}.mlp.fc_in", f"{block}.mlp.fc_out"),
        *layer_norm("transformer.ln_f", "ln_final"),
        *head(embedding, tied=hf("tie_word_embeddings", False), biased=True),
    ]


GPTJ = Family(
    architecture="GPTJForCausalLM",
    model_type="gptj",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="transformer.",
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
    defaults={"n_embd": 4096, "n_layer": 28, "n_head": 16, "n_positions": 2048, "vocab_size": 50400},
    aliases=ALIASES,
    inert={"written next to n_positions by old versions": "n_ctx"},
)
