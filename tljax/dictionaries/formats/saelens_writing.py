"""Writing a dictionary in SAELens's format."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tljax.dictionaries.formats.replacing import replace_files
from tljax.dictionaries.formats.saelens import CONFIG, SPARSITY, THRESHOLD, WEIGHTS
from tljax.dictionaries.formats.saelens_config import write_config
from tljax.dictionaries.maths.config import DictionaryConfig
from tljax.errors import DictionaryError
from tljax.safetensors_files import write_safetensors


def write_saelens(
    directory: Path, params: Mapping[str, np.ndarray], cfg: DictionaryConfig, sparsity: np.ndarray | None = None
) -> None:
    """Writes a dictionary as SAELens 6 does; the files appear together or not at all.

    Args:
        directory: where to; made if it does not exist.
        params: arrays by the names of :class:`~tljax.dictionaries.Dictionary`.
        cfg: the config.
        sparsity: ``[d_sae]``, log10 of how often each feature fires.

    Raises:
        DictionaryError: SAELens has no such dictionary, or the parameters are a stack of several.
    """
    if params["W_dec"].ndim != 2:
        count = params["W_dec"].shape[0]
        raise DictionaryError(
            f"This is a stack of {count} dictionaries, and a directory holds one: save each, "
            "jax.tree.map(lambda leaf: leaf[number], dictionaries)."
        )
    arrays = dict(params)
    content = write_config(cfg, has_skip="W_skip" in params, dtype=str(params["W_dec"].dtype))
    if cfg.architecture == "batchtopk":
        threshold = content["metadata"].pop(THRESHOLD, None)
        if threshold is None:
            raise DictionaryError(
                "A BatchTopK dictionary is saved with the threshold that stands for the selection outside training: "
                f'cfg.metadata has no "{THRESHOLD}". Save a jumprelu dictionary with that threshold instead.'
            )
        arrays[THRESHOLD] = np.asarray(threshold, np.float64)
    with replace_files(directory, marker=CONFIG, stale=(SPARSITY,)) as folder:
        _write(folder / WEIGHTS, arrays)
        if sparsity is not None:
            _write(folder / SPARSITY, {"sparsity": sparsity})
        (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write(path: Path, arrays: Mapping[str, Any]) -> None:
    widest_first = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)  # keeps each aligned
    headers = {name: (arrays[name].dtype, arrays[name].shape) for name in widest_first}
    write_safetensors(path, headers, arrays.__getitem__)
