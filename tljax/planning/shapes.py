"""Configs without their weights: of well-known models from a table, of others from their config.json alone."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tljax.checkpoints.description import describe, describe_checkpoint
from tljax.checkpoints.files import hub
from tljax.checkpoints.files.names import ALIASES, hub_id
from tljax.checkpoints.files.reader import CONFIG
from tljax.checkpoints.opening import Checkpoint
from tljax.config import HookedTransformerConfig
from tljax.errors import CheckpointError, InputError, nearest

_LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 131072, "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "intermediate_size")


def _llama(*sizes: int) -> dict[str, Any]:
    return _LLAMA_3 | dict(zip(_SIZES, sizes, strict=True))


_KNOWN: Mapping[str, dict[str, Any]] = {
    "openai-community/gpt2": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12,
        "n_positions": 1024, "vocab_size": 50257, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    },
    "meta-llama/Llama-3.2-1B": _llama(2048, 16, 32, 64, 8192) | {"tie_word_embeddings": True},
    "meta-llama/Llama-3.2-3B": _llama(3072, 28, 24, 128, 8192) | {"tie_word_embeddings": True},
    "meta-llama/Llama-3.1-8B": _llama(4096, 32, 32, 128, 14336),
    "meta-llama/Llama-3.1-70B": _llama(8192, 80, 64, 128, 28672),
    "meta-llama/Llama-3.1-405B": _llama(16384, 126, 128, 128, 53248),
    "deepseek-ai/DeepSeek-V3": {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
        "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "routed_scaling_factor": 2.5, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129280, "hidden_act": "silu",
        "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                         "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
    },
}  # fmt: skip
"""Attributes of published config files that decide shapes, by hub id."""
_SAME_SHAPE = ("-instruct", "-base")
_SHORT = {repo.rpartition("/")[2].lower(): repo for repo in _KNOWN} | {repo.lower(): repo for repo in _KNOWN}


def read_shape(model: Any) -> HookedTransformerConfig:
    """Returns the config of what a user named; no weight is read.

    Args:
        model: a config or a dict of its fields, a directory with ``config.json``, a bundled model, an alias or a hub
            id. The shapes of a few large models are known; of other models on the hub only ``config.json`` is
            downloaded.

    Raises:
        CheckpointError: there is no such model; names the nearest.
        InputError: this is neither a config nor a name.
    """
    if isinstance(model, HookedTransformerConfig | Mapping):
        return HookedTransformerConfig.unwrap(model)
    if not isinstance(model, str | os.PathLike):
        raise InputError(
            f"plan() takes a model's name, a directory with {CONFIG}, or a HookedTransformerConfig, got "
            f"{type(model).__name__}. For a model that is loaded already pass model.cfg."
        )
    name = os.fspath(model)
    if (known := _known(name)) is not None:
        return _read(known, _KNOWN[known])
    if (directory := _directory(model)) is not None:
        if not (directory / CONFIG).is_file():
            raise CheckpointError(f"{directory} has no {CONFIG}, which says the model's shapes.")
        return describe(directory).cfg
    try:
        repo = hub_id(name)
    except CheckpointError as error:
        near = nearest(name.lower(), [*_SHORT, *ALIASES])
        raise CheckpointError(
            f"{name!r} is neither a directory with {CONFIG}, nor a known model name, nor a hub id of the form "
            f"'owner/name'.{near}"
        ) from error
    if (known := _known(repo)) is not None:
        return _read(known, _KNOWN[known])
    return describe(hub.download(repo, lambda files: (CONFIG,), what=CONFIG)).cfg


def _known(name: str) -> str | None:
    """Returns the hub id in the table that a name means, or one of the same shape."""
    lower = ALIASES.get(name.lower(), name).lower()
    for ending in ("", *_SAME_SHAPE):
        if lower.endswith(ending) and (repo := _SHORT.get(lower.removesuffix(ending))) is not None:
            return repo
    return None


def _directory(model: str | os.PathLike[str]) -> Path | None:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    bundled = hub.MODELS / os.fspath(model).lower()
    return bundled if (bundled / CONFIG).is_file() else None


def _read(name: str, attributes: Mapping[str, Any]) -> HookedTransformerConfig:
    def no_tensors() -> Any:
        raise CheckpointError(f"The table of shapes holds no weights of {name}.")

    source = Checkpoint(
        named=lambda own: own, origin=name, attributes=dict(attributes), config_name=CONFIG, tensors=no_tensors
    )
    return describe_checkpoint(source).cfg.replace(model_name=name.rpartition("/")[2])
