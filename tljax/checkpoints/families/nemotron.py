"""Nemotron, Minitron (``NemotronForCausalLM``): squared ReLU, partial rotary, layer norms with gains of ``1 + w``."""

from typing import Any

from tljax.checkpoints.families.layers import head, layer_norm, mlp
from tljax.checkpoints.families.llama import (
    BLOCK,
    IGNORED,
    attention_rows,
    read_decoder,
    write_decoder,
)
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig, attention_bias, rotary_fraction
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``NemotronConfig``."""
    cfg = read_decoder(hf, rotated=0.5, act_fn="relu2", gated_mlp=False, rmsnorm_uses_offset=True)
    hf.only(kv_channels=cfg.d_head)  # says it again
    return cfg.replace(normalization_type="LN", eps=hf("norm_eps", 1e-5))


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``NemotronConfig`` attributes of ``cfg``."""
    attributes = write_decoder(cfg)
    return attributes | {
        "norm_eps": attributes.pop("rms_norm_eps"),
        "partial_rotary_factor": rotary_fraction(cfg),
        "attention_bias": attention_bias(nonzero),
        "mlp_bias": not nonzero.isdisjoint({"mlp.b_in", "mlp.b_out"}),
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    embedding, biased = "model.embed_tokens.weight", hf("attention_bias", False)
    return [
        Row(embedding, "d_vocab d_model", "embed.W_E"),
        *layer_norm(f"{BLOCK}.input_layernorm", "blocks.{l}.ln1"),
        *attention_rows(biased, biased),
        *layer_norm(f"{BLOCK}.post_attention_layernorm", "blocks.{l}.ln2"),
        *mlp(f"{BLOCK}.mlp.up_proj", f"{BLOCK}.mlp.down_proj", biased=hf("mlp_bias", False)),
        *layer_norm("model.norm", "ln_final"),
        *head(embedding, tied=hf("tie_word_embeddings", False)),
    ]


NEMOTRON = Family(
    architecture="NemotronForCausalLM",
    model_type="nemotron",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=6144, n_layers=32, n_heads=48, d_mlp=24576, n_ctx=4096, d_vocab=256000),
)
