"""Shards as they lie on disk: headers checked, arrays memory-mapped."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tljax.errors import HarvestError
from tljax.harvest.index import Index, Shard
from tljax.harvest.writing import SUMS
from tljax.safetensors_files import checksum, read_seal

_DTYPES = {
    "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64), "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
}  # fmt: skip
_REMEDY = "Restore the file, or delete index.json and the shards and harvest anew."


class Placed(NamedTuple):
    """Where an array lies in a file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


@dataclasses.dataclass(frozen=True)
class OpenShard:
    """A shard whose arrays are read from the file when they are used."""

    path: Path
    placed: Mapping[str, Placed]

    @functools.cached_property
    def _bytes(self) -> np.ndarray:
        return np.memmap(self.path, np.uint8, "r")

    def __getitem__(self, name: str) -> np.ndarray:
        """An array, memory-mapped and read-only."""
        dtype, shape, offset = self.placed[name]
        end = offset + dtype.itemsize * math.prod(shape)
        return self._bytes[offset:end].view(dtype).reshape(shape)

    @property
    def sums(self) -> dict[str, np.ndarray]:
        """The shard's sums by name."""
        return {name.removeprefix(SUMS): self[name] for name in self.placed if name.startswith(SUMS)}

    def check_contents(self) -> None:
        """Raises HarvestError if an array does not have the checksum it was written with."""
        try:
            checksums = (read_seal(self.path) or ({}, ""))[0]
        except ValueError as error:
            raise HarvestError(f"{self.path}: {error}. {_REMEDY}") from error
        for name in self.placed:
            if checksum(self[name]) != checksums.get(name):
                raise HarvestError(f"{name} in {self.path} is not what was written: its checksum differs. {_REMEDY}")


def open_shard(directory: Path, shard: Shard, index: Index) -> OpenShard:
    """Opens a shard that an index lists.

    Raises:
        HarvestError: the file is missing, cut short, or its header is not what the index says.
    """
    path = directory / shard.file
    if not path.is_file():
        raise HarvestError(f"{path} is missing: the index lists {len(index.shards)} shards. {_REMEDY}")
    if (size := path.stat().st_size) != shard.bytes:
        raise HarvestError(f"{path} is cut short or changed: {size} bytes, written were {shard.bytes}. {_REMEDY}")
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            description: dict[str, Any] = json.loads(stream.read(length))
        description.pop("__metadata__", None)
        placed = {
            name: Placed(_DTYPES[one["dtype"]], tuple(one["shape"]), 8 + length + one["data_offsets"][0])
            for name, one in description.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HarvestError(f"{path} is damaged: its header cannot be read ({error!r}). {_REMEDY}") from error
    for name, stated in index.arrays.items():
        wanted = (np.dtype(stated["dtype"]), (shard.tokens, stated["width"]))
        if name not in placed or placed[name][:2] != wanted:
            found = f"{placed[name].dtype} {list(placed[name].shape)}" if name in placed else "not there"
            raise HarvestError(
                f"{name} in {path} is {found}; the index says {wanted[0]} {list(wanted[1])}. Shards of two harvests "
                f"were mixed. {_REMEDY}"
            )
    return OpenShard(path, placed)
