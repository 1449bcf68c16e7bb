"""Tiny checkpoints whose rotary positions are stretched to longer texts."""

from typing import Any

from hf_llama_like import GQA, MIXED, MQA_TIED, SIZES

YARN = {
    "rope_type": "yarn", "factor": 4.0, "rope_theta": 50.0, "beta_fast": 2.0, "beta_slow": 0.1,
    "original_max_position_embeddings": 16,
}  # fmt: skip
SHORT, LONG = [1.0, 1.1, 1.3, 1.9], [1.0, 2.5, 4.0, 9.0]
LONGROPE = {"rope_type": "longrope", "rope_theta": 90.0, "short_factor": SHORT, "long_factor": LONG}
NEOX = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_yarn": ("llama", GQA | {"head_dim": 16, "rope_parameters": YARN}),
    "llama_yarn_untruncated": (
        "llama",
        MQA_TIED | {"head_dim": 12, "rope_parameters": YARN | {"truncate": False, "attention_factor": 0.8}},
    ),
    "neox_yarn_mscale": (
        "gpt_neox",
        NEOX | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 2.0, "partial_rotary_factor": 0.75}},
    ),
    "qwen2_yarn_windows": (
        "qwen2",
        GQA | {"use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED, "rope_parameters": YARN},
    ),
    "phi3_longrope": ("phi3", GQA | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 20}),
    "phi3_longrope_partial": (
        "phi3",
        SIZES
        | {
            "rope_parameters": LONGROPE
            | {"short_factor": SHORT[:3], "long_factor": LONG[:3], "factor": 5.0, "partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 3,
            "tie_word_embeddings": True,
        },
    ),
    "llama_dynamic": (
        "llama", SIZES | {"rope_parameters": {"rope_type": "dynamic", "factor": 1.7, "rope_theta": 70.0}},
    ),
}  # fmt: skip
