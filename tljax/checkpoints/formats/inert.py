"""Attributes of config.json that change the logits of no family, each with the reason."""

from typing import Any

_INERT = {
    "what the file is, and who wrote it": """
        architectures model_type transformers_version _name_or_path name_or_path _commit_hash _from_model_config
        torch_dtype dtype torchscript transformers.js_config is_llama_config is_decoder tie_encoder_decoder
    """,
    "how it is computed, not what: caches, kernels, the order of sums, memory": """
        use_cache cache_implementation output_past output_hidden_states output_attentions output_scores
        return_dict use_return_dict return_dict_in_generate keys_to_ignore_at_inference chunk_size_feed_forward
        use_bfloat16 gradient_checkpointing pretraining_tp tensor_parallel_degree reorder_and_upcast_attn
        use_flash_attn use_flash_attention use_flash_attention_2 _flash_attn_2_enabled use_sdpa
        attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
        _experts_implementation experts_implementation attention_softmax_in_fp32 scale_attention_softmax_in_fp32
    """,
    "random numbers of training: initial weights, dropout, jitter": """
        initializer_range initializer_factor init_std attn_pdrop embd_pdrop resid_pdrop attention_dropout
        hidden_dropout embed_dropout resid_dropout activation_dropout residual_dropout embedding_dropout layerdrop
        dropout classifier_dropout attention_probs_dropout_prob hidden_dropout_prob attn_dropout ffn_dropout
        expert_dropout router_jitter_noise input_jitter_noise
    """,
    "losses of training": """
        output_router_logits router_aux_loss_coef router_z_loss_coef aux_loss_alpha seq_aux tf_legacy_loss
        ep_size
    """,
    "special tokens and the tokenizer": """
        bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id cls_token_id mask_token_id end_token_id
        eod_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id tokenizer_class tokenizer_name
        model_max_length max_sequence_length prefix n_special predict_special_tokens
    """,
    "how text is generated": """
        task_specific_params generation_config max_length min_length max_new_tokens do_sample early_stopping
        num_beams num_beam_groups num_return_sequences diversity_penalty temperature top_k top_p typical_p
        repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
        remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
        assistant_confidence_threshold assistant_lookbehind encoder_repetition_penalty epsilon_cutoff eta_cutoff
        num_assistant_tokens num_assistant_tokens_schedule target_lookbehind custom_pipelines
    """,
    "heads for other tasks, which a causal language model does not have": """
        summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj id2label
        label2id num_labels _num_labels problem_type finetuning_task
    """,
    "left behind by trainers, converters and transformers' own tests of BERT": """
        neftune_noise_alpha trl_version document_attention num_steps xla_device type_vocab_size
    """,
}
"""Reason → names of the attributes that, for this reason, change the logits of no family."""
INERT: dict[str, str] = {name: why for why, names in _INERT.items() for name in names.split()}
"""Attribute that changes the logits of no family → reason; those inert in one family alone are in its file."""
INERT_PREFIXES = ("unsloth_",)
"""Prefixes of attributes that trainers add to the files they write."""

SWITCHED_OFF: dict[str, Any] = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "pruned_heads": {},
    "quantization": None,
    "is_causal": True,
}
"""Attributes that any checkpoint may have, as long as they have this value."""
