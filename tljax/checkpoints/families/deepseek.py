"""DeepSeek 2 and 3 (``DeepseekV2ForCausalLM``, ``DeepseekV3ForCausalLM``): latent attention and many small experts.

DeepSeek 2 chooses experts by a softmax, DeepSeek 3 by a sigmoid and a bias; both may do so within groups of them.
"""

from typing import Any

from tljax.checkpoints.families.latent import (
    FURTHER_TOKENS,
    count_dense,
    latent_rows,
    leading_dense,
    read_experts,
    read_groups,
    read_latent,
    read_sigmoid_router,
    write_latent,
)
from tljax.checkpoints.families.llama import IGNORED
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

_SIZES = {"query_rank": 1536, "value_width": 128, "unrotated": 128}
_FURTHER_TOKENS = r"model\.layers\.61\..*"
"""The layer with which DeepSeek 3, of 61 layers, guesses a token further ahead."""


def read_config_2(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``DeepseekV2Config``."""
    hf.only(mlp_bias=False, scoring_func="softmax", norm_topk_prob=False)
    method = hf("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise hf.unsupported("topk_method", method, "greedy, group_limited_greedy")
    groups = read_groups(hf) if method == "group_limited_greedy" else read_groups(hf, 1, 1)
    return read_latent(
        hf,
        sparse=leading_dense(hf, 0),
        interleaved=True,
        **_SIZES,
        **read_experts(hf, routed=64, shared=2, width=1407),
        **(groups if method == "group_limited_greedy" else {}),  # a greedy choice is among all experts
    )


def write_config_2(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``DeepseekV2Config`` attributes of ``cfg``."""
    method = "greedy" if cfg.expert_groups is None else "group_limited_greedy"
    return _write(cfg, nonzero) | {"topk_method": method}


def rows_2(hf: HFConfig) -> list[Row]:
    """Returns DeepSeek 2's table: checkpoint tensor, its axes, our parameters."""
    return latent_rows(hf, leading_dense(hf, 0), chooses_by_bias=False)


def read_config_3(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``DeepseekV3Config``."""
    return read_latent(
        hf,
        sparse=leading_dense(hf, 3),
        interleaved=hf("rope_interleave", True),
        **_SIZES,
        **read_experts(hf, routed=256, shared=1, width=2048, scaling=2.5, per_token=8),
        **read_sigmoid_router(hf, 8, 4),
    )


def write_config_3(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``DeepseekV3Config`` attributes of ``cfg``."""
    return _write(cfg, nonzero) | {"rope_interleave": cfg.rotary_adjacent_pairs, "num_nextn_predict_layers": 0}


def rows_3(hf: HFConfig) -> list[Row]:
    """Returns DeepSeek 3's table: checkpoint tensor, its axes, our parameters."""
    return latent_rows(hf, leading_dense(hf, 3), chooses_by_bias=True)


def _write(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    return write_latent(cfg, nonzero) | {"first_k_dense_replace": count_dense(cfg)}


DEEPSEEK_V2 = Family(
    architecture="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    read_config=read_config_2,
    write_config=write_config_2,
    rows=rows_2,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=4096, n_layers=32, n_heads=32, d_mlp=11008, n_ctx=2048, d_vocab=102400),
    aliases={"num_experts": "n_routed_experts"},
    inert=FURTHER_TOKENS,
    own_code="deepseek",
)
DEEPSEEK_V3 = Family(
    architecture="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    read_config=read_config_3,
    write_config=write_config_3,
    rows=rows_3,
    prefix="model.",
    ignored=(*IGNORED, _FURTHER_TOKENS),
    defaults=sizes(d_model=7168, n_layers=61, n_heads=128, d_mlp=18432, n_ctx=4096, d_vocab=129280),
    aliases={"num_local_experts": "n_routed_experts"},
    inert=FURTHER_TOKENS,
    own_code="deepseek",
)
