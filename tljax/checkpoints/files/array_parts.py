"""Reading the zarr arrays of a checkpoint in parts, each device's part alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tljax.checkpoints.rows import TensorInfo
from tljax.errors import CheckpointError

PARTS = "parameters"
"""The folder of the arrays."""
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


def import_tensorstore() -> Any:
    """Imports tensorstore.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        import tensorstore
    except ImportError as error:
        raise CheckpointError(
            "A checkpoint in parts needs tensorstore, which is not installed: pip install tensorstore, or save it "
            "without in_parts=True where a host can hold each tensor."
        ) from error
    return tensorstore


class ArrayParts:
    """Tensors in zarr arrays, of which any part is read alone."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            self.info = {path.name: _info(path / "zarr.json") for path in sorted(directory.iterdir())}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{directory} is damaged: {error!r}. Save the model again.") from error

    def read(self, key: str) -> np.ndarray:
        """Returns tensor ``key`` in its stored dtype."""
        return self.read_part(key, tuple(slice(0, length) for length in self.info[key].shape))

    def reads_parts(self, key: str) -> bool:
        """Whether a part of tensor ``key`` can be read alone."""
        return key in self.info

    def read_part(self, key: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns ``tensor[index]`` in its stored dtype."""
        tensorstore, path = import_tensorstore(), self._directory / key
        try:
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
            return np.asarray(tensorstore.open(spec, open=True, read=True).result()[index].read().result())
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: {error}. Save the model again.") from error


def _info(path: Path) -> TensorInfo:
    described = json.loads(path.read_text())
    return TensorInfo(DTYPES[described["data_type"]], tuple(described["shape"]))
