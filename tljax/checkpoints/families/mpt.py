"""MPT (``MptForCausalLM``): ALiBi, no bias anywhere, norms included; fused QKV that may be clipped."""

import math
from typing import Any

from tljax.checkpoints.families.layers import head, linear, mlp
from tljax.checkpoints.family import Family
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for an ``MptConfig``."""
    hf.only(expansion_ratio=4, no_bias=True, logit_scale=None)
    norm = hf("norm_type", "low_precision_layernorm")
    if norm not in ("low_precision_layernorm", "layernorm"):
        raise hf.unsupported("norm_type", norm, "low_precision_layernorm, layernorm")
    return HookedTransformerConfig(
        d_model=hf("d_model"),
        n_layers=hf("n_layers"),
        n_heads=hf("n_heads"),
        n_ctx=hf("max_seq_len"),
        d_vocab=hf("vocab_size"),
        act_fn="gelu",
        eps=hf("layer_norm_epsilon", 1e-5),
        normalization_type="LN",
        positional_embedding_type="alibi",
        default_prepend_bos=False,
        **_read_attention(hf),
    )


def _read_attention(hf: HFConfig) -> dict[str, Any]:
    attention = hf.nested("attn_config")
    for name in ("attn_impl", "rope_impl", "rope_theta", "rope_dail_config", "rope_hf_config"):
        attention(name, None)  # kernels, and a rotation that is off
    attention.only(
        alibi=True,
        attn_type="multihead_attention",
        prefix_lm=False,
        qk_ln=False,
        qk_gn=False,
        attn_uses_sequence_id=False,
        rope=False,
        sliding_window_size=-1,
        alibi_bias_max=8,  # transformers takes no other
    )
    scale = attention("softmax_scale", None)
    fields = {
        "clip_qkv": attention("clip_qkv", None) or None,
        "attn_scale": -1.0 if scale is None else 1.0 / scale,
    }
    attention.refuse_unread()
    return fields


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``MptConfig`` attributes of ``cfg``."""
    usual = math.isclose(cfg.attn_scale, math.sqrt(cfg.d_head))
    attention = {
        "clip_qkv": cfg.clip_qkv,
        "softmax_scale": None if usual else 1.0 / cfg.attn_scale,
    }
    return {
        "d_model": cfg.d_model,
        "n_layers": cfg.n_layers,
        "n_heads": cfg.n_heads,
        "max_seq_len": cfg.n_ctx,
        "vocab_size": cfg.d_vocab,
        "layer_norm_epsilon": cfg.eps,
        "attn_config": attention,
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    embedding, block = "transformer.wte.weight", "transformer.blocks.{l}"
    fused, out = f"{block}.attn.Wqkv", f"{block}.attn.out_proj"
    return [
        Row(embedding, "d_vocab d_model", "embed.W_E"),
        Row(f"{block}.norm_1.weight", "d_model", "blocks.{l}.ln1.w"),
        *linear(fused, "(3 n_heads d_head) d_model", "blocks.{l}.attn.W_Q|W_K|W_V", biased=False),
        *linear(out, "d_model (n_heads d_head)", "blocks.{l}.attn.W_O", biased=False),
        Row(f"{block}.norm_2.weight", "d_model", "blocks.{l}.ln2.w"),
        *mlp(f"{block}.ffn.up_proj", f"{block}.ffn.down_proj", biased=False),
        Row("transformer.norm_f.weight", "d_model", "ln_final.w"),
        *head(embedding, tied=hf("tie_word_embeddings", True)),
    ]


MPT = Family(
    architecture="MptForCausalLM",
    model_type="mpt",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="transformer.",
    aka="MPTForCausalLM",
    defaults={"d_model": 2048, "n_layers": 24, "n_heads": 16, "vocab_size": 50368, "max_seq_len": 2048},
    aliases={"num_attention_heads": "n_heads", "hidden_size": "d_model", "num_hidden_layers": "n_layers"},
    own_code="mpt",
    inert={
        "settings of the training code": """
            emb_pdrop embedding_fraction fused_cross_entropy init_config init_device is_hf verbose
        """,
        "which classes make the layers, all of them alike": "fc_type ffn_config use_pad_tok_in_ffn",
        "positions that are learned exist only without ALiBi": "learned_pos_emb",
    },
)
