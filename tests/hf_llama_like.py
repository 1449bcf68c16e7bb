"""Tiny checkpoints of families in Llama's manner: RMS norms, rotary, gated MLPs."""

from typing import Any

SIZES = {
    "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 24, "vocab_size": 40, "pad_token_id": None,
}  # fmt: skip
GQA = SIZES | {"num_key_value_heads": 2}
MQA_TIED = SIZES | {"num_key_value_heads": 1, "tie_word_embeddings": True}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_mha": ("qwen2", SIZES | {"sliding_window": 5}),
    "qwen2_gqa_window": ("qwen2", GQA | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen2_mqa_tied_mixed": (
        "qwen2",
        MQA_TIED | {"use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED, "rms_norm_eps": 1e-3},
    ),
    "mistral_gqa_window": ("mistral", GQA | {"sliding_window": 7}),
    "mistral_no_window": ("mistral", MQA_TIED | {"sliding_window": None, "head_dim": 10}),
    "ministral_mixed": ("ministral", GQA | {"sliding_window": 5, "layer_types": MIXED, "head_dim": 10}),
    "ministral_mha_window": ("ministral", SIZES | {"sliding_window": 6, "head_dim": 8, "hidden_act": "gelu"}),
    "phi3_mha_tied": ("phi3", SIZES | {"tie_word_embeddings": True}),
    "phi3_gqa_window_partial": (
        "phi3",
        GQA
        | {
            "sliding_window": 6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 99.0, "partial_rotary_factor": 0.75},
        },
    ),
    "arcee_mha": ("arcee", SIZES),
    "arcee_gqa_bias": ("arcee", GQA | {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "seed_oss_gqa": ("seed_oss", GQA | {"head_dim": 10}),
    "seed_oss_out_bias": ("seed_oss", SIZES | {"head_dim": None, "attention_out_bias": True, "mlp_bias": True}),
    "seed_oss_no_bias_tied": ("seed_oss", MQA_TIED | {"attention_bias": False}),
    "glm_gqa": ("glm", GQA | {"head_dim": 12}),
    "glm_no_bias_tied": (
        "glm",
        MQA_TIED | {"head_dim": 8, "attention_bias": False, "partial_rotary_factor": 1.0, "rope_theta": 50.0},
    ),
}
