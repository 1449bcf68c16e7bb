"""circuit-tracer's cross-layer transcoders: ``config.yaml``, ``W_enc_0.safetensors``, ``W_dec_0.safetensors`` …"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from tljax.dictionaries.formats.circuit_tracer import CLT, CONFIG, config_of, points_of, threshold_of
from tljax.dictionaries.formats.points import tap_of
from tljax.dictionaries.formats.read import Format, Read
from tljax.dictionaries.formats.tensors import expect_sizes, metadata_of, open_safetensors, orient, same_dtype
from tljax.dictionaries.maths.config import CrossLayerConfig
from tljax.errors import DictionaryError

_FILE = re.compile(r"W_enc_(\d+)\.safetensors")


def read(path: Path, **facts: Any) -> Read:
    """Reads all layers. ``b_dec_i`` belongs to the layer written, ``W_dec_i[:, j]`` to the layer ``i + j``.

    Raises:
        DictionaryError: files are missing, damaged or of different sizes.
    """
    config = config_of(path)
    numbers = sorted(int(found[1]) for file in path.glob("W_enc_*") if (found := _FILE.fullmatch(file.name)))
    if not numbers or numbers != list(range(len(numbers))):
        raise DictionaryError(f"{path} holds encoders of layers {numbers}; expected every layer from 0.")
    layers = tuple(_layer(path, number, len(numbers)) for number in numbers)
    d_in, d_sae = layers[0]["W_enc"].shape
    for number, layer in enumerate(layers):
        expect_sizes(path / f"W_enc_{number}.safetensors", d_in=(d_in, layer["W_enc"].shape[0]), d_sae=(
            d_sae, layer["W_enc"].shape[1]))  # fmt: skip
    jumprelu = {"threshold" in layer for layer in layers}
    if len(jumprelu) > 1:
        raise DictionaryError(
            f"{path}: some layers have a threshold and some have none: files of two models are mixed."
        )
    known = {"model_name": config.get("model_name"), **{name: fact for name, fact in facts.items() if fact is not None}}
    taps = tuple(tap_of(*points_of(config, number), facts=known) for number in numbers)
    cfg = CrossLayerConfig(
        n_layers=len(layers),
        d_in=d_in,
        d_sae=d_sae,
        jumprelu=jumprelu.pop(),
        taps=taps if taps[0].reads else (),
        metadata=metadata_of(config),
    )
    return Read(layers, cfg)


def _layer(path: Path, number: int, n_layers: int) -> dict[str, np.ndarray]:
    files = [path / f"W_{part}_{number}.safetensors" for part in ("enc", "dec")]
    if not files[1].is_file():
        raise DictionaryError(f"{path} lacks {files[1].name}: the download is incomplete.")
    stored = open_safetensors(*files)
    params = {name: stored.take(f"{name}_{number}") for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    d_sae, d_in = params["b_enc"].size, params["b_dec"].size
    encoder = orient(params["W_enc"], ("d_sae", "d_in"), ("d_in", "d_sae"), {"d_in": d_in, "d_sae": d_sae})
    expected = (d_sae, n_layers - number, d_in)
    if encoder is None or params["W_dec"].shape != expected:
        raise DictionaryError(
            f"{path}: layer {number} of {n_layers} has W_enc {list(params['W_enc'].shape)} and W_dec "
            f"{list(params['W_dec'].shape)}, expected [{d_sae}, {d_in}] and {list(expected)} by its biases' lengths."
        )
    params["W_enc"] = encoder
    if f"threshold_{number}" in stored:
        params["threshold"] = threshold_of(stored.take(f"threshold_{number}"), d_sae, files[0])
    stored.finish()
    return same_dtype(params)


def _detects(path: Path) -> bool:
    if not (path / "W_enc_0.safetensors").is_file():
        return False
    try:
        return config_of(path).get("model_kind", CLT) == CLT
    except DictionaryError:
        return False


FORMAT = Format(
    name="circuit_tracer_clt",
    looks_for=f"W_enc_0.safetensors …, W_dec_0.safetensors … and {CONFIG}",
    detects=_detects,
    reads=read,
    holds="cross-layer transcoder",
)
