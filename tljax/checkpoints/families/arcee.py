"""Arcee (``ArceeForCausalLM``): Llama with a plain MLP of squared ReLUs."""

from typing import Any

from tljax.checkpoints.families import layers
from tljax.checkpoints.families.llama import BLOCK, IGNORED, attention_rows, decoder_rows, read_decoder, write_decoder
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig, attention_bias
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for an ``ArceeConfig``."""
    return read_decoder(hf, eps=1e-5, act_fn="relu2", gated_mlp=False)


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``ArceeConfig`` attributes of ``cfg``."""
    return write_decoder(cfg) | {
        "attention_bias": attention_bias(nonzero),
        "mlp_bias": not nonzero.isdisjoint({"mlp.b_in", "mlp.b_out"}),
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    biased = hf("attention_bias", False)
    mlp = layers.mlp(f"{BLOCK}.mlp.up_proj", f"{BLOCK}.mlp.down_proj", biased=hf("mlp_bias", False))
    return decoder_rows(hf, attention_rows(biased, biased), mlp)


ARCEE = Family(
    architecture="ArceeForCausalLM",
    model_type="arcee",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=2560, n_layers=32, n_heads=32, d_mlp=18432, n_ctx=4096, d_vocab=32000),
)
