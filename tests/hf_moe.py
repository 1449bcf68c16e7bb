"""Tiny checkpoints with mixtures of experts, in every layer or in some."""

from typing import Any

from hf_llama_like import GQA, MIXED, MQA_TIED, SIZES
from hf_rotary import LONGROPE

LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
NAMED = {"num_experts": 6, "num_experts_per_tok": 3}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral_gqa": ("mixtral", GQA | LOCAL),
    "mixtral_tied_window": ("mixtral", MQA_TIED | LOCAL | {"sliding_window": 5, "num_experts_per_tok": 3}),
    "qwen2_moe_shared": (
        "qwen2_moe",
        SIZES | NAMED | {"moe_intermediate_size": 20, "shared_expert_intermediate_size": 28},
    ),
    "qwen2_moe_mixed": (
        "qwen2_moe",
        GQA | NAMED | {"moe_intermediate_size": 20, "shared_expert_intermediate_size": 28, "norm_topk_prob": True,
                       "decoder_sparse_step": 2, "qkv_bias": False, "use_sliding_window": True, "sliding_window": 6,
                       "layer_types": MIXED},
    ),
    "qwen3_moe_gqa": (
        "qwen3_moe", GQA | NAMED | {"moe_intermediate_size": 20, "head_dim": 12, "norm_topk_prob": True}
    ),
    "qwen3_moe_mixed": (
        "qwen3_moe",
        SIZES | NAMED | {"moe_intermediate_size": 20, "mlp_only_layers": [0], "attention_bias": True,
                         "use_sliding_window": True, "sliding_window": 6},
    ),
    "granitemoe_multipliers": (
        "granitemoe",
        GQA | LOCAL | {"embedding_multiplier": 3.0, "residual_multiplier": 0.22, "logits_scaling": 3.0,
                       "attention_multiplier": 0.3, "num_experts_per_tok": 3},
    ),
    "granitemoe_bias_tied": ("granitemoe", MQA_TIED | LOCAL | {"attention_bias": True, "attention_multiplier": 0.4}),
    "phimoe_gqa": ("phimoe", GQA | LOCAL | {"router_jitter_noise": 0.2}),
    "phimoe_longrope": (
        "phimoe",
        GQA | LOCAL | {"rope_parameters": LONGROPE | {"short_mscale": 1.2, "long_mscale": 1.2,
                                                      "original_max_position_embeddings": 24}},
    ),
    "phimoe_bias_window": (
        "phimoe",
        SIZES | LOCAL | {"attention_bias": True, "lm_head_bias": True, "sliding_window": 6},
    ),
    "gpt_oss_gqa": (
        "gpt_oss", GQA | LOCAL | {"intermediate_size": 32, "sliding_window": 6, "head_dim": 12, "swiglu_limit": 1.5}
    ),
    "gpt_oss_no_bias_tied": (
        "gpt_oss",
        MQA_TIED | LOCAL | {"attention_bias": False, "head_dim": 8, "num_experts_per_tok": 3, "layer_types": MIXED,
                            "sliding_window": 5, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    ),
    "olmoe_mha": ("olmoe", SIZES | NAMED | {"clip_qkv": 0.7}),
    "olmoe_gqa_tied": ("olmoe", MQA_TIED | NAMED | {"norm_topk_prob": True, "attention_bias": True}),
}  # fmt: skip
