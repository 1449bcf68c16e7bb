"""Transcoders of all layers together: circuit-tracer's sets, read and written."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import typed
from tljax.dictionaries.cross_layer import CrossLayerTranscoder
from tljax.dictionaries.dictionary import Dictionary
from tljax.dictionaries.formats.circuit_tracer import files_of, read_layer
from tljax.dictionaries.formats.circuit_tracer_writing import write_cross_layer, write_set
from tljax.dictionaries.formats.tensors import open_npz, shapes_in
from tljax.dictionaries.maths.config import DictionaryConfig
from tljax.errors import DictionaryError


@typed
def load_transcoders(
    directory: str | os.PathLike[str],
    layers: Sequence[int] | None = None,
    *,
    dtype: Any = None,
    model_name: str | None = None,
) -> dict[int, Dictionary]:
    """Loads a set of transcoders in circuit-tracer's format, one layer's file in memory at a time.

    Args:
        directory: the set's, with ``config.yaml``; nothing is downloaded.
        layers: which layers; ``None`` means all.
        dtype: dtype of the parameters; ``None`` means float32.
        model_name: the model, where ``config.yaml`` does not say it.

    Returns:
        The transcoders by layer, each with the points that it reads and writes in ``cfg.tap``.

    Raises:
        DictionaryError: files are missing or damaged, or a layer is not in the set.
    """
    files = files_of(Path(directory))
    if not files:
        raise DictionaryError(
            f"{directory} holds no transcoders: no config.yaml that names them, no layer_0.safetensors."
        )
    wanted = list(files) if layers is None else list(layers)
    if absent := [layer for layer in wanted if layer not in files]:
        raise DictionaryError(f"{directory} has layers 0 to {len(files) - 1}, and no layer {absent[0]}.")
    loaded = {}
    for layer in wanted:
        found = read_layer(Path(directory), layer, files[layer], model_name=model_name)
        assert isinstance(found.cfg, DictionaryConfig)
        assert isinstance(found.params, dict)
        params = {name: jnp.asarray(array, dtype) for name, array in found.params.items()}
        loaded[layer] = Dictionary(params, found.cfg, found.sparsity)
    widths = {layer: transcoder.cfg.d_sae for layer, transcoder in loaded.items()}
    if len(set(widths.values())) > 1:
        raise DictionaryError(f"{directory}: a set has one number of features; its layers have {widths}.")
    return loaded


@typed
def save_transcoders(
    transcoders: Mapping[int, Dictionary] | Sequence[Dictionary] | CrossLayerTranscoder,
    directory: str | os.PathLike[str],
    *,
    model_name: str | None = None,
) -> None:
    """Writes a set of transcoders, or a cross-layer transcoder, in circuit-tracer's format.

    :func:`load_transcoders` reads a set again, :meth:`CrossLayerTranscoder.load` the other. Negative thresholds are
    written as 0, which is what they mean here, and a ``b_dec`` that is subtracted from the input is folded into
    ``b_enc``: the functions are the same.

    Args:
        transcoders: of every layer from 0, by layer or in order; or one cross-layer transcoder.
        directory: where to.
        model_name: the model; ``None`` means the one of the taps.

    Raises:
        DictionaryError: layers are missing, the taps do not name the same points of every block, or a transcoder
            computes what circuit-tracer's files cannot hold (``topk``, normalisation, a cross-layer one's skips).
    """
    if isinstance(transcoders, CrossLayerTranscoder):
        layers = [_on_host(layer) for layer in transcoders.layers]
        write_cross_layer(Path(directory), layers, transcoders.cfg, model_name)
        return
    by_layer = transcoders if isinstance(transcoders, Mapping) else dict(enumerate(transcoders))
    write_set(Path(directory), {layer: (_on_host(one.params), one.cfg) for layer, one in by_layer.items()}, model_name)


@typed
def transcoder_sizes(directory: str | os.PathLike[str]) -> dict[int, int]:
    """Counts the parameters of each layer of a set from the headers of its files, without reading their arrays.

    In float32 each takes four bytes: :func:`load_transcoders` needs ``4 * sum(transcoder_sizes(directory).values())``.

    Raises:
        DictionaryError: files are missing or damaged.
    """
    return {layer: _size(file) for layer, file in files_of(Path(directory)).items()}


def _size(file: Path) -> int:
    if file.suffix == ".npz":
        stored = open_npz(file)
        return sum(stored.read(name).size for name in stored.names)
    shapes = shapes_in(file)
    if not shapes:
        raise DictionaryError(f"{file} is missing, or no safetensors file.")
    return sum(math.prod(shape) for shape in shapes.values())


def _on_host(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in jax.device_get(dict(params)).items()}
