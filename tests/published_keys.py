"""What published config.json files say besides their sizes, written down as facts, and which hub ids have which."""

from typing import Any

Keys = dict[str, Any]

TRAINED = {"initializer_range": 0.02, "torch_dtype": "bfloat16", "transformers_version": "4.40.0", "use_cache": True}
SUMMARY = {
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True,
}  # fmt: skip
GPT2: Keys = SUMMARY | {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new", "attn_pdrop": 0.1,
    "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "layer_norm_epsilon": 1e-05, "n_ctx": 1024,
    "n_positions": 1024, "resid_pdrop": 0.1,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip
LLAMA: Keys = TRAINED | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "attention_bias": False,
    "attention_dropout": 0.0, "mlp_bias": False,
}  # fmt: skip
LLAMA_3: Keys = LLAMA | {
    "rope_theta": 500000.0, "eos_token_id": [128001, 128008, 128009],
    "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
QWEN: Keys = TRAINED | {
    "attention_dropout": 0.0, "hidden_act": "silu", "max_window_layers": 28, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "tie_word_embeddings": False, "use_sliding_window": False,
}  # fmt: skip
GEMMA: Keys = TRAINED | {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "eos_token_id": 1, "head_dim": 256,
    "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "vocab_size": 256000,
}  # fmt: skip
PHI: Keys = TRAINED | {
    "architectures": ["PhiForCausalLM"], "model_type": "phi", "hidden_act": "gelu_new", "layer_norm_eps": 1e-05,
    "partial_rotary_factor": 0.5, "qk_layernorm": False, "rope_scaling": None, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attention_dropout": 0.0,
    "num_key_value_heads": None,
}  # fmt: skip
PHI_3: Keys = TRAINED | {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "attention_dropout": 0.0,
    "embd_pdrop": 0.0, "hidden_act": "silu", "original_max_position_embeddings": 4096, "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config",
                 "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
}  # fmt: skip
OLMO: Keys = TRAINED | {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "pad_token_id": 1, "rope_scaling": None,
}  # fmt: skip
GPT_NEO: Keys = SUMMARY | {
    "architectures": ["GPTNeoForCausalLM"], "model_type": "gpt_neo", "activation_function": "gelu_new",
    "attention_dropout": 0, "attention_types": [[["global", "local"], 4]], "attention_layers": ["global", "local"] * 4,
    "num_layers": 8, "embed_dropout": 0, "resid_dropout": 0, "gradient_checkpointing": False, "window_size": 256,
    "layer_norm_epsilon": 1e-05, "intermediate_size": None, "tokenizer_class": "GPT2Tokenizer",
}  # fmt: skip
NEOX: Keys = {
    "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_act": "gelu", "layer_norm_eps": 1e-05,
    "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "use_parallel_residual": True,
    "torch_dtype": "float16", "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
OPT: Keys = {
    "architectures": ["OPTForCausalLM"], "model_type": "opt", "activation_dropout": 0.0, "activation_function": "relu",
    "attention_dropout": 0.0, "do_layer_norm_before": True, "dropout": 0.1, "init_std": 0.02, "layerdrop": 0.0,
    "prefix": "</s>", "_remove_final_layer_norm": False, "word_embed_proj_dim": 768, "pad_token_id": 1,
}  # fmt: skip
MISTRAL: Keys = TRAINED | {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False, "max_position_embeddings": 32768,
}  # fmt: skip
APERTUS_ROPE = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3", "type": "llama3",
}  # fmt: skip
GPT_OSS_ROPE = {
    "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
    "rope_type": "yarn", "truncate": False,
}  # fmt: skip

PROMISED: tuple[tuple[str, Keys], ...] = (
    (r"openai-community/gpt2|distilbert/distilgpt2|openai-community/gpt2-large", GPT2),
    (r"openai-community/gpt2-medium", GPT2 | {
        "n_special": 0, "predict_special_tokens": True, "n_embd": 1024, "n_head": 16,
    }),
    (r"openai-community/gpt2-xl", GPT2 | {"output_past": True, "n_embd": 1600, "n_head": 25}),
    (r"ai-forever/mGPT", GPT2 | {"gradient_checkpointing": False, "scale_attn_weights": True, "n_positions": 2048}),
    (r"stanford-crfm/.*-gpt2-.*", GPT2 | {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}),
    (r"EleutherAI/gpt-neo-.*|roneneldan/TinyStories-.*", GPT_NEO),
    (r"EleutherAI/gpt-j-6B", GPT2 | {
        "architectures": ["GPTJForCausalLM"], "model_type": "gptj", "rotary": True, "rotary_dim": 64,
        "scale_attn_weights": True, "tie_word_embeddings": False, "gradient_checkpointing": False,
    }),
    (r"EleutherAI/gpt-neox-20b", NEOX | {"attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0}),
    (r"EleutherAI/pythia-.*|stabilityai/stablelm-(base|tuned)-alpha-.*", NEOX),
    (r"bigcode/gpt_bigcode-santacoder", SUMMARY | {
        "architectures": ["GPTBigCodeForCausalLM"], "model_type": "gpt_bigcode", "multi_query": True,
        "activation_function": "gelu_pytorch_tanh", "attention_softmax_in_fp32": True, "scale_attn_weights": True,
        "scale_attention_softmax_in_fp32": True, "runner_max_sequence_length": None,
    }),
    (r"facebook/opt-(125m|1.3b|2.7b|6.7b)", OPT),
    (r"facebook/opt-(13b|30b|66b)", OPT | {"output_projection": True}),
    (r"meta-llama/Llama-2-.*|codellama/.*|01-ai/Yi-.*", LLAMA),
    (r"meta-llama/(Meta-)?Llama-3.*", LLAMA_3),
    (r"Qwen/(Qwen1\.5|Qwen2|Qwen2\.5|QwQ)-.*", QWEN | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 32768, "use_mrope": False,
    }),
    (r"Qwen/Qwen3-.*", QWEN | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "attention_bias": False,
        "rope_scaling": None, "sliding_window": None,
    }),
    (r"google/gemma-(2b|7b)(-it)?", GEMMA | {
        "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_act": "gelu",
        "hidden_activation": "gelu_pytorch_tanh", "rope_scaling": None,
    }),
    (r"google/gemma-2-.*", GEMMA | {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "cache_implementation": "hybrid", "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "sliding_window_size": 4096,
    }),
    (r"google/gemma-3-(270m|1b).*", GEMMA | {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "cache_implementation": "hybrid",
        "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": 512, "sliding_window_pattern": 6, "use_bidirectional_attention": False,
    }),
    (r"google/gemma-3-(4b|12b|27b).*", {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "boi_token_index": 255999,
        "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144, "mm_tokens_per_image": 256,
        "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                        "sliding_window": 1024},
        "vision_config": {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model"},
    }),
    (r"mistralai/Mistral-7B-.*", MISTRAL | {"sliding_window": 4096, "rope_theta": 10000.0}),
    (r"mistralai/Mistral-(Nemo|Small).*", MISTRAL | {"sliding_window": None, "rope_theta": 1e8, "head_dim": 128}),
    (r"mistralai/Mixtral-.*", MISTRAL | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_experts_per_tok": 2,
        "num_local_experts": 8, "output_router_logits": False, "router_aux_loss_coef": 0.02, "sliding_window": None,
        "rope_theta": 1000000.0, "attention_dropout": 0.0,
    }),
    (r"microsoft/phi-(1|1_5)", PHI),
    (r"microsoft/phi-2", PHI | {
        "partial_rotary_factor": 0.4, "hidden_size": 2560,
        "auto_map": {"AutoConfig": "configuration_phi.PhiConfig",
                     "AutoModelForCausalLM": "modeling_phi.PhiForCausalLM"},
    }),
    (r"microsoft/phi-4", PHI_3 | {"auto_map": {}, "rope_theta": 250000, "sliding_window": None}),
    (r"microsoft/Phi-3-mini-4k-instruct", PHI_3 | {"sliding_window": 2047}),
    (r"bigscience/bloom-.*", {
        "architectures": ["BloomForCausalLM"], "model_type": "bloom", "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "masked_softmax_fusion": True, "n_embed": 1024,
        "n_inner": None, "num_attention_heads": 16, "n_layer": 24, "offset_alibi": 100, "pretraining_tp": 1,
        "skip_bias_add": True, "skip_bias_add_qkv": False, "slow_but_exact": False, "unk_token_id": 0,
    }),
    (r"allenai/OLMo-[17]B-hf", OLMO | {"architectures": ["OlmoForCausalLM"], "model_type": "olmo", "clip_qkv": None}),
    (r"allenai/OLMo-2-.*", OLMO | {
        "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "rms_norm_eps": 1e-06, "rope_theta": 500000,
    }),
    (r"allenai/Olmo-3.*", OLMO | {
        "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "rms_norm_eps": 1e-06, "rope_theta": 500000,
        "sliding_window": 4096, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
    }),
    (r"allenai/OLMoE-.*", OLMO | {
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "clip_qkv": None, "norm_topk_prob": False,
        "num_experts": 64, "num_experts_per_tok": 8, "output_router_logits": False, "router_aux_loss_coef": 0.01,
    }),
    (r"openai/gpt-oss-.*", TRAINED | {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "head_dim": 64,
        "experts_per_token": 4, "num_experts_per_tok": 4, "initial_context_length": 4096, "rms_norm_eps": 1e-05,
        "layer_types": ["sliding_attention", "full_attention"] * 18, "rope_scaling": GPT_OSS_ROPE, "swiglu_limit": 7.0,
        "rope_theta": 150000, "sliding_window": 128, "quantization_config": {"quant_method": "mxfp4"},
    }),
    (r"swiss-ai/Apertus-.*", TRAINED | {
        "architectures": ["ApertusForCausalLM"], "model_type": "apertus", "hidden_act": "xielu", "mlp_bias": False,
        "post_norm": False, "qk_norm": True, "rms_norm_eps": 1e-05, "rope_theta": 12000000, "attention_bias": False,
        "rope_scaling": APERTUS_ROPE,
    }),
)  # fmt: skip
"""Pattern of hub ids that have a short name → what their files say."""

OTHERS: dict[str, Keys] = {
    "Llama 1": {
        "architectures": ["LLaMAForCausalLM"], "model_type": "llama", "hidden_act": "silu", "max_sequence_length": 2048,
        "rms_norm_eps": 1e-06, "pad_token_id": -1, "torch_dtype": "float16", "transformers_version": "4.27.0.dev0",
    },
    "HyperCLOVA X": LLAMA | {"end_token_id": 100257, "use_sliding_window": None},
    "Yarn-Llama 2": LLAMA | {"rope_scaling": {"factor": 16.0, "type": "yarn", "finetuned": True,
                                               "original_max_position_embeddings": 4096}},
    "a fine-tuned Llama": LLAMA_3 | {"unsloth_version": "2025.1", "unsloth_fixed": True, "trl_version": "0.9",
                                     "neftune_noise_alpha": 5, "tf_legacy_loss": False, "custom_pipelines": {}},
    "the bare model": GPT2 | {"architectures": ["GPT2Model"]},
    "no architecture": {name: value for name, value in MISTRAL.items() if name != "architectures"},
    "Phi-3.5-MoE": TRAINED | {
        "architectures": ["PhiMoEForCausalLM"], "model_type": "phimoe", "attention_bias": True, "expert_dropout": 0.0,
        "hidden_act": "silu", "hidden_dropout": 0.0, "input_jitter_noise": 0.01, "lm_head_bias": True,
        "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.01, "sliding_window": 131072, "rope_scaling": None,
        "auto_map": {"AutoConfig": "configuration_phimoe.PhiMoEConfig",
                     "AutoModelForCausalLM": "modeling_phimoe.PhiMoEForCausalLM"},
    },
    "Phi-4-mini": PHI_3 | {
        "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False, "head_dim": 8,
        "hidden_size": 32, "num_attention_heads": 4, "partial_rotary_factor": 0.75, "sliding_window": 262144,
        "tie_word_embeddings": True, "max_position_embeddings": 131072,
        "rope_scaling": {"long_factor": [1, 1.1, 1.25], "short_factor": [1.0, 1.0, 1.0], "type": "longrope"},
    },
    "SmolLM3": TRAINED | {
        "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "attention_bias": False, "hidden_act": "silu",
        "max_window_layers": 28, "mlp_bias": False, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9,
        "pretraining_tp": 2, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
        "use_sliding_window": False, "layer_types": ["full_attention"] * 36,
    },
    "MPT 7B": {
        "architectures": ["MPTForCausalLM"], "model_type": "mpt", "emb_pdrop": 0, "embedding_fraction": 1.0,
        "expansion_ratio": 4, "init_config": {"name": "kaiming_normal_"}, "init_device": "cpu", "is_hf": True,
        "learned_pos_emb": True, "logit_scale": None, "no_bias": True, "norm_type": "low_precision_layernorm",
        "resid_pdrop": 0, "tokenizer_name": "EleutherAI/gpt-neox-20b", "verbose": 0,
        "attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0, "clip_qkv": None,
                        "attn_type": "multihead_attention", "attn_uses_sequence_id": False, "prefix_lm": False,
                        "qk_ln": False, "softmax_scale": None},
        "auto_map": {"AutoConfig": "mosaicml/mpt-7b--configuration_mpt.MPTConfig",
                     "AutoModelForCausalLM": "mosaicml/mpt-7b--modeling_mpt.MPTForCausalLM"},
    },
    "Qwen3 Coder": QWEN | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1, "head_dim": 128,
        "mlp_only_layers": [], "norm_topk_prob": True, "num_experts": 160, "num_experts_per_tok": 8, "qkv_bias": False,
        "output_router_logits": False, "router_aux_loss_coef": 0.0, "shared_expert_intermediate_size": 0,
        "use_qk_norm": True, "sliding_window": None, "rope_scaling": None, "attention_bias": False,
    },
    "StarCoder2": {
        "architectures": ["Starcoder2ForCausalLM"], "model_type": "starcoder2", "activation_function": "gelu",
        "attention_softmax_in_fp32": True, "layer_norm_epsilon": 1e-05, "mlp_type": "default", "norm_epsilon": 1e-05,
        "norm_type": "layer_norm", "rope_theta": 1000000, "scale_attention_softmax_in_fp32": True,
        "scale_attn_weights": True, "sliding_window": 4096, "use_bias": True, "hidden_act": "gelu_pytorch_tanh",
        "embedding_dropout": 0.1, "residual_dropout": 0.1,
    },
    "Nemotron": TRAINED | {
        "architectures": ["NemotronForCausalLM"], "model_type": "nemotron", "hidden_act": "relu2", "norm_eps": 1e-05,
        "kv_channels": 128, "partial_rotary_factor": 0.5, "rope_theta": 10000, "tie_word_embeddings": False,
    },
    "Command R": TRAINED | {
        "architectures": ["CohereForCausalLM"], "model_type": "cohere", "attention_bias": False, "hidden_act": "silu",
        "layer_norm_eps": 1e-05, "logit_scale": 0.0625, "model_max_length": 131072, "rope_theta": 8000000.0,
        "auto_map": {"AutoConfig": "configuration_cohere.CohereConfig",
                     "AutoModel": "modeling_cohere.CohereModel",
                     "AutoModelForCausalLM": "modeling_cohere.CohereForCausalLM"},
    },
    "Command R7B": TRAINED | {
        "architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2", "attention_bias": False, "head_dim": 128,
        "hidden_act": "silu", "layer_norm_eps": 1e-05, "logit_scale": 0.25, "layer_switch": 4, "rotary_pct": 1.0,
        "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj", "rope_scaling": None,
        "_sliding_window_pattern": 4, "sliding_window": 4096, "use_embedding_sharing": True,
        "use_gated_activation": True, "use_parallel_block": True, "use_parallel_embedding": True,
        "cache_implementation": "hybrid", "rope_theta": 50000,
    },
    "HunYuan": TRAINED | {
        "architectures": ["HunYuanDenseV1ForCausalLM"], "model_type": "hunyuan_v1_dense", "attention_bias": False,
        "add_classification_head": False, "attention_head_dim": 128, "cla_share_factor": 2, "class_num": 0,
        "dense_list": [4096, 0], "eod_token_id": 127957, "head_dim": 128, "hidden_act": "silu", "im_end_id": 5,
        "im_newline_id": 11, "im_start_id": 4, "mask_init_id": 12, "mlp_bias": False, "norm_type": "rms",
        "org_vocab_size": 290943, "pad_id": 127961, "pool_type": "last", "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
                         "mscale_all_dim": 1.0, "type": "dynamic"},
        "text_end_id": 7, "text_start_id": 6, "use_cla": False, "use_qk_norm": True, "use_rotary_pos_emb": True,
    },
    "Falcon 7B": {
        "architectures": ["FalconForCausalLM"], "model_type": "falcon", "alibi": False, "bias": False, "n_head": 71,
        "apply_residual_connection_post_layernorm": False, "hidden_dropout": 0.0, "layer_norm_epsilon": 1e-05,
        "multi_query": True, "n_layer": 32, "new_decoder_architecture": False, "parallel_attn": True,
        "auto_map": {"AutoConfig": "tiiuae/falcon-7b--configuration_falcon.FalconConfig",
                     "AutoModelForCausalLM": "tiiuae/falcon-7b--modeling_falcon.FalconForCausalLM"},
    },
    "a test's GPT-BigCode": {
        "architectures": ["GPTBigCodeLMHeadModel"], "model_type": "gpt_bigcode", "attention_type": 2, "n_inner": 128,
        "scale_attn_by_inverse_layer_idx": False, "type_vocab_size": 16, "is_decoder": True, "n_embd": 32, "n_head": 4,
    },
}  # fmt: skip
"""Files without a short name, or of other vintages."""
