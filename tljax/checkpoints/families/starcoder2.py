"""StarCoder 2 (``Starcoder2ForCausalLM``): layer norms, rotary, grouped key/value heads, plain MLP, a window."""

from typing import Any

from tljax.checkpoints.families.layers import attention, head, layer_norm, mlp
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig, rope_scaling
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``Starcoder2Config``."""
    hf.only(mlp_type="default", norm_type="layer_norm", scale_attn_weights=True)  # written by the original's trainer
    n_layers, n_heads, kv_heads = hf("num_hidden_layers"), hf("num_attention_heads"), hf("num_key_value_heads", 2)
    d_head = hf("head_dim", hf("hidden_size") // n_heads)
    rotary = hf.rotary(d_head)
    window = hf("sliding_window", None)
    return HookedTransformerConfig(
        d_model=hf("hidden_size"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_key_value_heads=None if kv_heads == n_heads else kv_heads,
        d_head=d_head,
        n_ctx=hf("max_position_embeddings"),
        d_vocab=hf("vocab_size"),
        d_mlp=hf("intermediate_size"),
        act_fn=hf.activation("hidden_act", "gelu_pytorch_tanh"),
        eps=hf("norm_epsilon", 1e-5),
        use_local_attn=window is not None,
        attn_types=None if window is None else ("local",) * n_layers,
        window_size=window,
        normalization_type="LN",
        default_prepend_bos=False,
        **rotary,
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``Starcoder2Config`` attributes of ``cfg``."""
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
        "norm_epsilon": cfg.eps,
        "sliding_window": cfg.window_size if cfg.use_local_attn else None,
        "rope_theta": cfg.rotary_base,
        "rope_scaling": rope_scaling(cfg),
        "use_bias": bool(nonzero - {"unembed.b_U"}),
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    embedding, block = "model.embed_tokens.weight", "model.layers.{l}"
    biased = hf("use_bias", True)
    return [
        Row(embedding, "d_vocab d_model", "embed.W_E"),
        *layer_norm(f"{block}.input_layernorm", "blocks.{l}.ln1"),
        *attention(f"{block}.self_attn", "o_proj", biased=biased, out_biased=biased),
        *layer_norm(f"{block}.post_attention_layernorm", "blocks.{l}.ln2"),
        *mlp(f"{block}.mlp.c_fc", f"{block}.mlp.c_proj", biased=biased),
        *layer_norm("model.norm", "ln_final"),
        *head(embedding, tied=hf("tie_word_embeddings", True)),
    ]


STARCODER2 = Family(
    architecture="Starcoder2ForCausalLM",
    model_type="starcoder2",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    defaults=sizes(d_model=3072, n_layers=30, n_heads=24, d_mlp=12288, n_ctx=4096, d_vocab=49152),
    inert={"the trainer's names; hidden_act and norm_epsilon are read": "activation_function layer_norm_epsilon"},
)
