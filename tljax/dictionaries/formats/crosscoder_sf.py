"""Crosscoders of science-of-finetuning: ``config.json`` with ``model.safetensors``, or a pickle of the state dict."""

from pathlib import Path
from typing import Any

import numpy as np

from tljax.dictionaries.formats.points import tap_of
from tljax.dictionaries.formats.read import Format, Read
from tljax.dictionaries.formats.tensors import (
    Stored,
    expect_sizes,
    metadata_of,
    open_pickle,
    open_safetensors,
    read_config,
    same_dtype,
    shapes_in,
)
from tljax.dictionaries.maths.config import CodeNormalization, CrosscoderConfig
from tljax.errors import DictionaryError

FILE, CONFIG, PREFIX = "model.safetensors", "config.json", "_orig_mod."
NORMALIZATIONS: dict[int, CodeNormalization] = {1: "crosscoder", 2: "sae", 3: "mixed", 4: "none", 5: "decoupled"}
"""``code_normalization_id`` in the files → what it means; files without it mean 1."""
_EPS = 1e-8


def read(path: Path, **facts: Any) -> Read:
    """Reads a directory, or the ``.safetensors`` or ``.pt`` file of one.

    A threshold applies to features times their ``code_norms``. One that was never set (-1) selects nothing: then the
    ``k`` largest of the batch are kept, as in training.

    Raises:
        DictionaryError: files are missing or damaged, or it normalises in a way that its own code gets wrong.
    """
    file = path if path.is_file() else path / FILE
    config = read_config(file.parent / CONFIG, facts) if (file.parent / CONFIG).is_file() else {}
    stored = open_safetensors(file) if file.suffix == ".safetensors" else open_pickle(file)[0]
    stored = stored.without_prefix(PREFIX)
    params = {
        "W_enc": stored.take("encoder.weight"), "b_enc": stored.take("encoder.bias"),
        "W_dec": stored.take("decoder.weight"), "b_dec": stored.take("decoder.bias"),
    }  # fmt: skip
    d_sae = params["b_enc"].size
    n, d = params["b_dec"].shape if params["b_dec"].ndim == 2 else (0, 0)
    if params["W_enc"].shape != (n, d, d_sae) or params["W_dec"].shape != (n, d_sae, d):
        raise DictionaryError(
            f"{file}: by its biases encoder.weight must have shape {[n, d, d_sae]} and decoder.weight {[n, d_sae, d]}; "
            f"they have {list(params['W_enc'].shape)} and {list(params['W_dec'].shape)}."
        )
    expect_sizes(
        file,
        activation_dim=(config.get("activation_dim"), d),
        dict_size=(config.get("dict_size"), d_sae),
        num_layers=(config.get("num_layers"), n),
    )
    params["W_dec"] = np.swapaxes(params["W_dec"], 0, 1)
    number = int(stored.number("code_normalization_id")) if "code_normalization_id" in stored else 1
    if number not in NORMALIZATIONS:
        raise DictionaryError(f"{file}: code_normalization_id is {number}; known are {NORMALIZATIONS}.")
    k = int(stored.number("k")) if "k" in stored else None
    params |= _standardisation(file, config, stored, (n, d))
    if "mean" in params and NORMALIZATIONS[number] == "decoupled":
        raise DictionaryError(
            f"{file}: it is decoupled and standardises activations. Its own code does so twice over, so that what it "
            "was trained to be cannot be told."
        )
    decoupled = NORMALIZATIONS[number] == "decoupled"
    threshold = _threshold(file, stored, n if decoupled else 1)
    stored.finish()
    if threshold is not None and (threshold >= 0).all():
        params["threshold"] = (
            np.broadcast_to(threshold[:, None], (n, d_sae)) if decoupled else np.full(d_sae, threshold)
        )
    elif threshold is not None and (threshold >= 0).any():
        raise DictionaryError(f"{file}: only some of its thresholds were ever set: {threshold.tolist()}.")
    selects = "standard" if k is None else "jumprelu" if "threshold" in params else "batchtopk"
    cfg = CrosscoderConfig(
        n_sources=n,
        d_in=d,
        d_sae=d_sae,
        architecture=selects,
        k=k if selects == "batchtopk" else None,
        code_normalization=NORMALIZATIONS[number],
        alpha_sae=float(config.get("code_normalization_alpha_sae", 1.0)),
        alpha_cc=float(config.get("code_normalization_alpha_cc", 0.1)),
        scale_eps=_EPS if "mean" in params else 0.0,
        taps=(tap_of(None, facts=facts),) * n if facts.get("reads") else (),
        metadata=metadata_of(config),
    )
    return Read(same_dtype(params), cfg)


def _standardisation(
    file: Path, config: dict[str, Any], stored: Stored, shape: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Returns ``mean`` and ``scale``; nothing where the buffers are NaN, which means that there is none."""
    buffers = {}
    for name in ("activation_mean", "activation_std", "activation_global_scale", "target_rms"):
        if name in stored:
            buffers[name] = stored.take(name, may_be_nan=True)
    mean, std = buffers.get("activation_mean"), buffers.get("activation_std")
    if mean is None or std is None or np.isnan(mean).any() or np.isnan(std).any():
        return {}
    if config.get("keep_relative_variance") is False:
        raise DictionaryError(f"{file}: keep_relative_variance=False, a scale for each neuron, is not supported.")
    rms = float(buffers.get("target_rms", np.ones(1)).reshape(-1)[0])
    scale = buffers.get("activation_global_scale", rms / np.sqrt((std.astype(np.float64) ** 2).sum(axis=-1) + _EPS))
    if mean.shape != shape or scale.shape != shape[:1] or not np.isfinite(scale).all():
        raise DictionaryError(f"{file}: activation_mean has shape {list(mean.shape)}, expected {list(shape)}.")
    return {"mean": mean, "scale": scale}


def _threshold(file: Path, stored: Stored, count: int) -> np.ndarray | None:
    if "threshold" not in stored:
        return None
    threshold = stored.take("threshold").reshape(-1)
    if threshold.size != count:
        raise DictionaryError(f"{file}: threshold has {threshold.size} numbers, expected {count}.")
    return threshold


def _detects(path: Path) -> bool:
    file = path if path.is_file() else path / FILE
    shape = {name.replace(PREFIX, ""): shape for name, shape in shapes_in(file).items()}.get("encoder.weight", ())
    return len(shape) == 3


FORMAT = Format(
    name="crosscoder_sf",
    looks_for=f"{FILE} with an encoder.weight of three axes",
    detects=_detects,
    reads=read,
    holds="crosscoder",
)
