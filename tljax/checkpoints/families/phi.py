"""Phi 1, 1.5 and 2 (``PhiForCausalLM``): parallel blocks behind one layer norm, partial rotary, biases everywhere."""

from typing import Any

from tljax.checkpoints.families.layers import attention, head, layer_norm, mlp
from tljax.checkpoints.families.llama import BLOCK, IGNORED, read_decoder, write_decoder
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig, rotary_fraction
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

QK_NORM = tuple(
    Row(f"{BLOCK}.self_attn.{letter}_layernorm.{stored}", "d_head", f"blocks.{{l}}.attn.{letter}_norm.{our}")
    for letter in "qk"
    for stored, our in (("weight", "w"), ("bias", "b"))
)


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``PhiConfig``."""
    fields: dict[str, Any] = {"parallel_attn_mlp": True, "gated_mlp": False, "default_prepend_bos": False}
    if hf("qk_layernorm", False):
        fields |= {"use_qk_norm": True, "qk_norm_type": "LN"}
    cfg = read_decoder(hf, rotated=0.5, act_fn="gelu_new", **fields)
    return cfg.replace(normalization_type="LN", eps=hf("layer_norm_eps", 1e-5))


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``PhiConfig`` attributes of ``cfg``."""
    attributes = write_decoder(cfg)
    return attributes | {
        "layer_norm_eps": attributes.pop("rms_norm_eps"),
        "partial_rotary_factor": rotary_fraction(cfg),
        "qk_layernorm": cfg.use_qk_norm,
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    embedding = "model.embed_tokens.weight"
    return [
        Row(embedding, "d_vocab d_model", "embed.W_E"),
        *layer_norm(f"{BLOCK}.input_layernorm", "blocks.{l}.ln1", "blocks.{l}.ln2"),
        *attention(f"{BLOCK}.self_attn", "dense", biased=True, out_biased=True),
        *(QK_NORM if hf("qk_layernorm", False) else ()),
        *mlp(f"{BLOCK}.mlp.fc1", f"{BLOCK}.mlp.fc2"),
        *layer_norm("model.final_layernorm", "ln_final"),
        *head(embedding, tied=hf("tie_word_embeddings", False), biased=True),
    ]


PHI = Family(
    architecture="PhiForCausalLM",
    model_type="phi",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=2048, n_layers=24, n_heads=32, d_mlp=8192, n_ctx=2048, d_vocab=51200),
    own_code="phi",
)
