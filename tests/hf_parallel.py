"""Tiny checkpoints of families whose attention and MLP may read the same input."""

from typing import Any

PHI = {
    "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 24, "vocab_size": 40,
}  # fmt: skip
STABLELM = PHI | {"num_key_value_heads": 4, "partial_rotary_factor": 0.25}
FALCON = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 24,
    "vocab_size": 40,
}  # fmt: skip
HALF_LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0, "partial_rotary_factor": 0.5}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi": ("phi", PHI),
    "phi_gqa_linear_rope": ("phi", PHI | {"num_key_value_heads": 2, "head_dim": 12, "rope_parameters": HALF_LINEAR}),
    "phi_mqa_tied": (
        "phi",
        PHI
        | {
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "hidden_act": "relu",
            "partial_rotary_factor": 0.25,
            "layer_norm_eps": 1e-3,
        },
    ),
    "stablelm": ("stablelm", STABLELM),
    "stablelm_parallel_gqa_bias": (
        "stablelm",
        STABLELM | {"num_key_value_heads": 2, "use_parallel_residual": True, "use_qkv_bias": True},
    ),
    "stablelm_mqa_tied": (
        "stablelm",
        STABLELM | {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_parameters": HALF_LINEAR},
    ),
    "falcon_mqa": ("falcon", FALCON),
    "falcon_mha_bias_untied": (
        "falcon",
        FALCON | {"multi_query": False, "bias": True, "tie_word_embeddings": False, "ffn_hidden_size": 44},
    ),
    "falcon_sequential": (
        "falcon",
        FALCON | {"parallel_attn": False, "bias": True, "num_attention_heads": 2, "activation": "gelu_new"},
    ),
}
