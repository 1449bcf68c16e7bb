"""Llama 1, 2 and 3 (``LlamaForCausalLM``): RMS norms, rotary, grouped key/value heads, gated MLP."""

from typing import Any

from tljax.checkpoints.hf_config import HFConfig, attention_bias, rope_scaling
from tljax.checkpoints.mapping import Family, Row
from tljax.config import HookedTransformerConfig


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``LlamaConfig``."""
    hf.only(mlp_bias=False, rope_interleaved=False)  # our gated MLP adds b_in after the product, Llama's before it
    n_heads = hf("num_attention_heads")
    kv_heads = hf("num_key_value_heads", n_heads)
    d_head = hf("head_dim", hf("hidden_size") // n_heads)
    rotary = hf.rotary(d_head)
    if rotary["rotary_dim"] != d_head:
        raise hf.unsupported("partial_rotary_factor", rotary["rotary_dim"] / d_head, "1.0")
    return HookedTransformerConfig(
        d_model=hf("hidden_size"),
        n_layers=hf("num_hidden_layers"),
        n_heads=n_heads,
        n_key_value_heads=None if kv_heads == n_heads else kv_heads,
        d_head=d_head,
        n_ctx=hf("max_position_embeddings"),
        d_vocab=hf("vocab_size"),
        d_mlp=hf("intermediate_size"),
        act_fn=hf.activation("hidden_act", "silu"),
        gated_mlp=True,
        eps=hf("rms_norm_eps", 1e-6),
        normalization_type="RMS",
        **rotary,
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``LlamaConfig`` attributes of ``cfg``."""
    return {
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.d_head,
        "max_position_embeddings": cfg.n_ctx,
        "vocab_size": cfg.d_vocab,
        "intermediate_size": cfg.d_mlp,
        "hidden_act": cfg.act_fn,
        "rms_norm_eps": cfg.eps,
        "rope_theta": cfg.rotary_base,
        "rope_scaling": rope_scaling(cfg),
        "attention_bias": attention_bias(nonzero),
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    embedding = "model.embed_tokens.weight"
    tied = hf("tie_word_embeddings", False)
    block = "model.layers.{l}"
    biases = [
        Row(f"{block}.self_attn.q_proj.bias", "(n_heads d_head)", "blocks.{l}.attn.b_Q"),
        Row(f"{block}.self_attn.k_proj.bias", "(n_kv d_head)", "blocks.{l}.attn.b_K"),
        Row(f"{block}.self_attn.v_proj.bias", "(n_kv d_head)", "blocks.{l}.attn.b_V"),
        Row(f"{block}.self_attn.o_proj.bias", "d_model", "blocks.{l}.attn.b_O"),
    ]
    return [
        Row(embedding, "d_vocab d_model", "embed.W_E"),
        Row(f"{block}.input_layernorm.weight", "d_model", "blocks.{l}.ln1.w"),
        Row(f"{block}.self_attn.q_proj.weight", "(n_heads d_head) d_model", "blocks.{l}.attn.W_Q"),
        Row(f"{block}.self_attn.k_proj.weight", "(n_kv d_head) d_model", "blocks.{l}.attn.W_K"),
        Row(f"{block}.self_attn.v_proj.weight", "(n_kv d_head) d_model", "blocks.{l}.attn.W_V"),
        Row(f"{block}.self_attn.o_proj.weight", "d_model (n_heads d_head)", "blocks.{l}.attn.W_O"),
        *(biases if hf("attention_bias", False) else ()),
        Row(f"{block}.post_attention_layernorm.weight", "d_model", "blocks.{l}.ln2.w"),
        Row(f"{block}.mlp.gate_proj.weight", "d_mlp d_model", "blocks.{l}.mlp.W_gate"),
        Row(f"{block}.mlp.up_proj.weight", "d_mlp d_model", "blocks.{l}.mlp.W_in"),
        Row(f"{block}.mlp.down_proj.weight", "d_model d_mlp", "blocks.{l}.mlp.W_out"),
        Row("model.norm.weight", "d_model", "ln_final.w"),
        Row("lm_head.weight", "d_vocab_out d_model", "unembed.W_U", tied_to=embedding if tied else None),
    ]


LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq"),
)
