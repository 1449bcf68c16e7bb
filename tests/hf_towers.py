"""Tiny random multimodal checkpoints, as transformers writes them, and the other names of their tensors."""

from pathlib import Path
from typing import Any

import numpy as np
from hf_llama_like import GQA

TEXT = GQA | {"vocab_size": 60, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}
SIGLIP = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
VISUAL = {
    "depth": 1, "hidden_size": 16, "embed_dim": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32,
}  # fmt: skip
IMAGE = 50
"""The id of an image token."""
QWEN = {"image_token_id": IMAGE, "video_token_id": 51, "vision_start_token_id": 52, "vision_end_token_id": 53}
GLM = {"image_token_id": IMAGE, "video_token_id": 51, "vision_config": VISUAL | {"image_size": 28}}
GLM_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 0]}
QWEN3_ROPE = {"rope_type": "default", "mrope_section": [2, 2, 2], "mrope_interleaved": True}

TOWERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT | {"head_dim": 8, "sliding_window": 5, "sliding_window_pattern": 2,
                               "query_pre_attn_scalar": 10, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        "vision_config": SIGLIP, "mm_tokens_per_image": 4, "image_token_index": IMAGE,
    },
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral", "head_dim": 10, "sliding_window": None},
        "vision_config": SIGLIP | {"model_type": "pixtral", "head_dim": 8}, "image_token_index": IMAGE,
        "tie_word_embeddings": False,
    },
    "qwen2_vl": {
        "text_config": TEXT | {"rope_parameters": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        "vision_config": VISUAL | {"hidden_size": 32}, **QWEN,
    },
    "qwen2_5_vl": {
        "text_config": TEXT | {"rope_parameters": {"type": "yarn", "mrope_section": [1, 1, 2], "factor": 4.0,
                                                   "original_max_position_embeddings": 16}},
        "vision_config": VISUAL, "tie_word_embeddings": True, **QWEN,
    },
    "qwen3_vl": {
        "text_config": TEXT | {"head_dim": 12, "rope_parameters": QWEN3_ROPE},
        "vision_config": VISUAL | {"deepstack_visual_indexes": [0]}, **QWEN,
    },
    "qwen3_vl_moe": {
        "text_config": TEXT | {"head_dim": 12, "rope_parameters": QWEN3_ROPE, "num_experts": 8,
                               "num_experts_per_tok": 3, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
        "vision_config": VISUAL | {"deepstack_visual_indexes": [0]}, **QWEN,
    },
    "glm4v": {"text_config": TEXT | {"partial_rotary_factor": 0.5, "rope_parameters": GLM_ROPE}, **GLM},
    "glm4v_moe": {
        "text_config": TEXT | {"head_dim": 8, "rope_parameters": GLM_ROPE, "n_routed_experts": 8, "n_group": 2,
                               "num_experts_per_tok": 3, "moe_intermediate_size": 24, "topk_group": 1},
        **GLM,
    },
}  # fmt: skip
"""By ``model_type``."""


def make_tower(model_type: str, directory: Path, spread: float = 0.3, **changes: Any) -> Any:
    """Saves a random model of ``TOWERS`` and returns the PyTorch model, images and all.

    Args:
        model_type: which.
        directory: where to.
        spread: standard deviation of every parameter.
        **changes: other attributes of the whole config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.set_num_threads(1)
    config = AutoConfig.for_model(model_type, **(TOWERS[model_type] | changes))
    model = AutoModelForImageTextToText.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        is_gain = name.endswith("weight") and (parameter.ndim == 1 or "norm" in name) and model_type != "gemma3"
        parameter.data = spread * torch.randn(parameter.shape, generator=generator) + is_gain
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    model.save_pretrained(directory)
    return model


def new_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names of transformers since 4.52: everything but the head is in ``model``."""
    renamed = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix("language_model.")
        if plain.startswith("model.") and not plain.startswith(("model.language_model.", "model.visual.")):
            plain = "model.language_model." + plain.removeprefix("model.")
        if plain.startswith(("visual.", "vision_tower.", "multi_modal_projector.")):
            plain = "model." + plain
        renamed[plain] = tensor
    return renamed


def old_names(tensors: dict[str, np.ndarray], of_llava: bool) -> dict[str, np.ndarray]:
    """The names before that: a text model of its own (of LLaVA's kind), or one with the tower beside it (Qwen 2)."""
    renamed = {}
    for name, tensor in new_names(tensors).items():
        plain = name.replace("model.language_model.", "model.").removeprefix("model.")
        is_text = name.startswith("model.language_model.")
        plain = f"model.{plain}" if is_text else plain
        renamed[f"language_model.{plain}" if of_llava and (is_text or name.startswith("lm_head")) else plain] = tensor
    return renamed
