"""tljax's own checkpoints in parts: every parameter a zarr array of which each process writes what its devices hold.

For models that no host can hold a tensor of, and for saves in which all hosts write at once. Needs tensorstore
(``pip install tensorstore``).
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tljax.checkpoints.files.array_parts import DTYPES, PARTS, import_tensorstore
from tljax.checkpoints.files.reader import CONFIG
from tljax.checkpoints.formats.native import FORMAT, VERSION, write_side_files
from tljax.checkpoints.layout import flatten
from tljax.checkpoints.parameters import check_parameters
from tljax.config import HookedTransformerConfig
from tljax.errors import CheckpointError
from tljax.processes import in_step, leads
from tljax.quantized_weight import refuse_quantized
from tljax.typing import Params

_OPENED = 64
"""Arrays that are written at once."""


def save_in_parts(
    params: Params, cfg: HookedTransformerConfig, tokenizer: Any, directory: str | os.PathLike[str]
) -> None:
    """Writes a checkpoint of which each process writes the parts on its own devices; nothing is gathered.

    ``config.json`` comes last, so that a directory that was not finished does not load.

    Args:
        params: nested parameters.
        cfg: their config.
        tokenizer: a Hugging Face tokenizer to save with them, or ``None``.
        directory: a directory that all hosts share and that holds no checkpoint.

    Raises:
        CheckpointError: there is a checkpoint already, tensorstore is missing, the parameters do not have the shapes of
            ``cfg``, or a process could not write.
    """
    check_parameters(params, cfg, ", nothing was saved", may_be_stacked=False)
    refuse_quantized(params, "A checkpoint in parts holds floats")
    flat, directory, what = flatten(params), Path(directory), f"Writing {directory}"
    flat = {path: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf) for path, leaf in flat.items()}
    first = next(iter(flat.values()))
    with in_step(first, what, CheckpointError):
        import_tensorstore()
        if directory.is_dir() and any(directory.iterdir()) and (directory / CONFIG).exists():
            raise CheckpointError(f"{directory} holds a checkpoint already: name a new directory to save in parts.")
    with in_step(first, what, CheckpointError):
        if leads(first):
            for path, leaf in flat.items():
                _create(directory / PARTS / path, leaf)
    with in_step(first, what, CheckpointError):
        pending: list[Any] = []
        for path, leaf in flat.items():
            pending += _write(directory / PARTS / path, leaf)
            if len(pending) >= _OPENED:
                _finish(pending, directory)
        _finish(pending, directory)
    with in_step(first, what, CheckpointError):
        if leads(first):
            write_side_files(directory, {FORMAT: VERSION, **cfg.to_dict()}, tokenizer)


def _create(path: Path, leaf: jax.Array) -> None:
    """Writes the description of an array; a part that is missing from its files reads as NaN, which loading refuses."""
    chunk = [max(1, length) for length in leaf.sharding.shard_shape(leaf.shape)]
    description = {
        "zarr_format": 3, "node_type": "array", "shape": list(leaf.shape), "data_type": _named(leaf.dtype),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default"}, "fill_value": "NaN",
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    (path / "zarr.json").write_text(json.dumps(description))


def _write(path: Path, leaf: jax.Array) -> list[Any]:
    """Begins to write what this process's devices hold of an array; of copies, one is written."""
    own = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    if not own or not math.prod(leaf.shape):
        return []
    tensorstore = import_tensorstore()
    store = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}, open=True).result()
    return [store[shard.index].write(np.asarray(shard.data)) for shard in own]


def _finish(pending: list[Any], directory: Path) -> None:
    try:
        for one in pending:
            one.result()
    except (ValueError, OSError) as error:
        raise CheckpointError(f"A part could not be written to {directory}: {error}.") from error
    pending.clear()


def _named(dtype: Any) -> str:
    name = np.dtype(dtype).name
    if name not in DTYPES:
        raise CheckpointError(f"Parameters of {name} cannot be saved in parts: {', '.join(DTYPES)} can.")
    return name
