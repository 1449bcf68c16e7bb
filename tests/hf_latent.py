"""Tiny checkpoints with latent attention, dense and with mixtures of experts, and others with such experts."""

from typing import Any

from hf_llama_like import GQA, SIZES

LATENT = SIZES | {
    "num_key_value_heads": 4, "kv_lora_rank": 12, "q_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}  # fmt: skip
EXPERTS = {
    "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
    "n_shared_experts": 2,
}  # fmt: skip
DENSE = EXPERTS | {"first_k_dense_replace": 3}
YARN = {
    "rope_type": "yarn", "factor": 4.0, "rope_theta": 50.0, "beta_fast": 2.0, "beta_slow": 0.1, "mscale": 0.707,
    "mscale_all_dim": 0.9, "original_max_position_embeddings": 6,
}  # fmt: skip

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2_dense": ("deepseek_v2", LATENT | DENSE | {"topk_method": "greedy"}),
    "deepseek_v2_whole_queries": (
        "deepseek_v2",
        LATENT | EXPERTS | {"q_lora_rank": None, "attention_bias": True, "topk_method": "greedy",
                            "routed_scaling_factor": 1.6},
    ),
    "deepseek_v2_groups_yarn": (
        "deepseek_v2",
        LATENT | EXPERTS | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
                            "n_shared_experts": 1, "qk_rope_head_dim": 8, "rope_parameters": YARN},
    ),
    "deepseek_v3_groups": (
        "deepseek_v3", LATENT | EXPERTS | {"n_group": 2, "topk_group": 1, "norm_topk_prob": True, "v_head_dim": 12}
    ),
    "deepseek_v3_whole_queries": (
        "deepseek_v3",
        LATENT | EXPERTS | {"q_lora_rank": None, "attention_bias": True, "n_group": 4, "topk_group": 3,
                            "norm_topk_prob": False, "rope_interleave": False, "tie_word_embeddings": True,
                            "qk_rope_head_dim": 8, "rope_parameters": YARN},
    ),
    "glm4_moe_gqa": (
        "glm4_moe", GQA | EXPERTS | {"use_qk_norm": True, "n_group": 2, "topk_group": 1, "head_dim": 8}
    ),
    "glm4_moe_bias": (
        "glm4_moe",
        SIZES | EXPERTS | {"attention_bias": True, "head_dim": 12, "n_group": 1, "topk_group": 1,
                           "routed_scaling_factor": 1.5, "norm_topk_prob": False, "first_k_dense_replace": 0},
    ),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        LATENT | EXPERTS | {"mlp_layer_types": ["dense", "sparse", "sparse"], "n_group": 2, "topk_group": 2,
                            "rms_norm_eps": 1e-3},
    ),
}  # fmt: skip
