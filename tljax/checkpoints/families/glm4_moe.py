"""GLM-4.5 (``Glm4MoeForCausalLM``): grouped attention, half of each head rotated, and DeepSeek 3's experts."""

from typing import Any

from tljax.checkpoints.families.experts import unless_all
from tljax.checkpoints.families.latent import (
    FURTHER_TOKENS,
    count_dense,
    leading_dense,
    mlp_rows,
    read_experts,
    read_sigmoid_router,
    write_experts,
)
from tljax.checkpoints.families.llama import (
    IGNORED,
    QK_NORM,
    attention_rows,
    decoder_rows,
    read_decoder,
    write_decoder,
)
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig, attention_bias, rotary_fraction
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

_FURTHER_TOKENS = r"model\.layers\.(46|92)\..*"
"""The layer with which GLM-4.5, of 92 layers, and GLM-4.5-Air, of 46, guess a token further ahead."""


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``Glm4MoeConfig``."""
    return read_decoder(
        hf,
        kv_heads=8,
        rotated=0.5,
        eps=1e-5,
        use_qk_norm=hf("use_qk_norm", False),
        moe_layers=unless_all(leading_dense(hf, 1)),
        default_prepend_bos=False,
        **read_experts(hf, routed=128, shared=1, width=1408, per_token=8),
        **read_sigmoid_router(hf, 1, 1),
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``Glm4MoeConfig`` attributes of ``cfg``."""
    return (
        write_decoder(cfg)
        | write_experts(cfg)
        | {
            "attention_bias": attention_bias(nonzero),
            "partial_rotary_factor": rotary_fraction(cfg),
            "use_qk_norm": cfg.use_qk_norm,
            "first_k_dense_replace": count_dense(cfg),
            "num_nextn_predict_layers": 0,
        }
    )


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    attention = attention_rows(hf("attention_bias", False), out_bias=False)
    if hf("use_qk_norm", False):
        attention.extend(QK_NORM)
    return decoder_rows(hf, attention, mlp_rows(leading_dense(hf, 1), chooses_by_bias=True))


GLM4_MOE = Family(
    architecture="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=(*IGNORED, _FURTHER_TOKENS),
    defaults=sizes(d_model=4096, n_layers=46, n_heads=96, d_mlp=10944, n_ctx=131072, d_vocab=151552),
    aliases={"num_local_experts": "n_routed_experts"},
    inert=FURTHER_TOKENS,
)
