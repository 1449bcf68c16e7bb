"""StableLM 3B and StableLM 2 (``StableLmForCausalLM``): Llama's blocks with layer norms and partial rotary."""

from typing import Any

from tljax.checkpoints.families.layers import head, layer_norm
from tljax.checkpoints.families.llama import (
    BLOCK,
    GATED_MLP,
    IGNORED,
    attention_rows,
    read_decoder,
    write_decoder,
)
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig, rotary_fraction
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

QK_NORM = (
    Row(f"{BLOCK}.self_attn.q_layernorm.norms.{{q}}.weight", "n_heads d_head", "blocks.{l}.attn.q_norm.w"),
    Row(f"{BLOCK}.self_attn.k_layernorm.norms.{{k}}.weight", "n_kv d_head", "blocks.{l}.attn.k_norm.w"),
)


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``StableLmConfig``."""
    hf.only(head_dim=hf("hidden_size") // hf("num_attention_heads"))
    fields = {"parallel_attn_mlp": hf("use_parallel_residual", False)}
    if hf("qk_layernorm", False):
        fields |= {"use_qk_norm": True, "qk_norm_type": "LN", "qk_norm_span": "per_head"}
    cfg = read_decoder(hf, kv_heads=32, rotated=0.25, **fields)
    return cfg.replace(normalization_type="LN", eps=hf("layer_norm_eps", 1e-5))


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``StableLmConfig`` attributes of ``cfg``."""
    attributes = write_decoder(cfg)
    return attributes | {
        "layer_norm_eps": attributes.pop("rms_norm_eps"),
        "use_parallel_residual": cfg.parallel_attn_mlp,
        "qk_layernorm": cfg.use_qk_norm,
        "partial_rotary_factor": rotary_fraction(cfg),
        "use_qkv_bias": not nonzero.isdisjoint({"attn.b_Q", "attn.b_K", "attn.b_V"}),
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    embedding = "model.embed_tokens.weight"
    after = "input_layernorm" if hf("use_parallel_residual", False) else "post_attention_layernorm"
    return [
        Row(embedding, "d_vocab d_model", "embed.W_E"),
        *layer_norm(f"{BLOCK}.input_layernorm", "blocks.{l}.ln1"),
        *attention_rows(qkv_bias=hf("use_qkv_bias", False), out_bias=False),
        *(QK_NORM if hf("qk_layernorm", False) else ()),
        *layer_norm(f"{BLOCK}.{after}", "blocks.{l}.ln2"),
        *GATED_MLP,
        *layer_norm("model.norm", "ln_final"),
        *head(embedding, tied=hf("tie_word_embeddings", False)),
    ]


STABLELM = Family(
    architecture="StableLmForCausalLM",
    model_type="stablelm",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=2560, n_layers=32, n_heads=32, d_mlp=6912, n_ctx=4096, d_vocab=50304),
    own_code="stablelm",
)
