"""Checkpoints that are in memory already: a mapping of arrays, or a transformers model."""

import json
import sys
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tljax.checkpoints.files.reader import Tensors, host_array, torch_dtype
from tljax.checkpoints.rows import TensorInfo
from tljax.errors import InputError, UnsupportedModelError

_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ADAPTED = (".lora_A.", ".lora_B.", ".base_layer.", ".lora_embedding_A.", ".modules_to_save.")
"""Parts of tensor names that show that adapters are wrapped around layers."""


class MemoryTensors(Tensors):
    """Tensors in a mapping of numpy, jax or torch arrays; none is copied before it is read.

    Raises:
        InputError: a name that is no string, or a value that is no array.
    """

    def __init__(self, tensors: Mapping[Any, Any], origin: str) -> None:
        self._tensors = dict(tensors)
        self.info = {name: _info(name, value, origin) for name, value in self._tensors.items()}

    def read(self, key: str) -> np.ndarray:
        """Returns tensor ``key`` in its stored dtype, on the host."""
        value = self._tensors[key]
        return host_array(value) if _is_torch(value) else np.asarray(value)


@runtime_checkable
class JsonConfig(Protocol):
    """The interface needed of a transformers model's config."""

    def to_json_string(self, use_diff: bool = True) -> str:
        """Returns the contents of its config.json."""
        ...


@runtime_checkable
class TorchModel(Protocol):
    """The interface needed of a transformers model in memory."""

    config: Any

    def state_dict(self) -> Mapping[str, Any]:
        """Returns its tensors by name."""
        ...


def read_hf_model(model: Any) -> tuple[dict[str, Any], MemoryTensors, dict[str, Any] | None]:
    """Returns a model's config (as in config.json), its tensors, and its generation config or ``None``.

    Raises:
        InputError: it is no transformers model, or it carries adapters that are not merged.
        UnsupportedModelError: its weights are quantised, or are not in memory.
    """
    name = type(model).__name__
    if not isinstance(model, TorchModel) or not isinstance(model.config, JsonConfig):
        raise InputError(
            f"hf_model is a {name}; expected a transformers model, such as AutoModelForCausalLM.from_pretrained(...). "
            "For TransformerLens's weights use HookedTransformer.from_transformer_lens(state_dict, cfg)."
        )
    state = model.state_dict()
    if type(model).__module__.startswith("peft.") or any(part in key for key in state for part in _ADAPTED):
        raise InputError(
            f"hf_model is a {name} with adapters that are not merged into its weights: pass "
            "hf_model=model.merge_and_unload()."
        )
    _check_readable(state)
    attributes = json.loads(model.config.to_json_string()) | {"architectures": [name]}
    generation = getattr(model, "generation_config", None)  # a model that does not generate has none
    settings = None if generation is None else json.loads(generation.to_json_string())
    return attributes, MemoryTensors(_as_saved(model, state), "hf_model"), settings


def _check_readable(state: Mapping[str, Any]) -> None:
    import torch

    for key, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.device.type == "meta":
            raise UnsupportedModelError(
                f"hf_model has {key} on the meta device: its weights are offloaded or were never loaded. Load it "
                "on one device, without device_map."
            )
        whole = type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
        if not whole or tensor.dtype in (torch.int8, torch.uint8) or "float8" in str(tensor.dtype):
            raise UnsupportedModelError(
                f"hf_model has {key} as {type(tensor).__name__} of {tensor.dtype}: its weights are quantised. tljax "
                "reads float64, float32, float16 and bfloat16: load the model without quantization, or dequantize it."
            )


def _as_saved(model: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the tensors under the names that ``save_pretrained`` writes (experts one by one, if files do so)."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4: files have the names of modules
        return state
    return revert_weight_conversion(model, dict(state))


def _info(name: Any, value: Any, origin: str) -> TensorInfo:
    if not isinstance(name, str):
        raise InputError(f"{origin} has the name {name!r}; expected a mapping from names of parameters to arrays.")
    if _is_torch(value):
        return TensorInfo(torch_dtype(value), tuple(value.shape))
    if isinstance(value, str | bytes | Mapping | list | tuple) or value is None or callable(value):
        raise InputError(f"{origin} has {name!r} as a {type(value).__name__}; expected an array.")
    array = value if isinstance(value, np.ndarray) else np.asarray(value)
    kind = array.dtype.name
    return TensorInfo(_DTYPES.get(kind, kind), tuple(array.shape))


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)
