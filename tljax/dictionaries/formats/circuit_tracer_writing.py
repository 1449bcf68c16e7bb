"""Writes sets of transcoders and cross-layer transcoders as circuit-tracer reads them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tljax.dictionaries.formats.circuit_tracer import CLT, CONFIG, SET, THRESHOLDS
from tljax.dictionaries.formats.tensors import without_input_bias
from tljax.dictionaries.maths.config import CrossLayerConfig, DictionaryConfig, Tap
from tljax.errors import DictionaryError
from tljax.safetensors_files import replace_file, write_safetensors

Arrays = Mapping[str, np.ndarray]


def write_set(
    directory: Path, dictionaries: Mapping[int, tuple[Arrays, DictionaryConfig]], model_name: str | None
) -> None:
    """Writes ``layer_0.safetensors`` … and, last, ``config.yaml``.

    Args:
        directory: where to; files of the same names are replaced.
        dictionaries: parameters and config by layer.
        model_name: the model; ``None`` means the one of the taps.

    Raises:
        DictionaryError: layers are missing, or a dictionary computes what circuit-tracer cannot.
    """
    layers = sorted(dictionaries)
    if layers != list(range(len(layers))) or not layers:
        raise DictionaryError(f"A set of circuit-tracer has every layer from 0; these are of layers {layers}.")
    widths = {cfg.d_sae for _, cfg in dictionaries.values()}
    if len(widths) > 1:
        raise DictionaryError(f"A set of circuit-tracer has one number of features; these have {sorted(widths)}.")
    files = {f"layer_{layer}.safetensors": _arrays(layer, *dictionaries[layer]) for layer in layers}
    header = _header(SET, {layer: dictionaries[layer][1].tap for layer in layers}, model_name)
    _write(directory, files, header | {"transcoders": list(files)})


def write_cross_layer(directory: Path, layers: Sequence[Arrays], cfg: CrossLayerConfig, model_name: str | None) -> None:
    """Writes ``W_enc_0.safetensors``, ``W_dec_0.safetensors`` … and, last, ``config.yaml``.

    Raises:
        DictionaryError: it has skip connections, or the taps do not say where it belongs.
    """
    if "W_skip" in layers[0]:
        raise DictionaryError(
            "circuit-tracer's files of cross-layer transcoders have no skip connections; this one has."
        )
    if not cfg.taps:
        raise DictionaryError("cfg.taps is empty: circuit-tracer's config needs the points that are read and written.")
    files: dict[str, Arrays] = {}
    for number, layer in enumerate(layers):
        encoder = {"W_enc": layer["W_enc"].T, "b_enc": layer["b_enc"], "b_dec": layer["b_dec"]}
        if cfg.jumprelu:
            encoder["threshold"] = np.maximum(layer["threshold"], np.zeros_like(layer["threshold"]))
        files[f"W_enc_{number}.safetensors"] = {f"{name}_{number}": array for name, array in encoder.items()}
        files[f"W_dec_{number}.safetensors"] = {f"W_dec_{number}": layer["W_dec"]}
    _write(directory, files, _header(CLT, dict(enumerate(cfg.taps)), model_name))


def _arrays(layer: int, params: Arrays, cfg: DictionaryConfig) -> Arrays:
    if cfg.architecture not in ("standard", "jumprelu") or not cfg.transcoder or cfg.rescale_acts_by_decoder_norm:
        raise DictionaryError(
            f"Layer {layer}: circuit-tracer's transcoders are ReLU or JumpReLU; this is a {cfg.architecture} "
            f"{'transcoder' if cfg.transcoder else 'autoencoder'}"
            + (
                " that rescales by decoder norms: fold_W_dec_norm it first."
                if cfg.rescale_acts_by_decoder_norm
                else "."
            )
        )
    if cfg.normalize_activations not in ("none", "expected_average_only_in"):
        raise DictionaryError(f"Layer {layer}: circuit-tracer cannot normalise, as {cfg.normalize_activations} does.")
    own = without_input_bias(dict(params)) if cfg.apply_b_dec_to_input else params
    arrays = {"W_enc": own["W_enc"].T, "W_dec": own["W_dec"], "b_enc": own["b_enc"], "b_dec": own["b_dec"]}
    if "threshold" in own:  # without a ReLU there, which negative thresholds would need
        arrays[THRESHOLDS[0]] = np.maximum(own["threshold"], np.zeros_like(own["threshold"]))
    return arrays | ({"W_skip": own["W_skip"]} if "W_skip" in own else {})


def _header(kind: str, taps: Mapping[int, Tap], model_name: str | None) -> dict[str, Any]:
    """Returns what ``config.yaml`` says of the taps, which must name the same points of every block."""
    names = []
    for side in ("reads", "writes"):
        points = [getattr(tap, side) for tap in taps.values()]
        start = [f"blocks.{layer}." for layer in taps]
        within = {
            point.removeprefix(prefix) if isinstance(point, str) and point.startswith(prefix) else None
            for point, prefix in zip(points, start, strict=True)
        }
        if len(within) != 1 or None in within:
            raise DictionaryError(
                f"The taps' {side} are {points}; circuit-tracer's config names one point within every block."
            )
        names.append(within.pop())
    model_name = model_name or next((tap.model_name for tap in taps.values() if tap.model_name), None)
    if model_name is None:
        raise DictionaryError("The taps do not say the model's name: give model_name=.")
    return {
        "model_name": model_name, "model_kind": kind, "feature_input_hook": names[0], "feature_output_hook": names[1],
    }  # fmt: skip


def _write(directory: Path, files: Mapping[str, Arrays], config: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).unlink(missing_ok=True)
    for name, arrays in files.items():
        headers = {key: (np.dtype(array.dtype), array.shape) for key, array in arrays.items()}
        write_safetensors(directory / name, headers, lambda key, arrays=arrays: np.asarray(arrays[key]))
    with replace_file(directory / CONFIG) as stream:
        stream.write(yaml.safe_dump(config, sort_keys=False).encode())
