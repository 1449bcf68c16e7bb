"""The functions of ``transformer_lens.utils``: ``from tljax import utils``."""

from typing import Any

from tljax.cache.slices import SliceInput
from tljax.config import ACTIVATIONS
from tljax.elsewhere import UTILS, missing
from tljax.generation.sampling import sample_logits
from tljax.hooks.names import get_act_name
from tljax.model.losses import lm_accuracy, lm_cross_entropy_loss
from tljax.modules.activations import activation, relu2, solu, xielu
from tljax.modules.activations import soft_cap as apply_softcap
from tljax.utils.arrays import (
    SOFTCAP_DISABLED,
    filter_dict_by_prefix,
    get_corner,
    get_cumsum_along_dim,
    get_matrix_corner,
    get_offset_position_ids,
    is_lower_triangular,
    is_square,
    remove_batch_dim,
    repeat_along_head_dimension,
    softcap_enabled,
    to_numpy,
    transpose,
)
from tljax.utils.prompts import logits_to_df, test_prompt
from tljax.utils.slices import Slice
from tljax.utils.tokenizing import (
    get_attention_mask,
    get_input_with_manually_prepended_bos,
    get_tokenizer_with_bos,
    get_tokens_with_bos_removed,
    tokenize_and_concatenate,
)
from tljax.weights.factored_matrix import composition_scores

SUPPORTED_ACTIVATIONS = {name: activation(name) for name in ACTIVATIONS if name != "xielu"} | {"xielu": xielu}
"""Activation functions by ``cfg.act_fn``; ``xielu`` takes its parameters as arguments."""

gelu_new = SUPPORTED_ACTIVATIONS["gelu_new"]
gelu_fast = SUPPORTED_ACTIVATIONS["gelu_fast"]
gelu_pytorch_tanh = SUPPORTED_ACTIVATIONS["gelu_pytorch_tanh"]

USE_DEFAULT_VALUE = None
"""Value of an argument that stands for its default in the config."""

__all__ = [
    "SOFTCAP_DISABLED",
    "SUPPORTED_ACTIVATIONS",
    "USE_DEFAULT_VALUE",
    "Slice",
    "SliceInput",
    "apply_softcap",
    "composition_scores",
    "filter_dict_by_prefix",
    "gelu_fast",
    "gelu_new",
    "gelu_pytorch_tanh",
    "get_act_name",
    "get_attention_mask",
    "get_corner",
    "get_cumsum_along_dim",
    "get_input_with_manually_prepended_bos",
    "get_matrix_corner",
    "get_offset_position_ids",
    "get_tokenizer_with_bos",
    "get_tokens_with_bos_removed",
    "is_lower_triangular",
    "is_square",
    "lm_accuracy",
    "lm_cross_entropy_loss",
    "logits_to_df",
    "relu2",
    "remove_batch_dim",
    "repeat_along_head_dimension",
    "sample_logits",
    "softcap_enabled",
    "solu",
    "test_prompt",
    "to_numpy",
    "tokenize_and_concatenate",
    "transpose",
    "xielu",
]


def __getattr__(name: str) -> Any:
    raise missing("tljax.utils", name, UTILS, __all__)
