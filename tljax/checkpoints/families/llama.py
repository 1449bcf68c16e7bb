"""Llama 1, 2 and 3 (``LlamaForCausalLM``): RMS norms, rotary, grouped key/value heads, gated MLP.

Its relatives differ in a few attributes and tensors: they are made of the functions here.
"""

from collections.abc import Sequence
from typing import Any

from tljax.checkpoints.families import layers
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig, attention_bias, rope_scaling
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

BLOCK = "model.layers.{l}"
IGNORED = (r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")
KINDS = {"full_attention": "global", "sliding_attention": "local"}
"""Entry of ``layer_types`` → ours."""
GATED_MLP = (
    Row(f"{BLOCK}.mlp.gate_proj.weight", "d_mlp d_model", "blocks.{l}.mlp.W_gate"),
    Row(f"{BLOCK}.mlp.up_proj.weight", "d_mlp d_model", "blocks.{l}.mlp.W_in"),
    Row(f"{BLOCK}.mlp.down_proj.weight", "d_model d_mlp", "blocks.{l}.mlp.W_out"),
)
QK_NORM = (
    Row(f"{BLOCK}.self_attn.q_norm.weight", "d_head", "blocks.{l}.attn.q_norm.w"),
    Row(f"{BLOCK}.self_attn.k_norm.weight", "d_head", "blocks.{l}.attn.k_norm.w"),
)
FUSED_MLP = (
    Row(f"{BLOCK}.mlp.gate_up_proj.weight", "(2 d_mlp) d_model", "blocks.{l}.mlp.W_gate|W_in"),
    Row(f"{BLOCK}.mlp.down_proj.weight", "d_model d_mlp", "blocks.{l}.mlp.W_out"),
)


def read_decoder(
    hf: HFConfig,
    *,
    kv_heads: int | None = None,
    d_head: int | None = None,
    rotated: float | None = None,
    eps: float = 1e-6,
    act_fn: str = "silu",
    theta: float = 10000.0,
    layer_type: str | None = None,
    **fields: Any,
) -> HookedTransformerConfig:
    """Returns our config from the attributes that Llama shares with its relatives.

    Args:
        hf: the Hugging Face config.
        kv_heads: key/value heads where ``num_key_value_heads`` is absent; ``None``: as many as query heads.
        d_head: width of a head where ``head_dim`` is absent; ``None``: ``hidden_size`` over the heads.
        rotated: default of the rotated fraction of a head; ``None``: the whole head, and any other value is refused.
        eps: default of ``rms_norm_eps``.
        act_fn: default of ``hidden_act``.
        theta: default of ``rope_theta``.
        layer_type: which entry of ``rope_parameters`` to read, where it has one for each type of layer.
        **fields: the rest of our config.
    """
    n_heads = hf("num_attention_heads")
    kv_heads = hf("num_key_value_heads", kv_heads or n_heads, null=n_heads)
    width = hf("hidden_size") // n_heads
    head_width: int = hf("head_dim", d_head or width, null=width)
    rotary = hf.rotary(head_width, default_fraction=rotated, default_theta=theta, layer_type=layer_type)
    fields = {"gated_mlp": True} | rotary | fields
    return HookedTransformerConfig(
        d_model=hf("hidden_size"),
        n_layers=hf("num_hidden_layers"),
        n_heads=n_heads,
        n_key_value_heads=None if kv_heads == n_heads else kv_heads,
        d_head=head_width,
        n_ctx=hf("max_position_embeddings"),
        d_vocab=hf("vocab_size"),
        d_mlp=hf("intermediate_size"),
        act_fn=hf.activation("hidden_act", act_fn),
        eps=hf("rms_norm_eps", eps),
        normalization_type="RMS",
        **fields,
    )


def read_mlp_bias(hf: HFConfig) -> dict[str, Any]:
    """Returns our field of the biases of a gated MLP, which ``mlp_bias`` switches on; off unless it says so."""
    return {"gated_mlp_bias": hf("mlp_bias", False)}


def read_window(hf: HFConfig, size: int | None, local: Sequence[bool]) -> dict[str, Any]:
    """Returns our window fields.

    Args:
        hf: the Hugging Face config.
        size: width of the window in keys, or ``None`` without one.
        local: which layers use it when ``layer_types`` does not say.
    """
    kinds = hf("layer_types", ["sliding_attention" if size and sliding else "full_attention" for sliding in local])
    if unknown := set(kinds) - set(KINDS):
        raise hf.unsupported("layer_types", sorted(unknown), ", ".join(KINDS))
    if size is None:
        if "sliding_attention" in kinds:
            raise hf.unsupported("layer_types", "sliding_attention", "full_attention where sliding_window is not set")
        return {}
    return {"use_local_attn": True, "window_size": size, "attn_types": tuple(KINDS[kind] for kind in kinds)}


def write_decoder(cfg: HookedTransformerConfig) -> dict[str, Any]:
    """Returns the attributes that :func:`read_decoder` reads back."""
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
    }


def write_layer_types(cfg: HookedTransformerConfig) -> list[str]:
    """Returns ``layer_types``: ``"full_attention"`` or ``"sliding_attention"`` for each layer."""
    names = {ours: theirs for theirs, ours in KINDS.items()}
    return [names["local" if kind.local else "global"] for kind in cfg.layer_kinds]


def decoder_rows(hf: HFConfig, attention: Sequence[Row], mlp: Sequence[Row]) -> list[Row]:
    """Returns the table of a decoder with RMS norms.

    Args:
        hf: the Hugging Face config; says whether the embeddings are tied.
        attention: the attention's rows.
        mlp: the MLP's rows.
    """
    embedding = "model.embed_tokens.weight"
    tied = hf("tie_word_embeddings", False)
    return [
        Row(embedding, "d_vocab d_model", "embed.W_E"),
        Row(f"{BLOCK}.input_layernorm.weight", "d_model", "blocks.{l}.ln1.w"),
        *attention,
        Row(f"{BLOCK}.post_attention_layernorm.weight", "d_model", "blocks.{l}.ln2.w"),
        *mlp,
        Row("model.norm.weight", "d_model", "ln_final.w"),
        Row("lm_head.weight", "d_vocab_out d_model", "unembed.W_U", tied_to=embedding if tied else None),
    ]


def gated_mlp_rows(biased: bool) -> list[Row]:
    """Returns the rows of gate, input and output stored apart, and of the biases that all three have or lack."""
    key, ours = f"{BLOCK}.mlp", "blocks.{l}.mlp"
    return [
        *layers.linear(f"{key}.gate_proj", "d_mlp d_model", f"{ours}.W_gate", biased=biased),
        *layers.linear(f"{key}.up_proj", "d_mlp d_model", f"{ours}.W_in", biased=biased),
        *layers.linear(f"{key}.down_proj", "d_model d_mlp", f"{ours}.W_out", biased=biased),
    ]


def attention_rows(qkv_bias: bool, out_bias: bool) -> list[Row]:
    """Returns the rows of queries, keys, values and output stored apart, and of the biases they have."""
    return layers.attention(f"{BLOCK}.self_attn", "o_proj", biased=qkv_bias, out_biased=out_bias)


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``LlamaConfig``."""
    hf.only(rope_interleaved=False)
    return read_decoder(hf, **read_mlp_bias(hf))


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``LlamaConfig`` attributes of ``cfg``."""
    return write_decoder(cfg) | {"attention_bias": attention_bias(nonzero), "mlp_bias": cfg.gated_mlp_bias}


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table of Llama's relatives whose MLPs have no biases: tensor, its axes, our parameters."""
    biased = hf("attention_bias", False)
    return decoder_rows(hf, attention_rows(biased, biased), GATED_MLP)


def rows_with_mlp_bias(hf: HFConfig) -> list[Row]:
    """Returns the same table for families in which ``mlp_bias`` may give the MLPs biases."""
    biased = hf("attention_bias", False)
    return decoder_rows(hf, attention_rows(biased, biased), gated_mlp_rows(hf("mlp_bias", False)))


LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    read_config=read_config,
    write_config=write_config,
    rows=rows_with_mlp_bias,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=4096, n_layers=32, n_heads=32, d_mlp=11008, n_ctx=2048, d_vocab=32000),
)
