"""circuit-tracer's sets of transcoders, one for each layer: ``config.yaml`` and ``layer_0.safetensors`` …

A file may also be one of Gemma Scope's (``params.npz``) or Gemma Scope 2's. ``W_enc`` lies as ``[F, d]``; ``W_dec`` as
``[F, d]``, or as ``[d, F]`` in files of 2025: shapes decide.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from tljax.dictionaries.formats import gemma_scope, gemma_scope_2
from tljax.dictionaries.formats.points import tap_of
from tljax.dictionaries.formats.read import Format, Read
from tljax.dictionaries.formats.tensors import metadata_of, open_safetensors, read_rows, shapes_in, spread
from tljax.dictionaries.formats.yaml_files import read_yaml
from tljax.dictionaries.maths.config import DictionaryConfig, Tap
from tljax.errors import DictionaryError

CONFIG, SET, CLT = "config.yaml", "transcoder_set", "cross_layer_transcoder"
ROWS = {
    "W_enc": [("W_enc", "d_sae d_in")],
    "W_dec": [("W_dec", "d_sae d_out")],
    "b_enc": [("b_enc", "d_sae")],
    "b_dec": [("b_dec", "d_out")],
    "W_skip": [("W_skip", "d_out d_in")],
}
THRESHOLDS = ("activation_function.threshold", "threshold")
_FILE = re.compile(r"layer_?(\d+)\.safetensors")


def read(path: Path, **facts: Any) -> Read:
    """Reads the transcoder of one layer.

    Args:
        path: the file of one layer, or the set's directory together with ``layer``.
        **facts: see :class:`~tljax.dictionaries.formats.read.Format`.

    Raises:
        DictionaryError: the files are damaged, or no layer is chosen among several.
    """
    directory = path.parent if path.is_file() else path
    files = files_of(directory)
    chosen = [layer for layer, file in files.items() if path.is_file() and file.name == path.name and file == path]
    layer = facts.get("layer") if not chosen else chosen[0]
    if layer is None and len(files) == 1:
        layer = next(iter(files))
    if layer not in files:
        raise DictionaryError(
            f"{directory} is a set of transcoders of layers {_spans(sorted(files))}, and layer={layer}: choose one by "
            "layer= or by the path of its file, or load all with tljax.dictionaries.load_transcoders(directory)."
        )
    return read_layer(directory, layer, files[layer], **facts)


def read_layer(directory: Path, number: int, file: Path, **facts: Any) -> Read:
    """Reads the transcoder of a layer from its file; the tap is the one that ``config.yaml`` says."""
    config = config_of(directory)
    reads, writes = points_of(config, number)
    facts = {"model_name": config.get("model_name"), **{name: fact for name, fact in facts.items() if fact is not None}}
    tap = tap_of(reads, writes, facts=facts)
    if not file.is_file():
        raise DictionaryError(f"{directory}: {CONFIG} names {file.name} for layer {number}, and there is no such file.")
    if file.suffix == ".npz":
        return _tapped(gemma_scope.read(file), tap)
    if "w_enc" in shapes_in(file):
        return _tapped(gemma_scope_2.read(file), tap)
    stored = open_safetensors(file)
    params = read_rows(stored, ROWS, optional=("W_skip",), autoencoder=False)
    d_in, d_sae = params["W_enc"].shape
    if threshold := next((name for name in THRESHOLDS if name in stored), None):
        params["threshold"] = threshold_of(stored.take(threshold), d_sae, file)
    stored.finish()
    cfg = DictionaryConfig(
        architecture="jumprelu" if threshold else "standard",
        d_in=d_in,
        d_sae=d_sae,
        d_out=params["W_dec"].shape[1],
        apply_b_dec_to_input=False,
        transcoder=True,
        tap=tap,
        metadata=metadata_of(config),
    )
    return Read(params, cfg)


def files_of(directory: Path) -> dict[int, Path]:
    """Returns the file of each layer of a set, in the order of the layers.

    ``hf://org/repository/file`` names a file that lies in the directory, under its own name or its path in that
    repository.

    Raises:
        DictionaryError: layers are missing or named twice, or ``config.yaml`` contradicts itself.
    """
    entries = config_of(directory).get("transcoders")
    if entries is None:
        found = {int(match[1]): file for file in directory.glob("layer*") if (match := _FILE.fullmatch(file.name))}
        files = sorted(found.items())
    elif isinstance(entries, list) and entries:
        files = sorted(_entry(directory, number, entry) for number, entry in enumerate(entries))
    elif isinstance(entries, dict) and entries:
        files = sorted(_entry(directory, int(number), entry) for number, entry in entries.items())
    else:
        raise DictionaryError(f"{directory / CONFIG}: transcoders is {entries!r}, expected a list of files.")
    layers = [layer for layer, _ in files]
    if layers != list(range(len(layers))) and (entries is not None or len(set(layers)) != len(layers)):
        raise DictionaryError(
            f"{directory}: its transcoders are of layers {layers}; a set has one for every layer from 0, each once."
        )
    return dict(files)


def _entry(directory: Path, number: int, entry: Any) -> tuple[int, Path]:
    """Returns layer and file of an entry of ``transcoders``: a name, or a mapping with ``layer`` and ``filepath``."""
    layer, name = (entry.get("layer", number), entry.get("filepath")) if isinstance(entry, dict) else (number, entry)
    if not isinstance(layer, int) or not isinstance(name, str):
        raise DictionaryError(f"{directory / CONFIG}: the entry {entry!r} of transcoders names no file and layer.")
    remote = name.startswith("hf://")
    name = name.removeprefix("hf://").partition("?")[0]
    name = name.split("/", 2)[-1] if remote else name
    said = re.search(r"layer_?(\d+)(?!.*layer_?\d)", name)
    if said and int(said[1]) != layer:
        raise DictionaryError(
            f"{directory / CONFIG}: layer {layer} is given the file {name}, which says layer {said[1]}."
        )
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DictionaryError(f"{directory / CONFIG} names {name!r}; a file must lie within the directory.")
    inside = directory / name
    return layer, inside if inside.is_file() or not remote else directory / Path(name).name


def config_of(directory: Path) -> dict[str, Any]:
    """Returns the contents of ``config.yaml``, nothing if there is none."""
    return read_yaml(directory / CONFIG) if (directory / CONFIG).is_file() else {}


def points_of(config: dict[str, Any], layer: int) -> tuple[str | None, str | None]:
    """Returns the full names of the points that a layer's features read and write."""
    names = [config.get(f"feature_{side}_hook") for side in ("input", "output")]
    full = [
        None if name is None else name.format(layer=layer) if "{" in name else f"blocks.{layer}.{name}"
        for name in names
    ]
    return full[0], full[1]


def threshold_of(stored: np.ndarray, d_sae: int, origin: Path) -> np.ndarray:
    """Returns the thresholds, which circuit-tracer applies without a ReLU: negative ones let negative features pass.

    Raises:
        DictionaryError: some are negative.
    """
    threshold = spread(stored, d_sae, origin)
    if (threshold < 0).any():
        raise DictionaryError(
            f"{origin}: {int((threshold < 0).sum())} of {d_sae} thresholds are negative. circuit-tracer keeps whatever "
            "exceeds its threshold, negative features too; a JumpReLU dictionary here has no negative features."
        )
    return threshold.astype(np.float64 if threshold.dtype == np.float64 else np.float32)


def _tapped(found: Read, tap: Tap) -> Read:
    assert isinstance(found.cfg, DictionaryConfig)
    own = found.cfg.tap if tap.reads is None else tap
    return dataclasses.replace(found, cfg=found.cfg.replace(transcoder=True, apply_b_dec_to_input=False, tap=own))


def _spans(layers: list[int]) -> str:
    return f"0 to {layers[-1]}" if layers and layers == list(range(len(layers))) else ", ".join(map(str, layers))


def is_set(path: Path) -> bool:
    """Whether a directory is a set of transcoders; never fails."""
    try:
        kind = config_of(path).get("model_kind") if path.is_dir() else None
    except DictionaryError:
        return False
    return kind == SET or (kind is None and any(_is_layer(file) for file in path.glob("layer*.safetensors")))


def _is_layer(file: Path) -> bool:
    return _FILE.fullmatch(file.name) is not None and {"W_enc", "W_dec", "b_dec"} <= shapes_in(file).keys()


FORMAT = Format(
    name="circuit_tracer",
    looks_for=f"{CONFIG} with model_kind: {SET}, or layer_0.safetensors …",
    detects=lambda path: _is_layer(path) if path.is_file() else is_set(path),
    reads=read,
    files=lambda sae_id: (sae_id or "*", CONFIG),
)
