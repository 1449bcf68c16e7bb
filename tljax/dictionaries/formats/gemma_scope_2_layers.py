"""Gemma Scope 2's dictionaries of several layers: cross-layer transcoders (``clt/``) and crosscoders (``crosscoder/``).

Both have an encoder for each layer, whose features write to that layer and later ones: the crosscoders are weakly
causal, so that they are cross-layer transcoders of a few layers of the residual stream.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from tljax.dictionaries.formats.gemma_scope_2 import CONFIG, FILE, config_of, tap_at
from tljax.dictionaries.formats.read import Format, Read
from tljax.dictionaries.formats.tensors import Stored, has_keys, metadata_of, open_safetensors, same_dtype, shapes_in
from tljax.dictionaries.maths.config import CrossLayerConfig
from tljax.errors import DictionaryError

_FILE = re.compile(r"params_layer_(\d+)\.safetensors")
_NAMES = {"W_enc": "w_enc", "W_dec": "w_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
_SKIP = "affine_skip_connection"


def read(path: Path, **facts: Any) -> Read:
    """Reads ``params_layer_0.safetensors`` …, or ``params.safetensors`` with the layers stacked.

    ``w_dec`` of a layer is ``[F, layers from it, d]``, or ``[F, all layers, d]`` with zeros for earlier ones.

    Raises:
        DictionaryError: files are missing, damaged or of different sizes, or features write to earlier layers.
    """
    config = config_of(path, facts)
    if (path / FILE).is_file():
        arrays = _taken(open_safetensors(path / FILE))
        count = arrays["w_enc"].shape[0]
        if any(array.ndim < 2 or array.shape[0] != count for array in arrays.values()):
            raise DictionaryError(f"{path / FILE}: its arrays are not all stacks of {count} layers.")
        each = [{name: array[number] for name, array in arrays.items()} for number in range(count)]
    else:
        numbers = sorted(int(found[1]) for file in path.glob("params_layer_*") if (found := _FILE.fullmatch(file.name)))
        if numbers != list(range(len(numbers))):
            raise DictionaryError(f"{path} holds layers {numbers}; expected every one from 0: fetch the others.")
        each = [_taken(open_safetensors(path / f"params_layer_{number}.safetensors")) for number in numbers]
    layers = tuple(_layer(path, number, len(each), arrays) for number, arrays in enumerate(each))
    shapes = {layer["W_enc"].shape for layer in layers}
    if len(shapes) > 1 or len({frozenset(layer) for layer in layers}) > 1:
        raise DictionaryError(f"{path}: its layers have encoders of shapes {sorted(shapes)}, or not the same arrays.")
    d_in, d_sae = layers[0]["W_enc"].shape
    names = _layers_read(config, len(layers))
    taps = tuple(tap_at(config, facts, layer) for layer in names) if names else ()
    cfg = CrossLayerConfig(
        n_layers=len(layers), d_in=d_in, d_sae=d_sae, jumprelu=True, taps=taps, metadata=metadata_of(config)
    )
    return Read(layers, cfg)


def _taken(stored: Stored) -> dict[str, np.ndarray]:
    arrays = {name: stored.take(name) for name in (*_NAMES.values(), _SKIP) if name in stored or name != _SKIP}
    stored.finish()
    return arrays


def _layer(path: Path, number: int, count: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    params = {name: arrays[stored] for name, stored in _NAMES.items()}
    d_sae, d_in = params["b_enc"].size, params["b_dec"].size
    decoder = params["W_dec"]
    if decoder.ndim == 3 and decoder.shape[1] == count and number:
        if decoder[:, :number].any():
            raise DictionaryError(
                f"{path}: features of layer {number} write to earlier layers; they read too late for that."
            )
        params["W_dec"] = decoder[:, number:]
    expected = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, count - number, d_in), "threshold": (d_sae,)}
    if _SKIP in arrays:
        params["W_skip"] = arrays[_SKIP].T
        expected["W_skip"] = (d_in, d_in)
    wrong = [
        f"{name} {list(params[name].shape)} ({list(shape)})"
        for name, shape in expected.items()
        if params[name].shape != shape
    ]
    if wrong:
        raise DictionaryError(f"{path}: layer {number} of {count} has shapes (expected): {', '.join(wrong)}.")
    return same_dtype(params)


def _layers_read(config: dict[str, Any], count: int) -> list[int] | None:
    """Returns the numbers of the model's layers: all, or those that the point's name lists in braces."""
    listed = re.search(r"\{([\d,\s]+)\}", str(config.get("hf_hook_point_in")))
    layers = [int(number) for number in listed[1].split(",")] if listed else list(range(count))
    return layers if len(layers) == count and "hf_hook_point_in" in config else None


def _detects(path: Path) -> bool:
    if not has_keys(path / CONFIG):
        return False
    return (path / "params_layer_0.safetensors").is_file() or len(shapes_in(path / FILE).get("w_enc", ())) == 3


FORMAT = Format(
    name="gemma_scope_2_layers",
    looks_for=f"params_layer_0.safetensors … (or {FILE} with stacked layers), and {CONFIG}",
    detects=_detects,
    reads=read,
    holds="cross-layer transcoder",
)
