"""Granite 3 with mixtures of experts (``GraniteMoeForCausalLM``): the chosen experts' scores go through the softmax."""

from typing import Any

from tljax.checkpoints.families import experts, granite
from tljax.checkpoints.families.llama import BLOCK, IGNORED, attention_rows, decoder_rows
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

_MOE = f"{BLOCK}.block_sparse_moe"


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``GraniteMoeConfig``."""
    hf.only(mlp_bias=False)
    return granite.read_config(hf).replace(
        num_experts=hf("num_local_experts", 8),
        experts_per_token=hf("num_experts_per_tok", 2),
        router="chosen_softmax",
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``GraniteMoeConfig`` attributes of ``cfg``."""
    return granite.write_config(cfg, nonzero) | {
        "num_local_experts": cfg.num_experts,
        "num_experts_per_tok": cfg.experts_per_token,
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    biased = hf("attention_bias", False)
    gate_up, down = experts.in_one(f"{_MOE}.input_linear.weight", f"{_MOE}.output_linear.weight")
    mixture = [
        experts.router(f"{_MOE}.router.layer.weight", aka=f"{_MOE}.router.weight"),
        experts.known_as(gate_up, f"{_MOE}.experts.gate_up_proj"),
        experts.known_as(down, f"{_MOE}.experts.down_proj"),
    ]
    return decoder_rows(hf, attention_rows(biased, biased), mixture)


GRANITE_MOE = Family(
    architecture="GraniteMoeForCausalLM",
    model_type="granitemoe",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=4096, n_layers=32, n_heads=32, d_mlp=11008, n_ctx=2048, d_vocab=32000),
)
