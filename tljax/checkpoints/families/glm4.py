"""GLM-4-0414 (``Glm4ForCausalLM``): GLM with norms on what attention and MLP put out, too."""

from typing import Any

from tljax.checkpoints.families import glm
from tljax.checkpoints.families.llama import BLOCK, IGNORED
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

NORMS_AFTER = (
    Row(f"{BLOCK}.post_self_attn_layernorm.weight", "d_model", "blocks.{l}.ln1_post.w"),
    Row(f"{BLOCK}.post_mlp_layernorm.weight", "d_model", "blocks.{l}.ln2_post.w"),
)


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``Glm4Config``."""
    return glm.read_config(hf).replace(use_normalization_before_and_after=True)


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    return [*glm.rows(hf), *NORMS_AFTER]


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``Glm4Config`` attributes of ``cfg``."""
    return glm.write_config(cfg, nonzero)


GLM4 = Family(
    architecture="Glm4ForCausalLM",
    model_type="glm4",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=4096, n_layers=40, n_heads=32, d_mlp=13696, n_ctx=131072, d_vocab=151552),
)
