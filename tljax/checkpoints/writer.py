"""Writing safetensors one tensor at a time, so that saving needs no second copy of the model."""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file that replaces ``path`` once it is complete, and vanishes if writing fails."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_safetensors(
    path: Path, headers: Mapping[str, tuple[np.dtype, tuple[int, ...]]], tensor: Callable[[str], np.ndarray]
) -> None:
    """Writes a safetensors file.

    Args:
        path: the file; replaced atomically.
        headers: dtype and shape of every tensor, in file order.
        tensor: called once for each name, when its turn to be written comes.
    """
    description: dict[str, object] = {"__metadata__": {"format": "pt"}}  # what transformers insists on
    offset = 0
    for name, (dtype, shape) in headers.items():
        end = offset + dtype.itemsize * math.prod(shape)
        description[name] = {"dtype": _NAMES[dtype.name], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(description, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with replace_file(path) as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for name, (dtype, shape) in headers.items():
            array = np.ascontiguousarray(tensor(name), dtype=dtype.newbyteorder("<")).reshape(-1)
            if array.size != math.prod(shape):
                raise ValueError(f"{name} has {array.size} values, its header says {list(shape)}.")
            stream.write(array.view(np.uint8).data)
