"""Reading ``adapter_config.json``: each key is used, known to be inert, or refused by name."""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tljax.checkpoints.files.reader import read_json
from tljax.errors import CheckpointError, InputError, UnsupportedModelError, nearest

ADAPTER_CONFIG, ADAPTER, ADAPTER_PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

_INERT = """
    auto_mapping inference_mode peft_version lora_dropout target_modules exclude_modules layers_to_transform
    layers_pattern modules_to_save bias fan_in_fan_out megatron_core loftq_config eva_config corda_config lora_ga_config
    runtime_config qalora_group_size ensure_weight_tying merge_weights
"""
INERT = frozenset(_INERT.split())
"""Keys that change nothing here: training settings, bookkeeping, or facts that the stored tensors show by themselves.

The tensors show what was adapted and which biases were trained. The base's table says how a matrix is stored, whatever
``fan_in_fan_out`` says: PEFT goes by the type of layer, too.
"""

OFF: dict[str, str] = {
    "layer_replication": "stacks layers of the base anew",
    "alora_invocation_tokens": "acts only after certain tokens, so it cannot be merged into weights",
    "use_qalora": "pools the input of quantised layers",
    "use_bdlora": "has block-diagonal factors",
    "arrow_config": "chooses between several adapters for each token",
    "kasa_config": "truncates the base's own weights",
    "monteclora_config": "samples its factors",
    "velora_config": "keeps compressed activations of its own",
    "megatron_config": "was made for Megatron's parallel layers",
    "enable_lora": "adapts only some parts of a fused matrix",
}
"""Keys that must be null, false or empty → what the adapter does if they are not."""

_UNCHANGED_BASE = (True, False, None, "true", "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that leave the base's weights as they are."""

_OTHER_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM")
_REQUIRED = object()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The settings of a LoRA adapter that determine what its tensors mean.

    Attributes:
        r: rank of the factors.
        lora_alpha: the product of the factors is multiplied by this over the rank.
        rank_pattern: ranks of modules whose names match, instead of ``r``.
        alpha_pattern: the same for ``lora_alpha``.
        use_rslora: whether to divide by the square root of the rank instead of the rank.
        use_dora: whether each row of the merged matrix has a trained length.
        lora_bias: whether the second factor has a bias.
        tokens: rows of embeddings that the adapter holds, by module; the module ``None`` is the input embedding.
        target_parameters: ends of the names of parameters that are adapted on their own, such as all experts at once.
        modules: ends of the names of modules that must have tensors, if the base has such modules.
        base: directory, hub id or alias of the model it was trained on, if it says so.
        revision: the base's revision on the hub.
        origin: the file's name in errors.
    """

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    tokens: Mapping[str | None, tuple[int, ...]]
    target_parameters: tuple[str, ...]
    modules: tuple[str, ...]
    base: str | None
    revision: str | None
    origin: str

    def targets(self, parameter: str) -> bool:
        """Whether a parameter, by its dotted name in the base, is adapted on its own and not as part of a module."""
        return any(f".{parameter}".endswith(f".{end}") for end in self.target_parameters)

    def rank(self, module: str) -> int:
        """Returns the rank of the factors of ``module``, a dotted name in the base."""
        return _matching(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """Returns the factor by which the product of ``module``'s factors is multiplied."""
        rank = self.rank(module)
        return _matching(self.alpha_pattern, module, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def read_adapter_config(directory: Path, ignore: Collection[str] = ()) -> AdapterConfig:
    """Reads ``adapter_config.json``.

    Args:
        directory: the adapter's directory.
        ignore: unknown keys to accept.

    Raises:
        CheckpointError: it is missing or damaged, or a value has the wrong type.
        InputError: a key to ignore is absent.
        UnsupportedModelError: the adapter is not LoRA, or has a key that tljax does not know or implement.
    """
    origin = str(directory / ADAPTER_CONFIG)
    attributes = read_json(directory / ADAPTER_CONFIG)
    if absent := next((key for key in ignore if key not in attributes), None):
        raise InputError(f"{origin} has no {absent!r} to ignore.{nearest(absent, attributes)}")
    attributes = {key: value for key, value in attributes.items() if key not in ignore}
    _refuse(attributes, origin)
    fields = _Fields(attributes, origin)
    config = AdapterConfig(
        r=fields("r", int, default=8),
        lora_alpha=float(fields("lora_alpha", int, float, default=8)),
        rank_pattern=_pattern(fields("rank_pattern", dict, default={}), origin, "rank_pattern", int),
        alpha_pattern={
            key: float(value)
            for key, value in _pattern(
                fields("alpha_pattern", dict, default={}), origin, "alpha_pattern", int, float
            ).items()
        },
        use_rslora=fields("use_rslora", bool, default=False),
        use_dora=fields("use_dora", bool, default=False),
        lora_bias=fields("lora_bias", bool, default=False),
        tokens=_tokens(fields("trainable_token_indices", list, dict, default={}), origin),
        target_parameters=tuple(map(str, fields("target_parameters", list, default=[]))),
        modules=_modules(attributes),
        base=fields("base_model_name_or_path", str, default=None) or None,
        revision=fields("revision", str, default=None) or None,
        origin=origin,
    )
    if wrong := [rank for rank in (config.r, *config.rank_pattern.values()) if rank < 1]:
        raise CheckpointError(f"{origin} gives the rank {wrong[0]}: a rank is 1 or more.")
    fields.refuse_unread()
    return config


def _refuse(attributes: Mapping[str, Any], origin: str) -> None:
    kind = attributes.get("peft_type", "LORA")
    if kind != "LORA":
        raise UnsupportedModelError(
            f"{origin} is an adapter of peft_type={kind!r}. tljax merges 'LORA' (rsLoRA and DoRA are such). Merge it "
            "with peft's merge_and_unload(), where that exists, and load the model that save_pretrained then writes."
        )
    if (task := attributes.get("task_type")) in _OTHER_HEADS:
        raise UnsupportedModelError(
            f"{origin} has task_type={task!r}: its model has another head than a language model's, which has no place "
            "here. adapter=False, with the base's name, loads the base alone."
        )
    meant = [f"{key}={attributes[key]!r} ({why})" for key, why in OFF.items() if attributes.get(key)]
    if meant:
        raise UnsupportedModelError(
            f"{origin} sets {'; '.join(meant)}, which tljax does not implement for adapters. Merge it with peft's "
            "merge_and_unload(), where that exists, and load the model that save_pretrained then writes."
        )
    start = attributes.get("init_lora_weights", True)
    if (start.lower() if isinstance(start, str) else start) not in _UNCHANGED_BASE:
        raise UnsupportedModelError(
            f"{origin} has init_lora_weights={start!r}: such an adapter belongs to a base whose weights were changed "
            "when training began, not to the published base. Convert it where it was trained with peft's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), or merge it there and load the result."
        )


class _Fields:
    """The keys of an adapter's config, with a record of those that have been read."""

    def __init__(self, attributes: Mapping[str, Any], origin: str) -> None:
        self._attributes, self._origin = attributes, origin
        self._read = {"peft_type", "task_type", "init_lora_weights", *OFF}

    def __call__(self, name: str, *types: type, default: Any = _REQUIRED) -> Any:
        self._read.add(name)
        value = self._attributes.get(name)
        if value is None:
            return default
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            expected = " or ".join(each.__name__ for each in types)
            raise CheckpointError(f"{self._origin} has {name}={value!r}, expected {expected}.")
        return value

    def refuse_unread(self) -> None:
        left = {
            key: value
            for key, value in self._attributes.items()
            if key not in self._read and key not in INERT and value is not None
        }
        if left:
            shown = ", ".join(f"{key}={value!r}" for key, value in left.items())
            raise UnsupportedModelError(
                f"{self._origin} sets {shown}, which tljax does not know. Merging the adapter anyway could give other "
                "numbers than its authors'. If you know that it changes nothing, load with "
                f"ignore_adapter_config={list(left)!r}; if not, merge the adapter with peft and load the result."
            )


def _matching(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """Returns the value of the first key (a regular expression) that matches ``module``, or its end after a dot."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _pattern(pattern: Mapping[str, Any], origin: str, name: str, *types: type) -> Mapping[str, Any]:
    for key, value in pattern.items():
        if not isinstance(value, types) or isinstance(value, bool):
            raise CheckpointError(f"{origin} has {name}[{key!r}]={value!r}, expected a number.")
        try:
            re.compile(key)
        except re.error as error:
            raise CheckpointError(f"{origin} has {name}[{key!r}], which is no regular expression ({error}).") from None
    return pattern


def _modules(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of adapted and of whole modules, if they are listed; a string is a pattern, not a name."""
    listed = [
        attributes.get("modules_to_save"),
        None if attributes.get("exclude_modules") else attributes.get("target_modules"),
    ]
    return tuple(str(name) for names in listed if isinstance(names, list) for name in names)


def _tokens(given: list[Any] | dict[str, Any], origin: str) -> Mapping[str | None, tuple[int, ...]]:
    named = given if isinstance(given, dict) else {None: given}
    for module, ids in named.items():
        if not isinstance(ids, list) or not all(type(each) is int and each >= 0 for each in ids):
            raise CheckpointError(
                f"{origin} has trainable_token_indices={given!r}, expected token ids, or lists of them by module; "
                f"{'it' if module is None else repr(module)} has {ids!r}."
            )
    return {module: tuple(ids) for module, ids in named.items() if ids}
