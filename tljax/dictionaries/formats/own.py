"""tljax's own files of crosscoders and cross-layer transcoders: ``cfg.json``, and a safetensors file with its seal."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tljax.dictionaries.formats.read import Format, Read
from tljax.dictionaries.formats.tensors import Stored, has_keys, open_safetensors, read_config
from tljax.dictionaries.maths.config import CrosscoderConfig, CrossLayerConfig, Tap
from tljax.errors import DictionaryError
from tljax.safetensors_files import checksum, read_seal, replace_file, write_safetensors

CONFIG, CROSSCODER, CROSS_LAYER = "cfg.json", "crosscoder", "cross_layer_transcoder"
_KIND, _SEAL = "tljax", "seal"
_Config = TypeVar("_Config", CrosscoderConfig, CrossLayerConfig)


def write_own_crosscoder(directory: Path, params: Mapping[str, np.ndarray], cfg: CrosscoderConfig) -> None:
    """Writes a crosscoder."""
    _write(directory, CROSSCODER, params, cfg)


def write_own_cross_layer(directory: Path, layers: Sequence[Mapping[str, np.ndarray]], cfg: CrossLayerConfig) -> None:
    """Writes a cross-layer transcoder."""
    arrays = {f"{number}.{name}": array for number, layer in enumerate(layers) for name, array in layer.items()}
    _write(directory, CROSS_LAYER, arrays, cfg)


def _write(
    directory: Path, kind: str, arrays: Mapping[str, np.ndarray], cfg: CrosscoderConfig | CrossLayerConfig
) -> None:
    """Writes the arrays, then the config with the arrays' seal: a directory without it is refused."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).unlink(missing_ok=True)
    headers = {name: (np.dtype(array.dtype), array.shape) for name, array in arrays.items()}
    file = directory / f"{kind}.safetensors"
    seal = write_safetensors(file, headers, lambda name: np.asarray(arrays[name]), sealed=True)
    content = {_KIND: kind, _SEAL: seal, **dataclasses.asdict(cfg)}
    with replace_file(directory / CONFIG) as stream:
        stream.write(json.dumps(content, indent=1).encode())


def read_crosscoder(path: Path, **facts: Any) -> Read:
    """Reads a crosscoder that :func:`write_own_crosscoder` wrote.

    Raises:
        DictionaryError: the files are damaged, or of two crosscoders.
    """
    stored, cfg = _open(path, CROSSCODER, CrosscoderConfig)
    return Read({name: stored.read(name) for name in stored.names}, cfg)


def read_cross_layer(path: Path, **facts: Any) -> Read:
    """Reads a cross-layer transcoder that :func:`write_own_cross_layer` wrote.

    Raises:
        DictionaryError: the files are damaged, or of two transcoders.
    """
    stored, cfg = _open(path, CROSS_LAYER, CrossLayerConfig)
    layers: tuple[dict[str, np.ndarray], ...] = tuple({} for _ in range(cfg.n_layers))
    for name in stored.names:
        number, _, parameter = name.partition(".")
        if not number.isdecimal() or int(number) >= cfg.n_layers:
            raise DictionaryError(f"{path}: {name} is of no layer below n_layers={cfg.n_layers}.")
        layers[int(number)][parameter] = stored.read(name)
    return Read(layers, cfg)


def _open(path: Path, kind: str, config: type[_Config]) -> tuple[Stored, _Config]:
    content = read_config(path / CONFIG)
    file = path / f"{kind}.safetensors"
    if content.pop(_KIND, None) != kind:
        raise DictionaryError(f"{path / CONFIG} is not the config of a {kind.replace('_', ' ')} that tljax wrote.")
    stored = open_safetensors(file)
    try:
        checksums, seal = read_seal(file) or ({}, None)
        if seal != content.pop(_SEAL, None):
            raise ValueError("its arrays are not those that its config was written for")
        for name in stored.names:
            if checksum(np.ascontiguousarray(stored.read(name))) != checksums.get(name):
                raise ValueError(f"{name} does not have the checksum it was written with")
        content["taps"] = tuple(_tap(tap) for tap in content["taps"])
        content["metadata"] = tuple((str(key), str(text)) for key, text in content["metadata"])
        return stored, config(**content)
    except DictionaryError:
        raise
    except (ValueError, TypeError, KeyError) as problem:
        raise DictionaryError(
            f"{path} is damaged, or its files are of two saves ({problem}): save it again."
        ) from problem


def _tap(tap: dict[str, Any]) -> Tap:
    steps = tap.get("processing")
    return Tap(**{**tap, "processing": None if steps is None else tuple(steps)})


def _is(path: Path, kind: str) -> bool:
    return has_keys(path / CONFIG, _KIND, _SEAL) and (path / f"{kind}.safetensors").is_file()


OWN_CROSSCODER = Format(
    name="tljax_crosscoder",
    looks_for=f"{CONFIG} with {_KIND}, and {CROSSCODER}.safetensors",
    detects=lambda path: _is(path, CROSSCODER),
    reads=read_crosscoder,
    holds="crosscoder",
)
OWN_CROSS_LAYER = Format(
    name="tljax_cross_layer_transcoder",
    looks_for=f"{CONFIG} with {_KIND}, and {CROSS_LAYER}.safetensors",
    detects=lambda path: _is(path, CROSS_LAYER),
    reads=read_cross_layer,
    holds="cross-layer transcoder",
)
