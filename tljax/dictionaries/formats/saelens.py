"""Dictionaries as SAELens saves them: ``cfg.json``, ``sae_weights.safetensors``, perhaps ``sparsity.safetensors``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tljax.dictionaries.formats import tensors
from tljax.dictionaries.formats.dtypes import dtype_named, in_dtype
from tljax.dictionaries.formats.read import Format, Read
from tljax.dictionaries.formats.saelens_config import read_config
from tljax.dictionaries.maths.config import DictionaryConfig
from tljax.errors import DictionaryError

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
THRESHOLD = "topk_threshold"
"""The scalar of a BatchTopK training checkpoint; of such a dictionary in memory, a key of ``cfg.metadata``."""


def read_saelens(
    path: Path,
    *,
    config_overrides: Mapping[str, Any] | None = None,
    model_name: str | None = None,
    reads: str | None = None,
    writes: str | None = None,
    processing: tuple[str, ...] | None = None,
    training: bool = False,
    **_: Any,
) -> Read:
    """Reads a dictionary of any version of SAELens, inference or training checkpoint.

    Args:
        path: directory with the files.
        config_overrides: keys that replace those of ``cfg.json``, or of its ``metadata`` if it has them there.
        model_name, reads, writes: facts for the tap, where the files say nothing.
        processing: of the model's weights; goes before what the files say.
        training: whether a BatchTopK training checkpoint is read as what trains.

    Raises:
        DictionaryError: the config is not one of SAELens's, it and the weights disagree, or a file is missing or
            damaged.
    """
    stored = _overridden(tensors.read_config(path / CONFIG), config_overrides or {})
    cfg = read_config(stored, str(path / CONFIG), training=training)
    cfg = cfg.replace(tap=cfg.tap.known(reads=reads, writes=writes, model_name=model_name))
    if processing is not None:
        cfg = cfg.replace(tap=cfg.tap.replace(processing=processing))
    origin = str(path / WEIGHTS)
    files = tensors.open_safetensors(path / WEIGHTS)
    params, cfg = _parameters({name: files.take(name) for name in files.names}, cfg, stored, origin)
    dtype = dtype_named(stored.get("dtype", "float32"), str(path / CONFIG))
    return Read({name: in_dtype(array, dtype, name, origin) for name, array in params.items()}, cfg, _sparsity(path))


def _overridden(stored: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    metadata = stored.get("metadata")
    if not isinstance(metadata, Mapping):
        return stored | dict(overrides)
    described = {key: value for key, value in overrides.items() if key in metadata or key not in stored}
    replaced = {key: value for key, value in overrides.items() if key not in described}
    return stored | replaced | {"metadata": {**metadata, **described}}


def _parameters(
    arrays: dict[str, np.ndarray], cfg: DictionaryConfig, stored: Mapping[str, Any], origin: str
) -> tuple[dict[str, np.ndarray], DictionaryConfig]:
    """Returns the parameters by our names, and the config with what only the weights say."""
    params = dict(arrays)
    sizes = {"d_in": cfg.d_in, "d_sae": cfg.d_sae, "d_out": cfg.output_width}
    for name in params.keys() & {"W_enc", "W_dec", "W_skip"}:  # either way round, and if square as SAELens has it
        axes = tensors.AXES[name]
        array = tensors.orient(params[name], axes, axes, dict(sizes))
        params[name] = params[name] if array is None else array
    _drop_scaling_factor(params, stored, origin)
    if "log_threshold" in params:
        params["threshold"] = np.exp(params.pop("log_threshold"))
    if THRESHOLD not in params:
        if stored.get("architecture") in ("batchtopk", "matryoshka_batchtopk") and cfg.architecture == "jumprelu":
            raise DictionaryError(
                f"{origin} is a BatchTopK training checkpoint without {THRESHOLD}, the number by which features are "
                "selected outside training. training=True reads it to be trained further."
            )
        return params, cfg
    if params[THRESHOLD].size != 1:
        raise DictionaryError(f"{origin}: {THRESHOLD} has shape {list(params[THRESHOLD].shape)}, expected one number.")
    threshold = float(params.pop(THRESHOLD).reshape(()))
    if cfg.architecture == "batchtopk":
        return params, cfg.replace(metadata=(*cfg.metadata, (THRESHOLD, json.dumps(threshold))))
    if stored.get("rescale_acts_by_decoder_norm", True):  # the threshold is in units of the rescaled features
        norms = np.maximum(np.linalg.norm(params["W_dec"], axis=1), 1e-8)
        params |= {"W_dec": params["W_dec"] / norms[:, None], "W_enc": params["W_enc"] * norms}
        params["b_enc"] = params["b_enc"] * norms
    params["threshold"] = np.full(cfg.d_sae, threshold, params["W_dec"].dtype)
    return params, cfg


def _drop_scaling_factor(params: dict[str, np.ndarray], stored: Mapping[str, Any], origin: str) -> None:
    """Drops the factors of features that versions before 6 could finetune, where they change nothing."""
    finetuned = bool(stored.get("finetuning_scaling_factor"))
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        factors = params.pop(name, None)
        if factors is not None and (finetuned or not (factors == 1).all()):
            raise DictionaryError(
                f"{origin} holds {name}, which multiplies features in the decoder after finetuning. SAELens has not "
                "read such dictionaries since version 6. Multiply the rows of W_dec by it, take it out of the file, "
                'and set "finetuning_scaling_factor": false in cfg.json.'
            )


def _sparsity(path: Path) -> np.ndarray | None:
    if not (path / SPARSITY).is_file():
        return None
    return tensors.open_safetensors(path / SPARSITY).take("sparsity", may_be_nan=True)


def _detects(path: Path) -> bool:
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()


def _files(sae_id: str | None) -> tuple[str, ...]:
    start = f"{sae_id}/" if sae_id else ""
    return tuple(f"{start}{name}" for name in (CONFIG, WEIGHTS, SPARSITY))


FORMAT = Format(
    name="saelens",
    looks_for=f"{CONFIG} and {WEIGHTS}",
    detects=_detects,
    reads=read_saelens,
    files=_files,
    named=(CONFIG, WEIGHTS),
)
