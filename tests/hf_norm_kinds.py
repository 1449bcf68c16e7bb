"""Tiny checkpoints of families with norms of many kinds: after the block, over queries and keys; clipping, xIELU."""

from typing import Any

from hf_llama_like import GQA, MIXED, MQA_TIED, SIZES

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 50.0, "beta_fast": 2.0, "beta_slow": 0.1,
        "original_max_position_embeddings": 16}  # fmt: skip
MHA_SIZES = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo2_gqa": ("olmo2", GQA),
    "olmo2_mqa_tied_bias": ("olmo2", MQA_TIED | {"attention_bias": True, "head_dim": 10, "rms_norm_eps": 1e-3}),
    "cohere_gqa": ("cohere", GQA | {"logit_scale": 0.4}),
    "cohere_qk_norm_untied": (
        "cohere",
        GQA | {"use_qk_norm": True, "tie_word_embeddings": False, "attention_bias": True, "layer_norm_eps": 1e-3},
    ),
    "cohere_mha_linear_rope": (
        "cohere",
        MHA_SIZES
        | {"logit_scale": 2.0, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 60.0}},
    ),
    "cohere2_mixed": ("cohere2", GQA | {"sliding_window": 5, "layer_types": MIXED, "logit_scale": 0.5}),
    "cohere2_untied_bias": (
        "cohere2",
        SIZES | {"sliding_window": 6, "sliding_window_pattern": 2, "tie_word_embeddings": False,
                 "attention_bias": True, "rope_theta": 70.0},
    ),
    "olmo_mha": ("olmo", SIZES),
    "olmo_clipped_gqa_bias_tied": (
        "olmo", GQA | {"clip_qkv": 0.5, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "glm4_gqa": ("glm4", GQA | {"head_dim": 16}),
    "glm4_no_bias_tied": (
        "glm4",
        MQA_TIED | {"head_dim": 8, "attention_bias": False, "partial_rotary_factor": 1.0, "rope_theta": 50.0},
    ),
    "nemotron_gqa": ("nemotron", GQA),
    "nemotron_bias_tied": (
        "nemotron",
        MQA_TIED | {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "norm_eps": 1e-3,
                    "partial_rotary_factor": 1.0, "hidden_act": "gelu"},
    ),
    "exaone4_mixed": ("exaone4", GQA | {"sliding_window": 5, "layer_types": MIXED}),
    "exaone4_no_window_tied": (
        "exaone4",
        MQA_TIED | {"sliding_window": None, "layer_types": ["full_attention"] * 3, "head_dim": 10,
                    "rope_parameters": LLAMA3},
    ),
    "hunyuan_gqa": ("hunyuan_v1_dense", GQA | {"head_dim": 10}),
    "hunyuan_alpha_tied_bias": (
        "hunyuan_v1_dense",
        MQA_TIED | {"head_dim": 8, "attention_bias": True,
                    "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 30.0}},
    ),
    "apertus_gqa": ("apertus", GQA),
    "apertus_bias_tied": (
        "apertus", MQA_TIED | {"attention_bias": True, "head_dim": 10, "rope_parameters": LLAMA3},
    ),
    "olmo3_gqa_window": ("olmo3", GQA | {"sliding_window": 5, "layer_types": MIXED}),
    "olmo3_yarn_tied_bias": (
        "olmo3",
        MQA_TIED | {"sliding_window": 6, "layer_types": MIXED, "attention_bias": True, "head_dim": 16,
                    "rope_parameters": {"full_attention": YARN,
                                        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}},
    ),
    "stablelm_qk_norm_parallel": (
        "stablelm",
        GQA | {"partial_rotary_factor": 0.25, "qk_layernorm": True, "use_parallel_residual": True},
    ),
    "phi_qk_norm": ("phi", GQA | {"qk_layernorm": True}),
}  # fmt: skip
