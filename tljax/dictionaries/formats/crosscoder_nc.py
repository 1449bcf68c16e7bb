"""Crosscoders of neelnanda-io/Crosscoders: ``25.pt`` with ``25_cfg.json``."""

from pathlib import Path
from typing import Any

import numpy as np

from tljax.dictionaries.formats.connor_rob import beside, config_of, is_with_config, pickle_with_config
from tljax.dictionaries.formats.points import tap_of
from tljax.dictionaries.formats.read import Format, Read
from tljax.dictionaries.formats.tensors import expect_sizes, metadata_of, open_pickle, read_config, same_dtype
from tljax.dictionaries.maths.config import CrosscoderConfig
from tljax.errors import DictionaryError

_KEY, _OTHER = "dict_size", "act_size"


def read(path: Path, **facts: Any) -> Read:
    """Reads ``NAME.pt``, or the directory that holds it and its config.

    The files do not say what activations were divided by in training (GPT-2's: for each layer, the norm's mean over
    ``sqrt(d)``): give the crosscoder activations that are divided so.

    Raises:
        DictionaryError: a file is missing or damaged, or the shapes are not a crosscoder's.
        UnsupportedModelError: torch is not installed.
    """
    file = path if path.is_file() else pickle_with_config(path, _KEY, _OTHER)
    if file is None:
        raise DictionaryError(
            f"{path} holds no NAME.pt with a NAME_cfg.json that says {_KEY}, or several: name the file."
        )
    config = read_config(config_of(file), facts)
    stored, _ = open_pickle(file)
    params = {name: stored.take(name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    stored.finish()
    d_sae = params["b_enc"].size
    n, d = params["b_dec"].shape if params["b_dec"].ndim == 2 else (0, 0)
    if params["W_enc"].shape != (n, d, d_sae) or params["W_dec"].shape != (d_sae, n, d):
        raise DictionaryError(
            f"{file}: by its biases W_enc must have shape {[n, d, d_sae]} and W_dec {[d_sae, n, d]}; they have "
            f"{list(params['W_enc'].shape)} and {list(params['W_dec'].shape)}."
        )
    expect_sizes(file, dict_size=(config.get("dict_size"), d_sae))
    site, point, model = config.get("site"), config.get("hook_point"), config.get("model_name")
    if point is None and site is not None and config.get("layer") is not None:
        point = f"blocks.{config['layer']}.hook_{site}"
    points = [point] * n if point or site is None else [f"blocks.{layer}.hook_{site}" for layer in range(n)]
    taps = tuple(tap_of(point, facts=facts, model_name=model, processing=None) for point in points)
    cfg = CrosscoderConfig(
        n_sources=n, d_in=d, d_sae=d_sae, taps=taps if points[0] else (), metadata=metadata_of(config)
    )
    return Read(same_dtype(_typed(params)), cfg)


def _typed(params: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in params.items()}


FORMAT = Format(
    name="crosscoder_nc",
    looks_for=f"NAME.pt and NAME_cfg.json with {_KEY} and no {_OTHER}",
    detects=lambda path: (
        is_with_config(path, _KEY, _OTHER) if path.is_file() else bool(pickle_with_config(path, _KEY, _OTHER))
    ),
    reads=read,
    files=beside,
    holds="crosscoder",
)
