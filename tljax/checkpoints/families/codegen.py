"""CodeGen (``CodeGenForCausalLM``): GPT-J with its QKV fused in four blocks, each of query, value, key."""

from tljax.checkpoints.families import gptj
from tljax.checkpoints.families.gpt2 import ALIASES
from tljax.checkpoints.families.layers import head, layer_norm, linear, mlp
from tljax.checkpoints.family import Family
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

BLOCKS = 4
"""The accelerators that the original was trained on: each held a run of the heads."""


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``CodeGenConfig``."""
    cfg = gptj.read_config(hf)
    if cfg.n_heads % BLOCKS:
        raise hf.unsupported("n_head", cfg.n_heads, f"multiples of {BLOCKS}")
    return cfg


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    embedding, block = "transformer.wte.weight", "transformer.h.{l}"
    fused = Row(
        f"{block}.attn.qkv_proj.weight",
        f"({BLOCKS} 3 n_heads/{BLOCKS} d_head) d_model",
        "blocks.{l}.attn.W_Q|W_V|W_K",
    )
    return [
        Row(embedding, "d_vocab d_model", "embed.W_E"),
        *layer_norm(f"{block}.ln_1", "blocks.{l}.ln1", "blocks.{l}.ln2"),
        fused,
        *linear(f"{block}.attn.out_proj", "d_model (n_heads d_head)", "blocks.{l}.attn.W_O", biased=False),
        *mlp(f"{block}.mlp.fc_in", f"{block}.mlp.fc_out"),
        *layer_norm("transformer.ln_f", "ln_final"),
        *head(embedding, tied=hf("tie_word_embeddings", False), biased=True),
    ]


CODEGEN = Family(
    architecture="CodeGenForCausalLM",
    model_type="codegen",
    read_config=read_config,
    write_config=gptj.write_config,
    rows=rows,
    prefix="transformer.",
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias|causal_mask)",),
    defaults={"n_embd": 4096, "n_layer": 28, "n_head": 16, "n_positions": 2048, "vocab_size": 50400},
    aliases=ALIASES,
    inert={"written next to n_positions by old versions": "n_ctx"},
)
