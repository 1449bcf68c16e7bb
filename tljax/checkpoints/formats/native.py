"""tljax's own format: ``config.json`` with our field names, ``model.safetensors`` with our dotted paths."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from tljax.checkpoints.files.reader import CONFIG, SINGLE, Tensors
from tljax.checkpoints.files.replacing import replace_checkpoint
from tljax.checkpoints.formats.quantized.codes import Codes, spread_places
from tljax.checkpoints.formats.quantized.layout import Layout, Packed, Quantization
from tljax.checkpoints.layout import flatten, parameter_axes
from tljax.checkpoints.parameters import check_parameters
from tljax.checkpoints.rows import Row
from tljax.checkpoints.slices import Index, PartTensors, reads_parts
from tljax.config import HookedTransformerConfig
from tljax.errors import CheckpointError, QuantizationError, UnsupportedModelError
from tljax.fingerprint import stored_config
from tljax.processes import as_numpy, write_together
from tljax.quantized_weight import CODES, TABLE, QuantizedWeight
from tljax.safetensors_files import checksum, read_seal, replace_file, seal_of, write_safetensors
from tljax.typing import Params

TLJAX = "tljax"
"""The ``quant_method`` of our own checkpoints with quantised weights."""
FORMAT = "tljax_format"
VERSION = 1
_CHECKSUM, _WEIGHTS = "tljax_checksum", "tljax_weights"
"""Keys of config.json: a checksum of its fields, the seal of the weights saved with it; absent in older checkpoints."""

_QUANTIZED = "tljax_quantized"
"""Key of config.json: by path, the axis along which the codes of a quantised weight share bytes, or null."""
_KEYS = (_WEIGHTS, _QUANTIZED)

_END = "."

_PIECE = 8 * 2**20
"""Bytes of a tensor that are compared with its checksum at once where only a part of it is needed."""


def read_config(attributes: Mapping[str, Any], origin: str) -> HookedTransformerConfig:
    """Returns the config in a config.json of tljax's own format."""
    fields = dict(attributes)
    if (version := fields.pop(FORMAT)) != VERSION:
        raise UnsupportedModelError(
            f"{origin} has {FORMAT}={version!r}, but this version of tljax reads {VERSION}: update tljax."
        )
    written = fields.pop(_CHECKSUM, None)
    HookedTransformerConfig.refuse_unknown([name for name in fields if name not in _KEYS])
    if written != (seal_of(fields) if _WEIGHTS in fields else None):
        raise CheckpointError(
            f"{origin} was changed after it was written, or is damaged. To change a saved model, load it and save "
            "model.replace(cfg=model.cfg.replace(...))."
        )
    return stored_config({name: value for name, value in fields.items() if name not in _KEYS})


def checked(tensors: Tensors, directory: Path, attributes: Mapping[str, Any]) -> Tensors:
    """Wraps the tensors of a tljax checkpoint so that each is compared with its checksum as it is read.

    Raises:
        CheckpointError: the weights are not those that were saved with config.json, or their header is damaged.
    """
    file = directory / SINGLE
    try:
        found = read_seal(file) if file.is_file() else None
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}.") from error
    checksums, seal = found or (None, None)
    if seal != attributes.get(_WEIGHTS) or (checksums is not None and checksums.keys() != tensors.info.keys()):
        raise CheckpointError(
            f"{file} and {directory / CONFIG} are of two different saves: take both from one, or save the model again."
        )
    return tensors if checksums is None else _Checked(tensors, file, checksums)


def read_quantized(attributes: Mapping[str, Any]) -> Quantization | None:
    """Returns how weights are packed in a checkpoint of ours; ``None`` if all are floats."""
    packed = attributes.get(_QUANTIZED)
    if packed is None:
        return None
    axes: dict[str, int | None] = dict(packed)
    layout = Layout(
        lead=_END + CODES,
        weight="",
        needed=(f"{_END}scale",),
        optional=(f"{_END}zero", _END + TABLE),
        shape=lambda own: _held(own, axes).shape,
        read=lambda own: np.asarray(_held(own, axes).dequantized()),
        codes=lambda own: _codes(_held(own, axes)),
    )
    return Quantization(TLJAX, (layout,))


def _held(packed: Packed, axes: Mapping[str, int | None]) -> QuantizedWeight:
    """Returns a quantised weight as it was saved, arrays of numpy's."""
    if packed.name not in axes:
        raise packed.error(f"config.json does not list it in {_QUANTIZED}")
    more: dict[str, Any] = {name: packed[_END + name] for name in ("zero", TABLE) if _END + name in packed}
    try:
        return QuantizedWeight(packed[_END + CODES], packed[f"{_END}scale"], packed=axes[packed.name], **more)
    except QuantizationError as error:
        raise packed.error(str(error)) from error


def _codes(weight: QuantizedWeight) -> Codes:
    place = spread_places(weight.scale.shape, weight.shape)
    return Codes(np.asarray(weight.numbers()), weight.scale, place, weight.bits, weight.zero, weight.table, shortest=1)


class _Checked:
    """Tensors that are compared with their checksums as they are read."""

    def __init__(self, tensors: Tensors, file: Path, checksums: Mapping[str, str]) -> None:
        self.info = tensors.info
        self._tensors, self._file, self._checksums = tensors, file, checksums
        self._intact: set[str] = set()

    def read(self, key: str) -> np.ndarray:
        """Returns tensor ``key`` in its stored dtype."""
        array = self._tensors.read(key)
        if checksum(array) != self._checksums[key]:
            raise self._damaged(key)
        return array

    def reads_parts(self, key: str) -> bool:
        """Whether a part of tensor ``key`` can be read alone."""
        return reads_parts(self._tensors, [key])

    def read_part(self, key: str, index: Index) -> np.ndarray:
        """Returns ``tensor[index]``, after the whole tensor was compared with its checksum, some rows at a time."""
        tensors, info = cast(PartTensors, self._tensors), self.info[key]
        if not info.shape:
            return self.read(key)
        if key not in self._intact:
            row_bytes = math.prod(info.shape[1:]) * int(info.dtype.strip("BF")) // 8
            rows, found = max(1, _PIECE // max(1, row_bytes)), checksum(np.zeros(0, np.uint8))
            for start in range(0, info.shape[0], rows):
                piece = tensors.read_part(key, (slice(start, min(start + rows, info.shape[0])),))
                found = checksum(np.ascontiguousarray(piece), found)
            if found != self._checksums[key]:
                raise self._damaged(key)
            self._intact.add(key)
        return tensors.read_part(key, index)

    def _damaged(self, key: str) -> CheckpointError:
        return CheckpointError(f"{self._file} is damaged: {key} does not have the checksum it was written with.")


def rows(cfg: HookedTransformerConfig) -> list[Row]:
    """Returns the table of our own format: every parameter under its own path, as it is."""
    return [Row(path, " ".join(axes), path) for path, axes in parameter_axes(cfg).items()]


def save_native(
    params: Params, cfg: HookedTransformerConfig, tokenizer: Any, directory: str | os.PathLike[str]
) -> None:
    """Writes a checkpoint that :func:`load_checkpoint` reads back bit for bit; quantised weights stay packed.

    A checkpoint in the directory is replaced, with its tokenizer. If the process is killed, the directory holds the old
    one, the new one, or none that loads: see :func:`~tljax.checkpoints.files.replacing.replace_checkpoint`.

    Args:
        params: nested parameters.
        cfg: their config.
        tokenizer: a Hugging Face tokenizer to save with them, or ``None``.
        directory: created if it does not exist.

    Raises:
        CheckpointError: the parameters do not have the shapes of ``cfg``.
    """
    check_parameters(params, cfg, ", nothing was saved", may_be_stacked=False)
    flat, axes = _stored_parts(flatten(params))
    headers = {path: (np.dtype(leaf.dtype), tuple(leaf.shape)) for path, leaf in flat.items()}

    def write(tensor: Callable[[str], np.ndarray]) -> None:
        with replace_checkpoint(directory) as written:
            seal = write_safetensors(written / SINGLE, headers, tensor, sealed=True)
            fields = {_WEIGHTS: seal, **({_QUANTIZED: axes} if axes else {}), **cfg.to_dict()}
            write_side_files(written, {FORMAT: VERSION, _CHECKSUM: seal_of(fields), **fields}, tokenizer)

    write_together(next(iter(flat.values())), headers, lambda path: as_numpy(flat[path]), write, f"Writing {directory}")


def _stored_parts(flat: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int | None]]:
    """Returns the arrays to store, by name, and for each quantised weight the axis along which codes share bytes."""
    stored, axes = {}, {}
    for path, leaf in flat.items():
        if isinstance(leaf, QuantizedWeight):
            axes[path] = leaf.packed
            stored |= {path + _END + name: part for name, part in leaf.parts.items()}
        else:
            stored[path] = leaf
    return stored, axes


def write_side_files(directory: Path, config: Mapping[str, Any], tokenizer: Any) -> None:
    """Writes the tokenizer's files and, last of all, config.json."""
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    write_json(directory / CONFIG, config)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object under a temporary name and renames it when complete."""
    with replace_file(file) as stream:
        stream.write((json.dumps(content, indent=2) + "\n").encode())
