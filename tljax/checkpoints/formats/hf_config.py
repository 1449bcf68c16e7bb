"""Reading a Hugging Face ``config.json`` so that no attribute that matters can be overlooked.

An attribute is used (a family reads it, and :class:`HFConfig` records that), known to be inert (listed for every family
in :mod:`tljax.checkpoints.formats.inert`, for one family in its file), or unknown. An unknown attribute is an error,
which names it with its value and says how to load without it.
"""

import copy
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

from tljax.checkpoints.formats.inert import INERT, INERT_PREFIXES, SWITCHED_OFF
from tljax.config import HookedTransformerConfig
from tljax.errors import CheckpointError, UnsupportedModelError

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
    "quantization": " Quantized weights are read where a quantization_config with a quant_method describes them: load "
    "such a checkpoint, or the full-precision original.",
    "auto_map": " The checkpoint brings code of its own, which tljax cannot know. transformers prefers its own class: "
    'ignore_config=["auto_map"] does the same.',
    "is_causal": " tljax's attention is causal.",
}
LARGEST = 2**31 - 1
"""The largest size that a model may have: JAX indexes with 32 bits."""
MOST_LAYERS = 10_000
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


class HFConfig:
    """A config.json that records which of its attributes have been read.

    Args:
        attributes: the contents of the file.
        origin: the file's name in errors.
        defaults: the family's defaults for absent attributes, which override those that a reader passes.
        aliases: other name → name, as in the class's ``attribute_map``.
        inert: attributes that are inert for this family.

    >>> hf = HFConfig({"n_embd": 8, "use_cache": True, "qk_norm": True})
    >>> hf("n_embd"), hf("n_inner", None)
    (8, None)
    >>> hf.refuse_unread()
    Traceback (most recent call last):
    tljax.errors.UnsupportedModelError: config.json sets qk_norm=True, which tljax does not implement ...
    """

    def __init__(
        self,
        attributes: Mapping[str, Any],
        origin: str = "config.json",
        *,
        defaults: Mapping[str, Any] = MappingProxyType({}),
        aliases: Mapping[str, str] = MappingProxyType({}),
        inert: Collection[str] = (),
    ) -> None:
        self._attributes = attributes
        self._read: set[str] = set()
        self._defaults, self._aliases, self._inert = defaults, aliases, frozenset(inert)
        self.origin, self._prefix = origin, ""

    def __call__(
        self, name: str, default: Any = _REQUIRED, *, aka: tuple[str, ...] = (), null: Any = _AS_ABSENT
    ) -> Any:
        """Returns attribute ``name``; if absent or null, the family's default, or else ``default``.

        Args:
            name: the attribute.
            default: Hugging Face's default; without one the attribute is required. A value must have its type.
            aka: other names of the same attribute, which must not disagree.
            null: the value of an explicit null, if that is not the default.
        """
        names = (name, *aka, *(other for other, own in self._aliases.items() if own == name))
        self._read.update(names)
        default = self._defaults.get(name, default)
        found = {key: self._attributes[key] for key in names if self._attributes.get(key) is not None}
        if not found:
            by_default = name in self._defaults and default is None
            if null is not _AS_ABSENT and (name in self._attributes or by_default):
                return null
            if default is _REQUIRED:
                raise CheckpointError(f"{self.origin} has no {name!r}, which this architecture needs.")
            return default
        for key, each in found.items():
            self._check_type(key, each, default)
        value, *others = found.values()
        if any(other != value for other in others):
            raise CheckpointError(f"{self.origin} contradicts itself: {found}.")
        return value

    def _check_type(self, name: str, value: Any, default: Any) -> None:
        """Raises unless ``value`` has the type of ``default`` and, for a size, is at least 1 and not too large."""
        kind = next((kind for kind in _KINDS if isinstance(default, kind)), None)
        if kind is not None and not _is_a(value, kind):
            raise CheckpointError(f"{self.origin} sets {name}={shortened(value)}: expected {_KINDS[kind]}.")
        most = MOST_LAYERS if name in _LAYERS else LARGEST
        if kind is int and name in {*self._defaults, *self._aliases} and not 1 <= value <= most:
            raise CheckpointError(f"{self.origin} sets {name}={shortened(value)}: expected between 1 and {most:,}.")

    def changed(self, **attributes: Any) -> "HFConfig":
        """Returns the config with ``attributes`` changed; a read of either counts for both."""
        changed = copy.copy(self)
        changed._attributes = {**self._attributes, **attributes}
        return changed

    @property
    def attributes(self) -> Mapping[str, Any]:
        """All attributes, whether read or not."""
        return self._attributes

    def inner(self, attributes: Mapping[str, Any], name: str) -> "HFConfig":
        """Returns ``attributes``, the contents of ``name``, as a config of this family with its own record of reads."""
        inner = copy.copy(self)
        inner._attributes, inner._read = attributes, set()
        inner.origin, inner._prefix = f"{self.origin} ({name})", f"{self._prefix}{name}."
        return inner

    def nested(self, name: str) -> "HFConfig":
        """Returns the object in attribute ``name`` as a config of its own; empty if it is absent."""
        inner = HFConfig(self(name, {}), f"{self.origin} {name}")
        inner._prefix = f"{self._prefix}{name}."
        return inner

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
            default_fraction: default of that fraction; ``None``: the whole head, and any other value is refused.
            default_theta: default of the base.
            layer_type: the type of layer whose entry to read, if ``rope_parameters`` has one for each type. YaRN then
                applies to this type alone (``yarn_global_attn_only``).
        """
        rope = dict(self("rope_parameters", {}))
        if layer_type in rope:
            rope = dict(rope[layer_type])
        rope = {key: value for key, value in (rope | dict(self("rope_scaling", {}))).items() if value is not None}
        self._check_rope(rope)
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

    def _check_rope(self, rope: Mapping[str, Any]) -> None:
        for name, value in rope.items():
            kind = _ROPE_KINDS.get(name)
            if kind is not None and not _is_a(value, kind):
                raise CheckpointError(
                    f"{self.origin} sets rope_scaling {name}={shortened(value)}: expected {_KINDS[kind]}."
                )

    def refuse_unread(self) -> None:
        """Raises UnsupportedModelError if an attribute was neither read nor known to be inert."""
        self.only(**{name: off for name, off in SWITCHED_OFF.items() if name not in self._read})
        left = {name: value for name, value in self._attributes.items() if value is not None and self._matters(name)}
        if left:
            shown = ", ".join(f"{name}={shortened(value)}" for name, value in left.items())
            raise UnsupportedModelError(
                f"{self.origin} sets {shown}, which tljax does not implement for this architecture. "
                "Loading it anyway could give other numbers than the original model. If you know that "
                f"{'it changes' if len(left) == 1 else 'they change'} nothing, pass "
                f"ignore_config={json.dumps([self._prefix + name for name in left])}."
            )

    def _matters(self, name: str) -> bool:
        return not (name in self._read or name in INERT or name in self._inert or name.startswith(INERT_PREFIXES))

    def check_own_code(self, modules: str) -> None:
        """Refuses a checkpoint with its own code, unless transformers has a class for it, which it prefers.

        Args:
            modules: pattern of the names, after ``configuration_`` and ``modeling_``, of accepted modules.
        """
        known = re.compile(rf"(?:[\w.-]+/[\w.-]+--)?(?:configuration|modeling)_(?:{modules or '(?!)'})\.\w+")
        code = {key: name for key, name in self("auto_map", {}).items() if key != "AutoTokenizer"}
        if not all(known.fullmatch(str(name)) for name in code.values()):
            raise self.unsupported("auto_map", code, "code that transformers has taken over, or none")

    def unsupported(self, name: str, value: Any, supported: str) -> UnsupportedModelError:
        """Returns the error for an attribute whose value is not implemented."""
        return UnsupportedModelError(
            f"{self.origin} sets {name}={shortened(value)}, which tljax does not implement for this architecture "
            f"(supported: {supported}).{_HINTS.get(name, '')}"
        )


_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}
"""Type of a default → the JSON type that a value must have; bool first, since it is an int in Python."""


_ROPE_NUMBERS = """
    rope_theta partial_rotary_factor factor attention_factor beta_fast beta_slow low_freq_factor high_freq_factor mscale
    mscale_all_dim original_max_position_embeddings short_mscale long_mscale alpha
"""
_ROPE_KINDS: dict[str, type] = dict.fromkeys(_ROPE_NUMBERS.split(), float) | {
    "type": str, "rope_type": str, "short_factor": list, "long_factor": list, "truncate": bool,
}  # fmt: skip
"""Rotary parameter → its type."""


def _is_a(value: Any, kind: type) -> bool:
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, list | tuple if kind is list else kind)


def shortened(value: Any, most: int = 240) -> str:
    """Returns ``value`` as Python writes it, cut where that is longer than ``most`` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


def _original_length(hf: HFConfig, rope: dict[str, Any]) -> int:
    """Returns the context length before stretching; as in transformers, the whole config's attribute comes first."""
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
    rope.pop("finetuned", None)  # says whether the model was trained further
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
"""``rope_type`` → function that pops the parameters it knows from ``rope_parameters`` and returns our fields."""


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """Returns how much YaRN sharpens attention over a context stretched by ``factor``; ``weight`` is ``mscale``."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def attention_bias(nonzero: frozenset[str]) -> bool:
    """Whether any of the attention's four biases is in use."""
    return not nonzero.isdisjoint({"attn.b_Q", "attn.b_K", "attn.b_V", "attn.b_O"})


def rotary_fraction(cfg: HookedTransformerConfig) -> float:
    """Returns the fraction of a head that rotates, such that ``int(d_head * fraction)`` is ``rotary_dim``."""
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
