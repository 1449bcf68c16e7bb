"""Families of multimodal checkpoints, of which only the text model is read.

Every prompt is text. An image token is an id like any other, as in transformers without pixels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tljax.checkpoints.families import experts
from tljax.checkpoints.families.gemma3 import GEMMA3
from tljax.checkpoints.families.glm4 import GLM4
from tljax.checkpoints.families.glm4_moe import GLM4_MOE
from tljax.checkpoints.families.llama import BLOCK
from tljax.checkpoints.families.mistral import MISTRAL
from tljax.checkpoints.families.qwen2 import QWEN2
from tljax.checkpoints.families.qwen3 import QWEN3
from tljax.checkpoints.families.qwen_moe import QWEN3_MOE
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.formats.tower import RENAMED, Tower
from tljax.checkpoints.rows import Row

_PIXTRAL = r"(model\.)?(vision_tower|multi_modal_projector)\..*"
_VISUAL = r"(model\.)?visual\..*"


def _tower(
    text: Family,
    architecture: str,
    model_type: str,
    left_out: str,
    defaults: Mapping[str, Any] | None = None,
    **tower: Any,
) -> Family:
    """A multimodal family.

    Args:
        text: the family of its text model.
        architecture, model_type: its own.
        left_out: pattern of the tensors of its other parts.
        defaults: what its text model's config class assumes where that of ``text`` assumes otherwise.
        **tower: fields of :class:`Tower`.
    """
    return dataclasses.replace(
        text,
        architecture=architecture,
        model_type=model_type,
        aka=None,
        ignored=(*text.ignored, left_out),
        renamed=RENAMED,
        defaults={**text.defaults, **(defaults or {})},
        tower=Tower(text_architecture=text.architecture, **tower),
    )


def _rows_of_qwen3_vl_moe(hf: HFConfig) -> list[Row]:
    """Returns Qwen 3's table with a layer's experts in two tensors: input axis first, as published, or last."""
    kept = [row for row in QWEN3_MOE.rows(hf) if ".experts." not in row.paths]
    key, ours = f"{BLOCK}.mlp.experts", "blocks.{l}.mlp.experts"
    last = experts.in_one(f"{key}.gate_up_proj", f"{key}.down_proj")
    of_experts = [
        Row(f"{key}.gate_up_proj", "n_experts d_model (2 d_expert)", f"{ours}.W_gate|W_in"),
        Row(f"{key}.down_proj", "n_experts d_expert d_model", f"{ours}.W_out"),
        *(dataclasses.replace(row, other=True) for row in last),
    ]
    return kept + experts.by_layer(experts.sparse_layers(hf), of_experts, ())


GEMMA3_IMAGES = _tower(
    GEMMA3,
    "Gemma3ForConditionalGeneration",
    "gemma3",
    _PIXTRAL,
    tied=True,
    tied_by_text=False,
    defaults=sizes(d_model=2304, n_layers=26, n_heads=8, d_mlp=9216, n_ctx=131072, d_vocab=262208)
    | {"num_key_value_heads": 4, "head_dim": 256},
)
MISTRAL3 = _tower(
    MISTRAL,
    "Mistral3ForConditionalGeneration",
    "mistral3",
    _PIXTRAL,
    text_types=("mistral",),
    tied=True,
    tied_by_text=False,
)
_QWEN2 = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "max_window_layers": 80,
    "rope_theta": 1e6,
}
QWEN2_VL = _tower(QWEN2, "Qwen2VLForConditionalGeneration", "qwen2_vl", _VISUAL, flat=True, mrope=True, defaults=_QWEN2)
QWEN2_5_VL = _tower(
    QWEN2, "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", _VISUAL, flat=True, mrope=True, defaults=_QWEN2
)
QWEN3_VL = _tower(
    QWEN3,
    "Qwen3VLForConditionalGeneration",
    "qwen3_vl",
    _VISUAL,
    mrope=True,
    tied_by_text=False,
    defaults=sizes(d_model=4096, n_layers=32, n_heads=32, d_mlp=22016, n_ctx=128000, d_vocab=151936)
    | {"num_key_value_heads": 32, "head_dim": 128, "rope_theta": 5e5},
    only={"use_sliding_window": False, "layer_types": None},
)
QWEN3_VL_MOE = dataclasses.replace(
    _tower(
        QWEN3_MOE,
        "Qwen3VLMoeForConditionalGeneration",
        "qwen3_vl_moe",
        _VISUAL,
        mrope=True,
        tied_by_text=False,
        defaults=sizes(d_model=2048, n_layers=24, n_heads=16, d_mlp=5632, n_ctx=128000, d_vocab=151936)
        | {
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": True,
            "rope_theta": 5e5,
        },
        only={"use_sliding_window": False, "layer_types": None, "norm_topk_prob": True},
    ),
    rows=_rows_of_qwen3_vl_moe,
)
GLM4V = _tower(
    GLM4,
    "Glm4vForConditionalGeneration",
    "glm4v",
    _VISUAL,
    flat=True,
    mrope=True,
    defaults=sizes(d_model=4096, n_layers=40, n_heads=32, d_mlp=13696, n_ctx=32768, d_vocab=151552)
    | {"num_key_value_heads": 2, "head_dim": None, "rms_norm_eps": 1e-5, "partial_rotary_factor": 1.0},
    only={"attention_bias": True},
)
GLM4V_MOE = _tower(
    GLM4_MOE,
    "Glm4vMoeForConditionalGeneration",
    "glm4v_moe",
    _VISUAL,
    mrope=True,
    defaults=sizes(d_model=4096, n_layers=46, n_heads=96, d_mlp=10944, n_ctx=65536, d_vocab=151424)
    | {"attention_bias": True},
    only={"use_qk_norm": False},
)

TOWERS: tuple[Family, ...] = (GEMMA3_IMAGES, MISTRAL3, QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE, GLM4V, GLM4V_MOE)
TEXT_ARCHITECTURES = {family.architecture: family.tower.text_architecture for family in TOWERS if family.tower}
"""Multimodal architecture → that of its text model alone."""
