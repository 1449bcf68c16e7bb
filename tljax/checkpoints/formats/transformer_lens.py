"""TransformerLens's own format: its config, and its state dict as a table of rows.

Tensors have the names of our parameters. Rows differ from ours in the order of axes, the names of grouped keys and
values (``_W_K``), the experts, and what 3.9 switches on by ``original_architecture``.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tljax.checkpoints.files.reader import PickleFiles, SafetensorsFiles, Tensors, read_json
from tljax.checkpoints.layout import parameter_axes
from tljax.checkpoints.rows import Row, TensorInfo
from tljax.config import HookedTransformerConfig
from tljax.errors import CheckpointError, ConfigError, InputError, UnsupportedModelError, nearest
from tljax.modules.parameters import axis_sizes

_SAME = """
    d_model d_head n_layers n_ctx n_heads d_mlp d_vocab d_vocab_out n_key_value_heads act_fn gated_mlp attn_only
    parallel_attn_mlp eps normalization_type final_rms use_normalization_before_and_after post_embedding_ln
    positional_embedding_type rotary_dim rotary_base rotary_base_local rotary_scaling_factor rotary_adjacent_pairs
    use_NTK_by_parts_rope NTK_by_parts_low_freq_factor NTK_by_parts_high_freq_factor NTK_by_parts_factor
    NTK_original_ctx_len use_yarn_rope yarn_factor yarn_attention_factor yarn_beta_fast yarn_beta_slow
    yarn_original_max_position_embeddings yarn_truncate yarn_global_attn_only use_dynamic_ntk_rope train_seq_length
    use_attn_scale attn_scale scale_attn_by_inverse_layer_idx attn_scores_soft_cap output_logits_soft_cap use_qk_norm
    clip_qkv use_attention_sinks use_local_attn window_size attn_types attention_dir num_experts experts_per_token
    norm_topk_prob use_attn_result use_split_qkv_input use_hook_mlp_in use_attn_in use_hook_tokens dtype seed init_mode
    init_weights initializer_range tokenizer_name tokenizer_prepends_bos default_prepend_bos model_name
    original_architecture
""".split()
"""Fields with the same name and meaning in TransformerLens and tljax."""

_INERT = """
    device n_devices n_params uses_rms_norm layer_norm_folding ungroup_grouped_query_attention from_checkpoint
    checkpoint_index checkpoint_label_type checkpoint_value trust_remote_code quantization_method tie_word_embeddings
    decoder_start_token_id
""".split()
"""Fields that change nothing: where the model was, where it came from, values derived from other fields. A state dict
holds both of two tied tensors, and its own dtypes show whether it is quantised."""

_UNSET = {
    "load_in_4bit": "4-bit weights are not read: load the model in full precision",
    "relative_attention_max_distance": "relative position biases are T5's",
    "relative_attention_num_buckets": "relative position biases are T5's",
}
"""Fields that must not be set, each with the reason."""

_REQUIRED = ("d_model", "n_layers", "n_ctx")
_NORM_AFTER = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
_JOINT_QK_NORM = ("OlmoeForCausalLM", *_NORM_AFTER)
_GPT_OSS = "GptOssForCausalLM"

_BUFFERS = (r"blocks\.\d+\.attn\.(mask|IGNORE|rotary_sin|rotary_cos|alibi)",)
"""Patterns of stored names that are not parameters."""


@runtime_checkable
class HasToDict(Protocol):
    """A config object, such as TransformerLens's own."""

    def to_dict(self) -> Mapping[str, Any]:
        """Returns its fields."""
        ...


def read_config(cfg: Any) -> HookedTransformerConfig:
    """Returns our config for a ``HookedTransformerConfig`` of TransformerLens 3.9.

    Args:
        cfg: its ``to_dict()``, a JSON file with that, the object itself, or already a config of ours.

    Raises:
        ConfigError: a key is not a field in 3.9, a required one is absent, or a value does not fit.
        UnsupportedModelError: a field asks for something that tljax does not implement.
        CheckpointError: the JSON file is missing or damaged.
        InputError: ``cfg`` is something else.
    """
    if isinstance(cfg, HookedTransformerConfig):
        return cfg
    if isinstance(cfg, str | os.PathLike):
        fields = read_json(Path(cfg))
    elif isinstance(cfg, Mapping):
        fields = dict(cfg)
    elif isinstance(cfg, HasToDict):
        fields = dict(cfg.to_dict())
    else:
        raise InputError(
            f"cfg is a {type(cfg).__name__}; expected TransformerLens's cfg.to_dict(), a JSON file that holds it, or "
            "the config itself."
        )
    _check_keys(fields)
    ours = {name: _plain(name, fields[name]) for name in _SAME if name in fields}
    if not ours.get("attn_only") and ours.get("act_fn") is None and "act_fn" in ours:
        raise ConfigError("act_fn=None needs attn_only=True: a model with an MLP has an activation.")
    return _computed_by_transformer_lens(ours, fields)


def _check_keys(fields: Mapping[str, Any]) -> None:
    known = [*_SAME, *_INERT, *_UNSET, "use_logn_attn"]
    if unknown := [f"{key!r} is no field of it.{nearest(key, known)}" for key in fields if key not in known]:
        raise ConfigError(f"cfg is not a HookedTransformerConfig of TransformerLens 3.9: {' '.join(unknown)}")
    if absent := [name for name in _REQUIRED if name not in fields]:
        raise ConfigError(f"cfg lacks {', '.join(absent)}. Pass the whole of TransformerLens's cfg.to_dict().")
    if fields.get("d_vocab", -1) == -1:
        raise ConfigError("cfg has no d_vocab (or -1): give the number of rows of embed.W_E.")
    for name, reason in _UNSET.items():
        if fields.get(name):
            raise UnsupportedModelError(f"cfg has {name}={fields[name]!r}: {reason}.")
    if fields.get("positional_embedding_type") == "relative_positional_bias":
        raise UnsupportedModelError("cfg has positional_embedding_type='relative_positional_bias', which is T5's.")
    if fields.get("use_logn_attn") and fields["n_ctx"] > (fields.get("train_seq_length") or 0):
        raise UnsupportedModelError(
            f"cfg has use_logn_attn=True with n_ctx={fields['n_ctx']}: beyond train_seq_length="
            f"{fields.get('train_seq_length')} queries would be scaled by their position. Give an n_ctx up to that."
        )


def _computed_by_transformer_lens(ours: dict[str, Any], fields: Mapping[str, Any]) -> HookedTransformerConfig:
    """Returns our config for what 3.9 computes with these fields, some of it by the architecture's name."""
    architecture = fields.get("original_architecture")
    if ours.get("attn_only"):
        ours["d_mlp"] = None  # always set in TransformerLens
    if ours.get("num_experts") is not None:
        ours["gated_mlp"] = True  # whatever the field says
        if architecture == _GPT_OSS:
            ours |= {"router": "chosen_softmax", "expert_biases": True, "swiglu_limit": 7.0, "act_fn": "quick_gelu"}
    if architecture in _JOINT_QK_NORM and not ours.get("use_qk_norm"):
        ours |= {"use_qk_norm": True, "qk_norm_span": "joint"}
    if architecture in _NORM_AFTER:
        ours |= {"use_normalization_after_only": True, "use_normalization_before_and_after": False}
    cfg = HookedTransformerConfig.from_dict(ours)
    if cfg.positional_embedding_type == "alibi" and cfg.n_heads & (cfg.n_heads - 1):
        raise UnsupportedModelError(
            f"cfg has alibi with n_heads={cfg.n_heads}: TransformerLens 3.9 has other slopes than published models "
            "where the number of heads is no power of two. Load the original checkpoint with from_pretrained."
        )
    return cfg


def _plain(name: str, value: Any) -> Any:
    """Returns a field's value as a Python scalar, or a torch dtype as its name."""
    if name == "dtype":
        return str(value).removeprefix("torch.") if str(value).startswith("torch.") else value
    return value.item() if isinstance(value, np.generic) else value


def rows(cfg: HookedTransformerConfig, optional_biases: bool = False) -> list[Row]:
    """Returns the table of a state dict of TransformerLens 3.9.

    Args:
        cfg: the model's config.
        optional_biases: whether biases may be absent, which makes them zero.
    """
    table = []
    for path, axes in parameter_axes(cfg).items():
        key, stored, aka = _stored_as(cfg, path, " ".join(axes))
        optional = optional_biases and path.rpartition(".")[2].startswith("b_")
        table.append(Row(key, stored, path, aka=aka, other=optional))
    return table


def _stored_as(cfg: HookedTransformerConfig, path: str, axes: str) -> tuple[str, str, str | None]:
    """Returns the name, axes and other name of a parameter in a state dict."""
    parent, _, leaf = path.rpartition(".")
    if parent.endswith(".attn") and leaf in ("W_Q", "W_K", "W_V"):
        width, heads, inner = axes.split()
        axes = f"{heads} {width} {inner}"
    if parent.endswith(".attn") and leaf in ("W_K", "W_V", "b_K", "b_V"):
        grouped = cfg.n_key_value_heads is not None
        plain, underscored = f"{parent}.{leaf}", f"{parent}._{leaf}"
        return (underscored, axes, plain) if grouped else (plain, axes, underscored)
    if leaf in ("W_router", "b_router"):
        return f"{parent}.W_gate.{_linear(leaf)}", " ".join(axes.split()[::-1]), None
    if parent.endswith(".mlp.experts"):
        expert, *rest = axes.split()
        return f"{parent}.{{e}}.W_{leaf[2:]}.{_linear(leaf)}", " ".join([expert, *rest[::-1]]), None
    if parent.endswith(".mlp.act"):
        return f"{parent}_fn.{leaf}", axes, None
    if cfg.use_normalization_after_only and parent.endswith("_post"):
        return f"{parent.removesuffix('_post')}.{leaf}", axes, None
    return path, axes, None


def _linear(leaf: str) -> str:
    return "weight" if leaf.startswith("W_") else "bias"


def ignored(cfg: HookedTransformerConfig) -> tuple[str, ...]:
    """Returns patterns of stored names that are not parameters of ``cfg``."""
    return _BUFFERS if cfg.learns_positions else (*_BUFFERS, r"pos_embed\.W_pos")  # 3.9 makes one for alibi too


class OneNumber(Tensors):
    """A state dict in which the learned scalars of an activation get an axis of length 1."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self.info = {
            key: TensorInfo(info.dtype, (1,)) if self._is_learned_number(key) and info.shape == () else info
            for key, info in tensors.info.items()
        }

    def read(self, key: str) -> np.ndarray:
        """Returns tensor ``key`` in its stored dtype."""
        return self._tensors.read(key).reshape(self.info[key].shape)

    @staticmethod
    def _is_learned_number(key: str) -> bool:
        return key.endswith((".act_fn.alpha_p", ".act_fn.alpha_n"))


def open_file(file: Path) -> Tensors:
    """Opens a state dict in a safetensors file or in one of torch's.

    Raises:
        CheckpointError: no such file, or it is damaged or holds something else.
        UnsupportedModelError: a file of torch's, and torch is not installed.
    """
    if not file.is_file():
        raise CheckpointError(
            f"{file} is not a file. Expected TransformerLens's state_dict(): a mapping of arrays, a .safetensors file, "
            "or what torch.save wrote (.pt, .pth)."
        )
    return SafetensorsFiles([file]) if file.suffix == ".safetensors" else PickleFiles([file])


def hint(cfg: HookedTransformerConfig, table: Sequence[Row], stored: Mapping[str, TensorInfo]) -> str:
    """Returns the likely reason why a state dict does not fit its config, or an empty string."""
    norm, sizes = cfg.normalization_type, axis_sizes(cfg)
    with_gain = any(key.endswith((".ln1.w", ".ln2.w", "ln_final.w")) for key in stored)
    if norm in ("LN", "RMS") and not with_gain:
        return f" No norm has a weight, as after fold_ln: then cfg has normalization_type={norm + 'Pre'!r}."
    if norm in ("LNPre", "RMSPre") and with_gain:
        return f" Norms have weights, so they are not folded: then cfg has normalization_type={norm[:-3]!r}."
    turned = [row.key for row in table if _is_turned(row.shape(sizes), stored.get(row.key))]
    if turned:
        return (
            f" {turned[0]} and {len(turned) - 1} others lie the other way round, as in state dicts of 2022 "
            "(EasyTransformer): swap their last two axes."
        )
    return ""


def _is_turned(expected: tuple[int, ...], info: TensorInfo | None) -> bool:
    swapped = (*expected[:-2], *expected[:-3:-1])
    return info is not None and info.shape == swapped != expected
