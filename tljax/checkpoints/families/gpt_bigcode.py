"""StarCoder 1 and SantaCoder (``GPTBigCodeForCausalLM``): as GPT-2, with one key/value head for all query heads."""

from typing import Any

from tljax.checkpoints.families.gpt2 import ALIASES
from tljax.checkpoints.families.layers import head, layer_norm, linear, mlp
from tljax.checkpoints.family import Family
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig
from tljax.errors import CheckpointError


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``GPTBigCodeConfig``."""
    hf.only(scale_attn_by_inverse_layer_idx=False)  # written by old versions; this family has no other way
    n_heads = hf("n_head")
    attention_types = (2, 3) if hf("multi_query", True) else (1,)  # the original's names for the same
    if hf("attention_type", attention_types[0]) not in attention_types:
        raise hf.unsupported("attention_type", hf("attention_type"), f"{attention_types} with this multi_query")
    kv_heads = 1 if hf("multi_query", True) else n_heads
    if (stated := hf("num_key_value_heads", kv_heads)) != kv_heads:
        raise CheckpointError(
            f"{hf.origin} sets num_key_value_heads={stated}, but its multi_query={hf('multi_query', True)} "
            f"means {kv_heads}."
        )
    return HookedTransformerConfig(
        d_model=hf("n_embd"),
        n_layers=hf("n_layer"),
        n_heads=n_heads,
        n_key_value_heads=None if kv_heads == n_heads else kv_heads,
        n_ctx=hf("n_positions"),
        d_vocab=hf("vocab_size"),
        d_mlp=hf("n_inner", None),
        act_fn=hf.activation("activation_function", "gelu_pytorch_tanh"),
        eps=hf("layer_norm_epsilon", 1e-5),
        use_attn_scale=hf("scale_attn_weights", True),
        normalization_type="LN",
        positional_embedding_type="standard",
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``GPTBigCodeConfig`` attributes of ``cfg``."""
    return {
        "n_embd": cfg.d_model,
        "n_layer": cfg.n_layers,
        "n_head": cfg.n_heads,
        "multi_query": cfg.kv_heads != cfg.n_heads,
        "n_positions": cfg.n_ctx,
        "vocab_size": cfg.d_vocab,
        "n_inner": cfg.d_mlp,
        "activation_function": cfg.act_fn,
        "layer_norm_epsilon": cfg.eps,
        "scale_attn_weights": cfg.use_attn_scale,
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    embedding, block = "transformer.wte.weight", "transformer.h.{l}"
    fused = "(n_heads+n_kv+n_kv d_head)" if hf("multi_query", True) else "(n_heads 3 d_head)"
    return [
        Row(embedding, "d_vocab d_model", "embed.W_E"),
        Row("transformer.wpe.weight", "n_ctx d_model", "pos_embed.W_pos"),
        *layer_norm(f"{block}.ln_1", "blocks.{l}.ln1"),
        *linear(f"{block}.attn.c_attn", f"{fused} d_model", "blocks.{l}.attn.W_Q|W_K|W_V"),
        *linear(f"{block}.attn.c_proj", "d_model (n_heads d_head)", "blocks.{l}.attn.W_O"),
        *layer_norm(f"{block}.ln_2", "blocks.{l}.ln2"),
        *mlp(f"{block}.mlp.c_fc", f"{block}.mlp.c_proj"),
        *layer_norm("transformer.ln_f", "ln_final"),
        *head(embedding, tied=hf("tie_word_embeddings", True)),
    ]


GPT_BIGCODE = Family(
    architecture="GPTBigCodeForCausalLM",
    model_type="gpt_bigcode",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="transformer.",
    ignored=(r"(transformer\.)?(h\.\d+\.attn\.)?(bias|masked_bias)",),
    defaults={"n_head": 12, "n_embd": 768, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257},
    aliases=ALIASES,
    inert={
        "written next to n_positions by old versions": "n_ctx",
        "kernels and memory of the original": """
            inference_runner max_batch_size pad_key_length pre_allocate_kv_cache validate_runner_input
            runner_max_sequence_length
        """,
    },
)
