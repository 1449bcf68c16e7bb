"""BLOOM (``BloomForCausalLM``): ALiBi, a layer norm on the token embedding, QKV fused head by head."""

from typing import Any

from tljax.checkpoints.families.layers import head, layer_norm, linear, mlp
from tljax.checkpoints.family import Family
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``BloomConfig``."""
    d_model = hf("hidden_size", aka=("n_embed",))
    hf.only(apply_residual_connection_post_layernorm=False, n_inner=4 * d_model, skip_bias_add_qkv=False)
    return HookedTransformerConfig(
        d_model=d_model,
        n_layers=hf("n_layer", aka=("num_hidden_layers",)),
        n_heads=hf("n_head", aka=("num_attention_heads",)),
        n_ctx=hf("seq_length"),  # not a limit: ALiBi has none
        d_vocab=hf("vocab_size"),
        act_fn="gelu_fast",
        eps=hf("layer_norm_epsilon", 1e-5),
        normalization_type="LN",
        positional_embedding_type="alibi",
        post_embedding_ln=True,
        default_prepend_bos=False,
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``BloomConfig`` attributes of ``cfg``."""
    return {
        "hidden_size": cfg.d_model,
        "n_layer": cfg.n_layers,
        "n_head": cfg.n_heads,
        "seq_length": cfg.n_ctx,
        "vocab_size": cfg.d_vocab,
        "layer_norm_epsilon": cfg.eps,
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    embedding, block = "transformer.word_embeddings.weight", "transformer.h.{l}"
    attention = f"{block}.self_attention"
    return [
        Row(embedding, "d_vocab d_model", "embed.W_E"),
        *layer_norm("transformer.word_embeddings_layernorm", "embed.ln"),
        *layer_norm(f"{block}.input_layernorm", "blocks.{l}.ln1"),
        *linear(f"{attention}.query_key_value", "(n_heads 3 d_head) d_model", "blocks.{l}.attn.W_Q|W_K|W_V"),
        *linear(f"{attention}.dense", "d_model (n_heads d_head)", "blocks.{l}.attn.W_O"),
        *layer_norm(f"{block}.post_attention_layernorm", "blocks.{l}.ln2"),
        *mlp(f"{block}.mlp.dense_h_to_4h", f"{block}.mlp.dense_4h_to_h"),
        *layer_norm("transformer.ln_f", "ln_final"),
        *head(embedding, tied=hf("tie_word_embeddings", True)),
    ]


BLOOM = Family(
    architecture="BloomForCausalLM",
    model_type="bloom",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="transformer.",
    defaults={"hidden_size": 64, "n_layer": 2, "n_head": 8, "vocab_size": 250880, "seq_length": 2048},
    aliases={"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    inert={
        "kernels of the training code": "bias_dropout_fusion masked_softmax_fusion offset_alibi skip_bias_add",
        "the order of a sum": "slow_but_exact",
    },
)
