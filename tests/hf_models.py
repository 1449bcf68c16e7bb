"""Tiny random Hugging Face checkpoints, made on the spot with every parameter random (norms and biases included)."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hf_alibi_and_fused
import hf_gpt_like
import hf_latent
import hf_layer_kinds
import hf_llama_like
import hf_moe
import hf_norm_kinds
import hf_parallel
import hf_rotary
import numpy as np
from safetensors.numpy import load_file, save_file

GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 24, "vocab_size": 40}
NEOX = {
    "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 24, "vocab_size": 40,
}  # fmt: skip
LLAMA = {
    "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 24, "vocab_size": 40,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2_untied": ("gpt2", GPT2 | {"tie_word_embeddings": False, "n_inner": 20, "layer_norm_epsilon": 1e-3}),
    "gpt2_scaled": (
        "gpt2",
        GPT2 | {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu", "n_head": 2},
    ),
    "gpt2_unscaled": ("gpt2", GPT2 | {"scale_attn_weights": False, "activation_function": "gelu"}),
    "neox": ("gpt_neox", NEOX),
    "neox_sequential": (
        "gpt_neox",
        NEOX | {"use_parallel_residual": False, "rotary_pct": 1.0, "hidden_act": "gelu_new"},
    ),
    "neox_no_bias_tied": (
        "gpt_neox",
        NEOX | {"attention_bias": False, "tie_word_embeddings": True, "rotary_pct": 0.5, "hidden_act": "gelu_fast"},
    ),
    "llama_mha": ("llama", LLAMA),
    "llama_gqa_bias": ("llama", LLAMA | {"num_key_value_heads": 2, "attention_bias": True, "head_dim": 10}),
    "llama_mqa_tied_llama3": (
        "llama",
        LLAMA | {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    ),
    "llama_linear_rope": (
        "llama",
        LLAMA
        | {
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0},
            "hidden_act": "gelu_pytorch_tanh",
            "mlp_bias": True,
        },
    ),
    **hf_llama_like.VARIANTS,
    **hf_norm_kinds.VARIANTS,
    **hf_alibi_and_fused.VARIANTS,
    **hf_gpt_like.VARIANTS,
    **hf_parallel.VARIANTS,
    **hf_layer_kinds.VARIANTS,
    **hf_moe.VARIANTS,
    **hf_rotary.VARIANTS,
    **hf_latent.VARIANTS,
}


def hf_config(variant: str) -> Any:
    """The Hugging Face config of a variant."""
    from transformers import AutoConfig

    model_type, attributes = VARIANTS[variant]
    return AutoConfig.for_model(model_type, **({"bos_token_id": 0, "eos_token_id": 1} | attributes))


def make_hf_model(variant: str, directory: Path, spread: float = 0.3) -> Any:
    """Saves a random model in ``directory`` and returns the PyTorch model, in eval mode and float32.

    Args:
        variant: one of ``VARIANTS``.
        directory: where to.
        spread: standard deviation of every parameter.
    """
    return make_of(hf_config(variant), directory, spread)


def make_of(config: Any, directory: Path, spread: float = 0.3, **options: Any) -> Any:
    """Saves a random model of a Hugging Face config in ``directory``, and returns it as :func:`make_hf_model` does.

    ``options`` go to transformers' ``from_config``.
    """
    import torch
    from transformers import AutoModelForCausalLM

    # A process's first multi-threaded torch.tanh (and MKL's other vector functions) is off by 1e-4 in about one run of
    # forty: the library picks its precise kernels while the threads already run.
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_config(config, **options).eval()
    generator = torch.Generator().manual_seed(0)
    has_offset = model.config.model_type.startswith(("gemma", "nemotron"))  # their gains are 1 + w
    for name, parameter in model.named_parameters():
        is_gain = name.endswith("weight") and (parameter.ndim == 1 or "norm" in name) and not has_offset
        parameter.data = spread * torch.randn(parameter.shape, generator=generator) + is_gain
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(spread * torch.randn(buffer.shape, generator=generator))
    model.save_pretrained(directory)
    return model


def rewrite(
    source: Path,
    target: Path,
    tensors: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]] = dict,
    config: Callable[[dict[str, Any]], Mapping[str, Any]] = dict,
) -> Path:
    """Copies a checkpoint with its tensors or its config changed; returns ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors(load_file(source / "model.safetensors"))), target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(dict(config(json.loads((source / "config.json").read_text())))))
    return target


def shard(source: Path, target: Path, n_shards: int = 3) -> Path:
    """Copies a checkpoint as several shards with an index; returns ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    names = {key: f"model-{i % n_shards + 1:05}-of-{n_shards:05}.safetensors" for i, key in enumerate(tensors)}
    for name in set(names.values()):
        save_file({key: tensor for key, tensor in tensors.items() if names[key] == name}, target / name)
    index = {"metadata": {"total_size": 0}, "weight_map": names}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target
