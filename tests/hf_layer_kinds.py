"""Tiny checkpoints of families with normalised queries and keys, layers that do not rotate, or multipliers."""

from typing import Any

from hf_llama_like import GQA, MIXED, MQA_TIED, SIZES

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_gqa": ("qwen3", GQA | {"head_dim": 12}),
    "qwen3_window_bias": (
        "qwen3",
        SIZES | {"head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED,
                 "attention_bias": True},
    ),
    "smollm3_gqa": ("smollm3", GQA | {"no_rope_layer_interval": 2}),
    "smollm3_window": (
        "smollm3",
        MQA_TIED | {"use_sliding_window": True, "sliding_window": 6, "no_rope_layers": [0, 1, 0],
                    "attention_bias": True, "mlp_bias": True},
    ),
    "gemma_mqa_tied": ("gemma", MQA_TIED | {"head_dim": 10}),
    "gemma_gqa_bias": (
        "gemma",
        GQA | {"head_dim": 8, "tie_word_embeddings": False, "attention_bias": True, "hidden_act": "gelu_new"},
    ),
    "gemma2_gqa_tied": (
        "gemma2",
        GQA | {"head_dim": 10, "tie_word_embeddings": True, "sliding_window": 5, "query_pre_attn_scalar": 12,
               "attn_logit_softcapping": 4.0, "final_logit_softcapping": 5.0},
    ),
    "gemma2_uncapped": (
        "gemma2",
        SIZES | {"head_dim": 8, "tie_word_embeddings": False, "sliding_window": 6, "layer_types": MIXED,
                 "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
    ),
    "gemma3_gqa_tied": (
        "gemma3_text",
        GQA | {"head_dim": 10, "tie_word_embeddings": True, "sliding_window": 5, "sliding_window_pattern": 2,
               "query_pre_attn_scalar": 10},
    ),
    "gemma3_scaled": (
        "gemma3_text",
        SIZES | {"head_dim": 8, "tie_word_embeddings": False, "sliding_window": 6, "layer_types": MIXED,
                 "query_pre_attn_scalar": 8, "final_logit_softcapping": 6.0,
                 "rope_parameters": {
                     "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0},
                     "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
                 }},
    ),
    "granite_multipliers": (
        "granite",
        GQA | {"embedding_multiplier": 3.0, "residual_multiplier": 0.22, "logits_scaling": 3.0,
               "attention_multiplier": 0.3},
    ),
    "granite_bias_tied": ("granite", MQA_TIED | {"attention_bias": True, "attention_multiplier": 0.4}),
}  # fmt: skip
