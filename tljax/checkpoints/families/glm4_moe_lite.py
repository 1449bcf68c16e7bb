"""GLM 4.7 Flash (``Glm4MoeLiteForCausalLM``): DeepSeek 3's blocks with each layer's kind in a list."""

from typing import Any

from tljax.checkpoints.families.latent import (
    FURTHER_TOKENS,
    latent_rows,
    read_experts,
    read_latent,
    read_sigmoid_router,
    write_latent,
)
from tljax.checkpoints.families.llama import IGNORED
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

_KINDS = {True: "sparse", False: "dense"}
_FURTHER_TOKENS = r"model\.layers\.47\..*"
"""The layer with which GLM 4.7 Flash, of 47 layers, guesses a token further ahead."""


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``Glm4MoeLiteConfig``."""
    sparse = _sparse_layers(hf)
    hf.only(first_k_dense_replace=(*sparse, True).index(True))  # transformers goes by mlp_layer_types alone
    return read_latent(
        hf,
        sparse=sparse,
        interleaved=hf("rope_interleave", True),
        query_rank=768,
        value_width=256,
        unrotated=192,
        eps=1e-5,
        **read_experts(hf, routed=64, shared=1, width=1536, scaling=1.8, per_token=4),
        **read_sigmoid_router(hf, 1, 1),
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``Glm4MoeLiteConfig`` attributes of ``cfg``."""
    kinds = [_KINDS[kind.experts] for kind in cfg.layer_kinds]
    return write_latent(cfg, nonzero) | {"mlp_layer_types": kinds, "rope_interleave": cfg.rotary_adjacent_pairs}


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    return latent_rows(hf, _sparse_layers(hf), chooses_by_bias=True)


def _sparse_layers(hf: HFConfig) -> tuple[bool, ...]:
    kinds = hf("mlp_layer_types", ["dense"] + ["sparse"] * (hf("num_hidden_layers") - 1))
    if unknown := set(kinds) - set(_KINDS.values()):
        raise hf.unsupported("mlp_layer_types", sorted(unknown), ", ".join(_KINDS.values()))
    return tuple(kind == "sparse" for kind in kinds)


GLM4_MOE_LITE = Family(
    architecture="Glm4MoeLiteForCausalLM",
    model_type="glm4_moe_lite",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=(*IGNORED, _FURTHER_TOKENS),
    defaults=sizes(d_model=2048, n_layers=47, n_heads=20, d_mlp=10240, n_ctx=202752, d_vocab=154880),
    aliases={"num_local_experts": "n_routed_experts", "head_dim": "qk_rope_head_dim"},
    inert=FURTHER_TOKENS,
)
