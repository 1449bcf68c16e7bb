"""Llama Scope and its relatives by OpenMOSS (``lm_saes``, now ``llamascopium``), in three vintages.

- ``hyperparams.json`` with ``checkpoints/final.safetensors``: one threshold for all features.
- ``config.json`` with ``encoder.weight`` and ``log_jumprelu_threshold`` (R1-Distill).
- ``config.json`` with ``W_E [d, F]``, ``W_D [F, d]``.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from tljax.dictionaries.formats.points import tap_of
from tljax.dictionaries.formats.read import Format, Read
from tljax.dictionaries.formats.tensors import (
    Stored,
    expect_sizes,
    fold_scales,
    has_keys,
    metadata_of,
    open_safetensors,
    read_config,
    read_rows,
    spread,
    whole,
)
from tljax.dictionaries.maths.config import DictionaryConfig
from tljax.errors import DictionaryError

HYPERPARAMS, CONFIG, FINAL = "hyperparams.json", "config.json", "checkpoints/final.safetensors"
ROWS = {
    "W_enc": [("encoder.weight", "d_sae d_in"), ("W_E", "d_in d_sae")],
    "W_dec": [("decoder.weight", "d_out d_sae"), ("W_D", "d_sae d_out")],
    "b_enc": [("encoder.bias", "d_sae"), ("b_E", "d_sae")],
    "b_dec": [("decoder.bias", "d_out"), ("b_D", "d_out")],
}
_LOGS = ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold")
_MODEL = "meta-llama/Llama-3.1-8B"
"""The model of all dictionaries of the first vintage."""
_NORM = "dataset_average_activation_norm"


def read(path: Path, **facts: Any) -> Read:
    """Reads a dictionary; it takes and returns raw activations.

    Trained on activations times ``s = sqrt(d) / norm``, which is folded into the weights. The scalar threshold of the
    first vintage applies to pre-activations as ``threshold * s``, which is SAELens's reading of these files; those of
    the others as they are, to pre-activations times the decoder norms if ``sparsity_include_decoder_norm``: they are
    divided by the norms instead.

    Raises:
        DictionaryError: the files are damaged, another kind of model, or normalise in a way that cannot be folded.
    """
    first = (path / HYPERPARAMS).is_file()
    config = read_config(path / (HYPERPARAMS if first else CONFIG), facts)
    kind = config.get("sae_type", "sae")
    if kind != "sae":
        raise DictionaryError(f"{path}: sae_type is {kind!r}; this format's reader takes 'sae' (SAEs and transcoders).")
    stored = open_safetensors(_weights(path))
    reads, writes = config.get("hook_point_in"), config.get("hook_point_out")
    writes = None if writes == reads else writes
    params = read_rows(stored, ROWS, optional=("b_dec",), autoencoder=writes is None)
    if "b_dec" not in params:
        if config.get("use_decoder_bias", True):
            raise DictionaryError(f"{path}: the decoder has no bias, and the config says use_decoder_bias.")
        params["b_dec"] = np.zeros(params["W_dec"].shape[1], params["W_dec"].dtype)
    d_in, d_sae = params["W_enc"].shape
    expect_sizes(
        path,
        d_model=(config.get("d_model"), d_in),
        d_sae=(config.get("d_sae"), d_sae),
        expansion_factor=(config.get("expansion_factor"), d_sae / d_in),
    )
    read_scale, write_scale = _scales(path, config, stored, d_in, params["W_dec"].shape[1])
    norms = np.linalg.norm(params["W_dec"].astype(np.float64), axis=1)
    counts_norms = bool(config.get("sparsity_include_decoder_norm")) and not first
    activation = str(config.get("act_fn", "relu")).lower()
    if activation == "jumprelu":
        threshold = _threshold(path, config, stored, d_sae) * (read_scale if first else 1.0)
        params["threshold"] = (threshold / norms if counts_norms else threshold).astype(params["W_dec"].dtype)
    elif activation not in _ACTIVATIONS:
        raise DictionaryError(f"{path}: act_fn is {activation!r}; known are jumprelu, {', '.join(_ACTIVATIONS)}.")
    stored.ignore(*(name for name in stored.names if name.startswith(_NORM)))
    stored.finish()
    subtracts = bool(config.get("apply_decoder_bias_to_pre_encoder")) and writes is None
    cfg = DictionaryConfig(
        architecture="jumprelu" if activation == "jumprelu" else _ACTIVATIONS[activation],
        d_in=d_in,
        d_sae=d_sae,
        d_out=params["W_dec"].shape[1],
        k=whole(path, config, "top_k") if "topk" in activation else None,
        apply_b_dec_to_input=subtracts,
        rescale_acts_by_decoder_norm=counts_norms and "topk" in activation,
        transcoder=writes is not None,
        tap=tap_of(reads, writes, facts=facts, model_name=config.get("model_name", _MODEL if first else None)),
        metadata=metadata_of(config),
    )
    return Read(fold_scales(params, read_scale, write_scale), cfg)


_ACTIVATIONS: dict[str, Any] = {"relu": "standard", "topk": "topk", "batchtopk": "batchtopk"}


def _weights(path: Path) -> Path:
    if (path / FINAL).is_file():
        return path / FINAL
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise DictionaryError(
            f"{path} holds {', '.join(file.name for file in files) or 'no safetensors file'}; expected {FINAL}, or one "
            f"safetensors file beside {CONFIG}."
        )
    return files[0]


def _scales(path: Path, config: dict[str, Any], stored: Stored, d_in: int, d_out: int) -> tuple[float, float]:
    """Returns the factors of the activations read and written, as the dictionary was trained on them."""
    norm_activation = config.get("norm_activation", "inference")
    if norm_activation == "inference":  # already folded
        return 1.0, 1.0
    if norm_activation != "dataset-wise":
        raise DictionaryError(
            f"{path}: norm_activation is {norm_activation!r}, which differs from token to token; only 'dataset-wise' "
            "and 'inference' can be folded into the weights."
        )
    scales = []
    for side, width in (("in", d_in), ("out", d_out)):
        point = config.get(f"hook_point_{side}")
        norms = config.get(_NORM) or {}
        norm = norms.get(side, norms.get(point))
        if norm is None and f"{_NORM}.{point}" in stored:
            norm = stored.number(f"{_NORM}.{point}")
        if not isinstance(norm, int | float) or not 0 < norm < math.inf:
            raise DictionaryError(f"{path}: {_NORM} of {point!r} ({side}) is {norm!r}, expected a positive number.")
        scales.append(math.sqrt(width) / norm)
    return scales[0], scales[1]


def _threshold(path: Path, config: dict[str, Any], stored: Stored, d_sae: int) -> np.ndarray:
    for name in _LOGS:
        if name in stored:
            return np.exp(spread(stored.take(name).astype(np.float64), d_sae, path))
    if not isinstance(config.get("jump_relu_threshold"), int | float):
        raise DictionaryError(f"{path}: act_fn is jumprelu, and there is no jump_relu_threshold nor {_LOGS[0]}.")
    return spread(float(config["jump_relu_threshold"]), d_sae, path)


def _detects(path: Path) -> bool:
    if has_keys(path / HYPERPARAMS, "d_model", "hook_point_in"):
        return True
    return has_keys(path / CONFIG, "hook_point_in", "d_model", "act_fn")


FORMAT = Format(
    name="llama_scope",
    looks_for=f"{HYPERPARAMS} with {FINAL}, or {CONFIG} with hook_point_in, d_model and act_fn",
    detects=_detects,
    reads=read,
    files=lambda sae_id: tuple(f"{sae_id}/{name}" if sae_id else name for name in ("*.json", "*.safetensors", FINAL)),
)
