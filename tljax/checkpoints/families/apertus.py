"""Apertus (``ApertusForCausalLM``): xIELU without a gate, normalised queries and keys, Llama 3's rotary scaling."""

from typing import Any

from tljax.checkpoints.families import llama
from tljax.checkpoints.families.layers import mlp
from tljax.checkpoints.families.llama import BLOCK, IGNORED, QK_NORM, attention_rows, decoder_rows, read_decoder
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

ROPE = {
    "rope_type": "llama3", "rope_theta": 12e6, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
"""How a model rotates whose config does not say."""
NORMS = {"input_layernorm": "attention_layernorm", "post_attention_layernorm": "feedforward_layernorm"}
"""Llama's names → those of Apertus."""


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for an ``ApertusConfig``."""
    hf.only(mlp_bias=False, post_norm=False, qk_norm=True)
    named = bool(hf("rope_parameters", {}) or hf("rope_scaling", {}))
    hf = hf if named else hf.changed(rope_parameters=ROPE)
    learned = hf("hidden_act", "xielu") == "xielu"
    cfg = read_decoder(hf.changed(hidden_act="relu") if learned else hf, eps=1e-5, gated_mlp=False, use_qk_norm=True)
    return cfg.replace(act_fn="xielu") if learned else cfg


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``ApertusConfig`` attributes of ``cfg``."""
    attributes = llama.write_config(cfg, nonzero)
    return attributes | {
        "rope_scaling": attributes["rope_scaling"] or {"rope_type": "default"},
        "pad_token_id": None,  # transformers' default may lie outside a smaller vocabulary
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    biased = hf("attention_bias", False)
    feedforward = mlp(f"{BLOCK}.mlp.up_proj", f"{BLOCK}.mlp.down_proj", biased=False)
    if hf("hidden_act", "xielu") == "xielu":
        feedforward += [
            Row(f"{BLOCK}.mlp.act_fn.{name}", axes, f"blocks.{{l}}.mlp.act.{name}")
            for name, axes in (("alpha_p", "one"), ("alpha_n", "one"), ("beta", ""), ("eps", ""))
        ]
    table = decoder_rows(hf, [*attention_rows(biased, biased), *QK_NORM], feedforward)
    return [_renamed(row) for row in table]


def _renamed(row: Row) -> Row:
    for llamas, own in NORMS.items():
        if f".{llamas}." in row.key:
            return Row(row.key.replace(llamas, own), row.axes, row.paths)
    return row


APERTUS = Family(
    architecture="ApertusForCausalLM",
    model_type="apertus",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=4096, n_layers=32, n_heads=32, d_mlp=14336, n_ctx=65536, d_vocab=131072),
)
