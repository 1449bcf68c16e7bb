"""GPT-NeoX and Pythia (``GPTNeoXForCausalLM``): parallel blocks, partial rotary, QKV fused head by head."""

from typing import Any

from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig, attention_bias, rope_scaling, rotary_fraction
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``GPTNeoXConfig``."""
    d_head = hf("hidden_size") // hf("num_attention_heads")
    return HookedTransformerConfig(
        d_model=hf("hidden_size"),
        n_layers=hf("num_hidden_layers"),
        n_heads=hf("num_attention_heads"),
        d_head=d_head,
        n_ctx=hf("max_position_embeddings"),
        d_vocab=hf("vocab_size"),
        d_mlp=hf("intermediate_size"),
        act_fn=hf.activation("hidden_act", "gelu"),
        eps=hf("layer_norm_eps", 1e-5),
        parallel_attn_mlp=hf("use_parallel_residual", True),
        normalization_type="LN",
        default_prepend_bos=False,
        **hf.rotary(d_head, theta="rotary_emb_base", fraction="rotary_pct", default_fraction=0.25),
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``GPTNeoXConfig`` attributes of ``cfg``."""
    return {
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "max_position_embeddings": cfg.n_ctx,
        "vocab_size": cfg.d_vocab,
        "intermediate_size": cfg.d_mlp,
        "hidden_act": cfg.act_fn,
        "layer_norm_eps": cfg.eps,
        "use_parallel_residual": cfg.parallel_attn_mlp,
        "rotary_emb_base": cfg.rotary_base,
        "rotary_pct": rotary_fraction(cfg),
        "rope_scaling": rope_scaling(cfg),
        "attention_bias": attention_bias(nonzero),
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    embedding = "gpt_neox.embed_in.weight"
    tied = hf("tie_word_embeddings", False)
    block = "gpt_neox.layers.{l}"
    biases = [
        Row(f"{block}.attention.query_key_value.bias", "(n_heads 3 d_head)", "blocks.{l}.attn.b_Q|b_K|b_V"),
        Row(f"{block}.attention.dense.bias", "d_model", "blocks.{l}.attn.b_O"),
    ]
    return [
        Row(embedding, "d_vocab d_model", "embed.W_E"),
        Row(f"{block}.input_layernorm.weight", "d_model", "blocks.{l}.ln1.w"),
        Row(f"{block}.input_layernorm.bias", "d_model", "blocks.{l}.ln1.b"),
        Row(
            f"{block}.attention.query_key_value.weight",
            "(n_heads 3 d_head) d_model",
            "blocks.{l}.attn.W_Q|W_K|W_V",
        ),
        Row(f"{block}.attention.dense.weight", "d_model (n_heads d_head)", "blocks.{l}.attn.W_O"),
        *(biases if hf("attention_bias", True) else ()),
        Row(f"{block}.post_attention_layernorm.weight", "d_model", "blocks.{l}.ln2.w"),
        Row(f"{block}.post_attention_layernorm.bias", "d_model", "blocks.{l}.ln2.b"),
        Row(f"{block}.mlp.dense_h_to_4h.weight", "d_mlp d_model", "blocks.{l}.mlp.W_in"),
        Row(f"{block}.mlp.dense_h_to_4h.bias", "d_mlp", "blocks.{l}.mlp.b_in"),
        Row(f"{block}.mlp.dense_4h_to_h.weight", "d_model d_mlp", "blocks.{l}.mlp.W_out"),
        Row(f"{block}.mlp.dense_4h_to_h.bias", "d_model", "blocks.{l}.mlp.b_out"),
        Row("gpt_neox.final_layer_norm.weight", "d_model", "ln_final.w"),
        Row("gpt_neox.final_layer_norm.bias", "d_model", "ln_final.b"),
        Row(
            "embed_out.weight",
            "d_vocab_out d_model",
            "unembed.W_U",
            aka="lm_head.weight",
            tied_to=embedding if tied else None,
        ),
    ]


NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="gpt_neox.",
    ignored=(r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    defaults=sizes(d_model=6144, n_layers=44, n_heads=64, d_mlp=24576, n_ctx=2048, d_vocab=50432),
)
