"""Falcon 7B and its like (``FalconForCausalLM``, old decoder): one key/value head, one layer norm a parallel block.

Not the new decoder of Falcon 40B and 180B, which fuses each key/value head with its own group of query heads,
and not the models with alibi.
"""

import re
from typing import Any

from tljax.checkpoints.families.layers import head, layer_norm, linear, mlp
from tljax.checkpoints.hf_config import HFConfig, rope_scaling
from tljax.checkpoints.mapping import Family, Row
from tljax.config import HookedTransformerConfig

OWN_CODE = re.compile(r"(?:tiiuae/[^/]+--)?(?:configuration|modeling)_falcon\.Falcon\w+")
"""The code first published with the checkpoints, which transformers took over."""


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``FalconConfig``."""
    hf.only(alibi=False, new_decoder_architecture=False, apply_residual_connection_post_layernorm=False)
    d_model, n_heads = hf("hidden_size", aka=("n_embed",)), hf("num_attention_heads")
    d_head, parallel = d_model // n_heads, hf("parallel_attn", True)
    hf.only(head_dim=d_head)
    multi_query = hf("multi_query", True)
    if not multi_query:
        hf.only(num_kv_heads=n_heads)
    hf("num_kv_heads", None)  # with multi_query there is one, whatever this says
    if parallel:
        hf.only(num_ln_in_parallel_attn=1)
    hf("num_ln_in_parallel_attn", None)
    code = {key: str(name) for key, name in hf("auto_map", {}).items() if not OWN_CODE.fullmatch(str(name))}
    if code:
        raise hf.unsupported("auto_map", code, OWN_CODE.pattern)
    rotary = hf.rotary(d_head)
    return HookedTransformerConfig(
        d_model=d_model,
        n_layers=hf("num_hidden_layers"),
        n_heads=n_heads,
        n_key_value_heads=1 if multi_query and n_heads > 1 else None,
        d_head=d_head,
        n_ctx=hf("max_position_embeddings", 2048),
        d_vocab=hf("vocab_size"),
        d_mlp=hf("ffn_hidden_size", 4 * d_model),
        act_fn=hf.activation("activation", "gelu"),
        eps=hf("layer_norm_epsilon", 1e-5),
        parallel_attn_mlp=parallel,
        normalization_type="LN",
        **rotary,
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``FalconConfig`` attributes of ``cfg``."""
    return {
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_kv_heads": cfg.kv_heads,
        "multi_query": cfg.kv_heads == 1,
        "parallel_attn": cfg.parallel_attn_mlp,
        "max_position_embeddings": cfg.n_ctx,
        "vocab_size": cfg.d_vocab,
        "ffn_hidden_size": cfg.d_mlp,
        "activation": cfg.act_fn,
        "layer_norm_epsilon": cfg.eps,
        "rope_theta": cfg.rotary_base,
        "rope_scaling": rope_scaling(cfg),
        "bias": bool(nonzero - {"unembed.b_U"}),
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    embedding = "transformer.word_embeddings.weight"
    tied, bias = hf("tie_word_embeddings", True), hf("bias", False)
    block = "transformer.h.{l}"
    fused = "(n_heads+n_kv+n_kv d_head)" if hf("multi_query", True) else "(n_heads 3 d_head)"
    after = "input_layernorm" if hf("parallel_attn", True) else "post_attention_layernorm"
    attention = f"{block}.self_attention"
    return [
        Row(embedding, "d_vocab d_model", "embed.W_E"),
        *layer_norm(f"{block}.input_layernorm", "blocks.{l}.ln1"),
        *linear(f"{attention}.query_key_value", f"{fused} d_model", "blocks.{l}.attn.W_Q|W_K|W_V", biased=bias),
        *linear(f"{attention}.dense", "d_model (n_heads d_head)", "blocks.{l}.attn.W_O", biased=bias),
        *layer_norm(f"{block}.{after}", "blocks.{l}.ln2"),
        *mlp(f"{block}.mlp.dense_h_to_4h", f"{block}.mlp.dense_4h_to_h", biased=bias),
        *layer_norm("transformer.ln_f", "ln_final"),
        *head(embedding, tied=tied),
    ]


FALCON = Family(
    architecture="FalconForCausalLM",
    model_type="falcon",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="transformer.",
    ignored=(r"(transformer\.)?h\.\d+\.self_attention\.(maybe_rotary|rotary_emb)\.inv_freq",),
)
