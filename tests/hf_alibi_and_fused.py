"""Tiny checkpoints of families with ALiBi or fused projections, or with norms and positions of their own kind."""

from typing import Any

BLOOM = {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 40, "seq_length": 24}
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 24, "vocab_size": 40}
FALCON = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_kv_heads": 2,
    "new_decoder_architecture": True, "max_position_embeddings": 24, "vocab_size": 40,
}  # fmt: skip
CODEGEN = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 24, "vocab_size": 40, "rotary_dim": 4}
XGLM = {
    "d_model": 32, "ffn_dim": 44, "num_layers": 3, "attention_heads": 4, "max_position_embeddings": 24,
    "vocab_size": 40,
}  # fmt: skip
OPT = {
    "hidden_size": 32, "ffn_dim": 44, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 40,
    "max_position_embeddings": 24,
}  # fmt: skip
GPT1 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 24, "vocab_size": 40}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", BLOOM),
    "bloom_3_heads_untied": (
        "bloom",
        BLOOM | {"hidden_size": 24, "n_head": 3, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
    ),
    "mpt": ("mpt", MPT),
    "mpt_clipped_6_heads_untied": (
        "mpt",
        MPT
        | {
            "d_model": 24,
            "n_heads": 6,
            "tie_word_embeddings": False,
            "attn_config": {"clip_qkv": 0.4, "softmax_scale": 0.25},
        },
    ),
    "falcon_new_decoder": ("falcon", FALCON),
    "falcon_new_decoder_bias_untied": (
        "falcon",
        FALCON | {"num_attention_heads": 8, "bias": True, "tie_word_embeddings": False, "ffn_hidden_size": 44},
    ),
    "falcon_rw": (
        "falcon",
        FALCON
        | {
            "new_decoder_architecture": False,
            "alibi": True,
            "bias": True,
            "multi_query": False,
            "num_kv_heads": 6,
            "num_attention_heads": 6,
            "hidden_size": 24,
            "parallel_attn": False,
        },
    ),
    "codegen": ("codegen", CODEGEN),
    "codegen_8_heads_tied": (
        "codegen",
        CODEGEN | {"n_head": 8, "tie_word_embeddings": True, "activation_function": "gelu"},
    ),
    "xglm": ("xglm", XGLM),
    "xglm_unscaled_untied": (
        "xglm",
        XGLM | {"scale_embedding": False, "tie_word_embeddings": False, "activation_function": "relu"},
    ),
    "galactica": (
        "opt",
        OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    ),
    "openai_gpt": ("openai-gpt", GPT1),
    "openai_gpt_relu_untied": ("openai-gpt", GPT1 | {"afn": "relu", "tie_word_embeddings": False, "n_head": 2}),
}
