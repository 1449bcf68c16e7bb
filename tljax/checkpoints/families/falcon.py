"""Falcon (``FalconForCausalLM``): parallel blocks, one key/value head or groups of them, rotary or ALiBi.

The old decoder (7B) has one key/value head and one layer norm a parallel block. The new one (11B, 40B, 180B) fuses
each key/value head with its own group of query heads, and has one norm a block or two. Falcon-RW has ALiBi.
"""

from typing import Any

from tljax.checkpoints.families.layers import head, layer_norm, linear, mlp
from tljax.checkpoints.family import Family
from tljax.checkpoints.formats.hf_config import HFConfig, rope_scaling
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``FalconConfig``."""
    hf.only(apply_residual_connection_post_layernorm=False)
    d_model, n_heads = hf("hidden_size", aka=("n_embed",)), hf("num_attention_heads")
    d_head, parallel = d_model // n_heads, hf("parallel_attn", True)
    d_mlp = hf("ffn_hidden_size", 4 * d_model)
    hf.only(ff_factor=d_mlp // d_model)
    hf.only(head_dim=d_head)
    kv_heads = _key_value_heads(hf, n_heads)
    if hf("new_decoder_architecture", False):
        hf.only(parallel_attn=True)
        if (norms := _norms(hf)) not in (1, 2):
            raise hf.unsupported("num_ln_in_parallel_attn", norms, "1, 2")
    elif parallel:
        hf.only(num_ln_in_parallel_attn=1)
    hf("num_ln_in_parallel_attn", None)
    if alibi := hf("alibi", False):
        for name in ("rope_parameters", "rope_theta", "rope_scaling"):
            hf(name, None)  # ignored
    positions = {"positional_embedding_type": "alibi", "alibi_rounded": True} if alibi else hf.rotary(d_head)
    return HookedTransformerConfig(
        d_model=d_model,
        n_layers=hf("num_hidden_layers"),
        n_heads=n_heads,
        n_key_value_heads=None if kv_heads == n_heads else kv_heads,
        d_head=d_head,
        n_ctx=hf("max_position_embeddings"),
        d_vocab=hf("vocab_size"),
        d_mlp=d_mlp,
        act_fn=hf.activation("activation", "gelu"),
        eps=hf("layer_norm_epsilon", 1e-5),
        parallel_attn_mlp=parallel,
        normalization_type="LN",
        **positions,
    )


def _key_value_heads(hf: HFConfig, n_heads: int) -> int:
    if hf("new_decoder_architecture", False):
        hf("multi_query", None)  # ignored
        return hf("num_kv_heads", n_heads)
    multi_query = hf("multi_query", True)
    if not multi_query:
        hf.only(num_kv_heads=n_heads)
    hf("num_kv_heads", None)  # with multi_query there is one, whatever this says
    return 1 if multi_query else n_heads


def _norms(hf: HFConfig) -> int:
    """Returns the number of layer norms in a parallel block."""
    return hf("num_ln_in_parallel_attn", 2 if hf("new_decoder_architecture", False) else 1)


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``FalconConfig`` attributes of ``cfg``."""
    return {
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_kv_heads": cfg.kv_heads,
        "multi_query": cfg.kv_heads == 1,
        "new_decoder_architecture": 1 < cfg.kv_heads < cfg.n_heads,
        "parallel_attn": cfg.parallel_attn_mlp,
        "max_position_embeddings": cfg.n_ctx,
        "vocab_size": cfg.d_vocab,
        "ffn_hidden_size": cfg.d_mlp,
        "activation": cfg.act_fn,
        "layer_norm_epsilon": cfg.eps,
        "alibi": cfg.positional_embedding_type == "alibi",
        "rope_theta": cfg.rotary_base,
        "rope_scaling": rope_scaling(cfg),
        "bias": bool(nonzero - {"unembed.b_U"}),
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    embedding = "transformer.word_embeddings.weight"
    tied, bias = hf("tie_word_embeddings", True), hf("bias", False)
    block = "transformer.h.{l}"
    if hf("new_decoder_architecture", False):
        fused = "(n_kv n_heads/n_kv+one+one d_head)"
    else:
        fused = "(n_heads+n_kv+n_kv d_head)" if hf("multi_query", True) else "(n_heads 3 d_head)"
    before, after = "input_layernorm", "post_attention_layernorm"
    if hf("parallel_attn", True):
        before, after = ("ln_attn", "ln_mlp") if _norms(hf) == 2 else (before, before)
    attention = f"{block}.self_attention"
    return [
        Row(embedding, "d_vocab d_model", "embed.W_E"),
        *layer_norm(f"{block}.{before}", "blocks.{l}.ln1"),
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
    defaults={
        "hidden_size": 4544,
        "num_attention_heads": 71,
        "num_hidden_layers": 32,
        "vocab_size": 65024,
        "max_position_embeddings": 2048,
    },
    inert={"of the code first published; num_attention_heads and num_hidden_layers say it": "n_head n_layer"},
    own_code="falcon",
)
