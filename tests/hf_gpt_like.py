"""Tiny checkpoints of families in GPT-2's manner: layer norms, plain MLPs."""

from typing import Any

NEO = {
    "hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 24, "vocab_size": 40,
    "attention_types": [[["global", "local"], 1], [["local"], 1]], "window_size": 5,
}  # fmt: skip
GPTJ = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 24, "vocab_size": 40, "rotary_dim": 4}
OPT = {
    "hidden_size": 32, "ffn_dim": 44, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 40,
    "max_position_embeddings": 24,
}  # fmt: skip
BIGCODE = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 24, "vocab_size": 40}
STARCODER2 = {
    "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 24, "vocab_size": 40,
}  # fmt: skip

UNUSED_ROWS = {"model.decoder.embed_positions.weight": 2}
"""Tensor name → leading rows that no position reads: exported as zeros."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neo": ("gpt_neo", NEO),
    "gpt_neo_global_untied": (
        "gpt_neo",
        NEO
        | {
            "attention_types": [[["global"], 3]],
            "tie_word_embeddings": False,
            "intermediate_size": 20,
            "activation_function": "relu",
            "layer_norm_epsilon": 1e-3,
        },
    ),
    "gptj": ("gptj", GPTJ),
    "gptj_tied": (
        "gptj",
        GPTJ | {"tie_word_embeddings": True, "rotary_dim": 8, "n_inner": 20, "activation_function": "relu"},
    ),
    "opt": ("opt", OPT),
    "opt_narrow_embedding": (
        "opt",
        OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 20, "activation_function": "gelu", "ffn_dim": 28},
    ),
    "opt_no_bias_untied": (
        "opt",
        OPT | {"enable_bias": False, "tie_word_embeddings": False, "activation_function": "gelu", "ffn_dim": 20},
    ),
    "gpt_bigcode_mqa": ("gpt_bigcode", BIGCODE),
    "gpt_bigcode_mha_untied": (
        "gpt_bigcode",
        BIGCODE | {"multi_query": False, "tie_word_embeddings": False, "scale_attn_weights": False, "n_inner": 20},
    ),
    "starcoder2": ("starcoder2", STARCODER2),
    "starcoder2_window": (
        "starcoder2",
        STARCODER2 | {"sliding_window": 5, "num_key_value_heads": 1, "norm_epsilon": 1e-3, "head_dim": 10},
    ),
    "starcoder2_no_bias_untied": (
        "starcoder2",
        STARCODER2
        | {
            "use_bias": False,
            "tie_word_embeddings": False,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0},
        },
    ),
}
