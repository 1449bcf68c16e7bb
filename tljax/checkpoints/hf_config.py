"""Reading a Hugging Face ``config.json`` so that no attribute that matters can be overlooked.

:class:`HFConfig` remembers what a family has read. Whatever is left must be known not to change the function
(:data:`INERT`), or the model is refused by the name and value of the attribute.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from tljax.config import HookedTransformerConfig
from tljax.errors import CheckpointError, UnsupportedModelError

_INERT = """
    architectures model_type transformers_version _name_or_path _commit_hash torch_dtype dtype torchscript
    output_hidden_states output_attentions output_scores return_dict return_dict_in_generate use_cache
    is_decoder use_return_dict _attn_implementation _attn_implementation_autoset attn_implementation
    use_bfloat16 _flash_attn_2_enabled keys_to_ignore_at_inference use_flash_attn bos_token_id eos_token_id
    pad_token_id sep_token_id unk_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id
    tokenizer_class model_max_length max_sequence_length prefix initializer_range initializer_factor
    gradient_checkpointing attn_pdrop embd_pdrop resid_pdrop attention_dropout hidden_dropout
    embed_dropout resid_dropout activation_dropout residual_dropout embedding_dropout layerdrop init_std
    classifier_dropout dropout summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj id2label label2id num_labels _num_labels problem_type finetuning_task
    task_specific_params max_length min_length max_new_tokens do_sample early_stopping num_beams
    num_beam_groups num_return_sequences diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    chunk_size_feed_forward pretraining_tp reorder_and_upcast_attn tie_encoder_decoder is_llama_config
    transformers.js_config unsloth_version unsloth_fixed
"""
INERT = frozenset(_INERT.split())
"""Attributes that do not change logits: bookkeeping, dropout, generation and classification settings."""

SWITCHED_OFF: dict[str, Any] = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "pruned_heads": {},
    "quantization_config": None,
    "auto_map": None,
}
"""Attributes any checkpoint may carry as long as they are off."""

ACTIVATIONS = {
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_fast",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick_gelu",
}
"""Hugging Face activation name → ours."""

_REQUIRED: Any = object()
_AS_ABSENT: Any = object()
_HINTS = {
    "quantization_config": " Quantized weights are not supported: load the full-precision original.",
    "auto_map": " The checkpoint runs code of its own, which tljax cannot know.",
}


class HFConfig:
    """A config.json that keeps account of which attributes have been read.

    >>> hf = HFConfig({"n_embd": 8, "use_cache": True, "qk_norm": True})
    >>> hf("n_embd"), hf("n_inner", None)
    (8, None)
    >>> hf.refuse_unread()
    Traceback (most recent call last):
    tljax.errors.UnsupportedModelError: config.json sets qk_norm=True, which tljax does not implement ...
    """

    def __init__(self, attributes: Mapping[str, Any], origin: str = "config.json") -> None:
        self._attributes = attributes
        self._read: set[str] = set()
        self.origin = origin

    def __call__(
        self, name: str, default: Any = _REQUIRED, *, aka: tuple[str, ...] = (), null: Any = _AS_ABSENT
    ) -> Any:
        """Returns attribute ``name``; absent or null gives ``default``.

        Args:
            name: the attribute.
            default: what Hugging Face assumes when it is absent; required when not given.
            aka: other names of the same attribute, which must not disagree.
            null: what an explicit null means, where that is not the default.
        """
        self._read.update((name, *aka))
        found = {key: self._attributes[key] for key in (name, *aka) if self._attributes.get(key) is not None}
        if not found:
            if null is not _AS_ABSENT and name in self._attributes:
                return null
            if default is _REQUIRED:
                raise CheckpointError(f"{self.origin} has no {name!r}, which this architecture needs.")
            return default
        value, *others = found.values()
        if any(other != value for other in others):
            raise CheckpointError(f"{self.origin} contradicts itself: {found}.")
        return value

    def changed(self, **attributes: Any) -> "HFConfig":
        """Returns the config with other attributes; what is read of it counts as read of this one."""
        changed = HFConfig({**self._attributes, **attributes}, self.origin)
        changed._read = self._read
        return changed

    @property
    def attributes(self) -> Mapping[str, Any]:
        """All attributes, whether read or not."""
        return self._attributes

    def inner(self, attributes: Mapping[str, Any], name: str) -> "HFConfig":
        """Returns the config that attribute ``name`` holds, which keeps its own account of what is read."""
        return HFConfig(attributes, f"{self.origin} ({name})")

    def only(self, **allowed: Any) -> None:
        """Refuses the model unless each attribute is absent, null or exactly the value given here."""
        for name, value in allowed.items():
            if self(name, value) != value:
                raise self.unsupported(name, self(name), repr(value))

    def activation(self, name: str, default: str = _REQUIRED) -> str:
        """Returns our name of the activation in attribute ``name``."""
        value = self(name, default)
        if value not in ACTIVATIONS:
            raise self.unsupported(name, value, ", ".join(ACTIVATIONS))
        return ACTIVATIONS[value]

    def rotary(
        self,
        d_head: int,
        *,
        theta: str = "rope_theta",
        fraction: str = "partial_rotary_factor",
        default_fraction: float | None = None,
        default_theta: float = 10000.0,
        layer_type: str | None = None,
    ) -> dict[str, Any]:
        """Returns our rotary fields, from ``rope_parameters`` or from the older ``rope_scaling``.

        Args:
            d_head: width of a head.
            theta: older name of the base.
            fraction: older name of the rotated fraction of a head.
            default_fraction: that fraction when it is not given; ``None``: the whole head, and nothing else will do.
            default_theta: the base when it is not given.
            layer_type: whose entry to read, where ``rope_parameters`` has one for each type of layer. YaRN is then
                taken to be that type's own (``yarn_global_attn_only``).
        """
        rope = dict(self("rope_parameters", {}))
        if layer_type in rope:
            rope = dict(rope[layer_type])
        rope = {key: value for key, value in (rope | dict(self("rope_scaling", {}))).items() if value is not None}
        base = self("rope_theta", default_theta, aka=(theta,))
        part = self("partial_rotary_factor", 1.0 if default_fraction is None else default_fraction, aka=(fraction,))
        old_kind = rope.pop("type", "default")
        kind = rope.pop("rope_type", old_kind)
        kind = "longrope" if kind == "su" else kind
        fields = {
            "positional_embedding_type": "rotary",
            "rotary_base": float(rope.pop("rope_theta", base)),
            "rotary_dim": int(d_head * rope.pop("partial_rotary_factor", part)),
        }
        if default_fraction is None and fields["rotary_dim"] != d_head:
            raise self.unsupported("partial_rotary_factor", fields["rotary_dim"] / d_head, "1.0")
        if kind not in _SCALINGS:
            raise self.unsupported("rope_type", kind, ", ".join(_SCALINGS))
        try:
            fields |= _SCALINGS[kind](self, rope)
        except KeyError as error:
            raise CheckpointError(f"{self.origin} asks for rope_type={kind!r} without giving {error}.") from None
        if rope:
            raise self.unsupported(f"(rope_type {kind!r}) rope_parameters", rope, "none of these")
        if kind == "yarn" and layer_type is not None:
            if not fields["yarn_truncate"]:  # transformers does not look for it in the entry of one type
                raise self.unsupported(f"rope_parameters[{layer_type!r}] truncate", False, "True")
            fields["yarn_global_attn_only"] = True
        return fields

    def refuse_unread(self) -> None:
        """Raises UnsupportedModelError if an attribute was neither read nor known to be inert."""
        self.only(**{name: off for name, off in SWITCHED_OFF.items() if name not in self._read})
        left = {
            name: value
            for name, value in self._attributes.items()
            if name not in self._read and name not in INERT and value is not None
        }
        if left:
            shown = ", ".join(f"{name}={value!r}" for name, value in left.items())
            raise UnsupportedModelError(
                f"{self.origin} sets {shown}, which tljax does not implement for this architecture. "
                "Loading it anyway could give other numbers than the original model."
            )

    def unsupported(self, name: str, value: Any, supported: str) -> UnsupportedModelError:
        """Returns the error for an attribute whose value is not implemented."""
        return UnsupportedModelError(
            f"{self.origin} sets {name}={value!r}, which tljax does not implement for this architecture "
            f"(supported: {supported}).{_HINTS.get(name, '')}"
        )


def _original_length(hf: HFConfig, rope: dict[str, Any]) -> int:
    """Context length before stretching; like transformers, an attribute of the whole config goes first."""
    own = rope.pop("original_max_position_embeddings", None)
    length = hf("original_max_position_embeddings", own)
    return int(hf("max_position_embeddings") if length is None else length)


def _read_linear(hf: HFConfig, rope: dict[str, Any]) -> dict[str, Any]:
    return {"rotary_scaling_factor": float(rope.pop("factor"))}


def _read_dynamic(hf: HFConfig, rope: dict[str, Any]) -> dict[str, Any]:
    return {
        "use_dynamic_ntk_rope": True,
        "dynamic_ntk_factor": float(rope.pop("factor")),
        "train_seq_length": hf("max_position_embeddings"),
    }


def _read_llama3(hf: HFConfig, rope: dict[str, Any]) -> dict[str, Any]:
    return {
        "use_NTK_by_parts_rope": True,
        "NTK_original_ctx_len": _original_length(hf, rope),
        "NTK_by_parts_factor": float(rope.pop("factor")),
        "NTK_by_parts_low_freq_factor": float(rope.pop("low_freq_factor")),
        "NTK_by_parts_high_freq_factor": float(rope.pop("high_freq_factor")),
    }


def _read_yarn(hf: HFConfig, rope: dict[str, Any]) -> dict[str, Any]:
    factor = float(rope.pop("factor"))
    above, below = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
    inferred = yarn_mscale(factor, above) / yarn_mscale(factor, below) if above and below else yarn_mscale(factor)
    return {
        "use_yarn_rope": True,
        "yarn_factor": factor,
        "yarn_attention_factor": float(rope.pop("attention_factor", inferred)),
        "yarn_beta_fast": float(rope.pop("beta_fast", 32.0)),
        "yarn_beta_slow": float(rope.pop("beta_slow", 1.0)),
        "yarn_original_max_position_embeddings": _original_length(hf, rope),
        "yarn_truncate": bool(rope.pop("truncate", True)),
    }


def _read_longrope(hf: HFConfig, rope: dict[str, Any]) -> dict[str, Any]:
    original = _original_length(hf, rope)
    factor = float(rope.pop("factor", hf("max_position_embeddings") / original))
    inferred = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "longrope_short_factor": tuple(map(float, rope.pop("short_factor"))),
        "longrope_long_factor": tuple(map(float, rope.pop("long_factor"))),
        "longrope_attention_factor": float(rope.pop("attention_factor", inferred)),
        "longrope_original_max_position_embeddings": original,
    }


_SCALINGS: dict[str, Callable[[HFConfig, dict[str, Any]], dict[str, Any]]] = {
    "default": lambda hf, rope: {},
    "linear": _read_linear,
    "dynamic": _read_dynamic,
    "yarn": _read_yarn,
    "longrope": _read_longrope,
    "llama3": _read_llama3,
}
"""By ``rope_type``: takes what it knows out of ``rope_parameters`` and returns our fields."""


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """How much YaRN sharpens attention over a context stretched by ``factor`` (its ``mscale`` weighs that)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def attention_bias(nonzero: frozenset[str]) -> bool:
    """Whether any of the attention's four biases is in use."""
    return not nonzero.isdisjoint({"attn.b_Q", "attn.b_K", "attn.b_V", "attn.b_O"})


def rotary_fraction(cfg: HookedTransformerConfig) -> float:
    """Returns the fraction of a head that rotates, such that its product with ``d_head`` does not round down below."""
    dim = cfg.rotary_dim or 0
    fraction = dim / cfg.d_head
    return fraction if int(cfg.d_head * fraction) == dim else math.nextafter(fraction, 1.0)


def rope_scaling(cfg: HookedTransformerConfig) -> dict[str, Any] | None:
    """Returns Hugging Face's ``rope_scaling`` for ``cfg``: what :meth:`HFConfig.rotary` reads back."""
    if cfg.use_NTK_by_parts_rope:
        return {
            "rope_type": "llama3",
            "factor": cfg.NTK_by_parts_factor,
            "low_freq_factor": cfg.NTK_by_parts_low_freq_factor,
            "high_freq_factor": cfg.NTK_by_parts_high_freq_factor,
            "original_max_position_embeddings": cfg.NTK_original_ctx_len,
        }
    if cfg.use_yarn_rope:
        return {
            "rope_type": "yarn",
            "factor": cfg.yarn_factor,
            "attention_factor": cfg.yarn_attention_factor,
            "beta_fast": cfg.yarn_beta_fast,
            "beta_slow": cfg.yarn_beta_slow,
            "original_max_position_embeddings": cfg.yarn_original_max_position_embeddings,
            "truncate": cfg.yarn_truncate,
        }
    if cfg.longrope_short_factor is not None and cfg.longrope_long_factor is not None:
        return {
            "rope_type": "longrope",
            "short_factor": list(cfg.longrope_short_factor),
            "long_factor": list(cfg.longrope_long_factor),
            "attention_factor": cfg.longrope_attention_factor,
            "original_max_position_embeddings": cfg.longrope_original_max_position_embeddings,
        }
    if cfg.use_dynamic_ntk_rope:
        return {"rope_type": "dynamic", "factor": cfg.dynamic_ntk_factor}
    if cfg.rotary_scaling_factor != 1.0:
        return {"rope_type": "linear", "factor": cfg.rotary_scaling_factor}
    return None
