"""Safetensors files, written one tensor at a time and whole or not at all; tljax's own say what they hold."""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from tljax.errors import CheckpointError, TljaxError

_NAMES = {
    "bool": "BOOL", "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
}  # fmt: skip
"""numpy's name of a dtype → that of the format."""

_OF_A_CHECKPOINT = {"format": "pt"}
"""What transformers insists on."""


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
    path: Path,
    headers: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    tensor: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] = _OF_A_CHECKPOINT,
) -> None:
    """Writes a safetensors file; no second copy of all its tensors is made.

    Args:
        path: the file; replaced atomically.
        headers: dtype and shape of every tensor, in file order.
        tensor: called once for each name, when its turn to be written comes.
        metadata: plain strings for the file's header; by default what a checkpoint's has.
    """
    description: dict[str, object] = {"__metadata__": dict(metadata)}
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


def write_own(path: str | os.PathLike[str], form: str, arrays: Mapping[str, Any], **header: Any) -> None:
    """Writes a file of tljax's own.

    Args:
        path: the file; replaced atomically, folders made.
        form: what the file holds, as its header says.
        arrays: name to array, of JAX or numpy.
        **header: values for JSON.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    widest_first = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)  # so that each starts at its multiple
    write_safetensors(
        path,
        {name: (np.dtype(arrays[name].dtype), np.shape(arrays[name])) for name in widest_first},
        lambda name: np.asarray(jax.device_get(arrays[name])),
        {"format": form, **{name: json.dumps(value) for name, value in header.items()}},
    )


def read_own(
    path: str | os.PathLike[str], form: str, what: str, remedy: str = "", error: type[TljaxError] = CheckpointError
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Reads what :func:`write_own` wrote: arrays and header. One array at a time is in memory twice.

    Args:
        path: the file.
        form: what it must hold.
        what: the same in words, for the error.
        remedy: a sentence for the error of a damaged file.
        error: the class of the errors.

    Raises:
        CheckpointError: or the class given: the file is missing, damaged, or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise error(f"There is no file {path}.")
    try:
        with safe_open(path, framework="numpy") as file:
            header: dict[str, str] = file.metadata() or {}
            if header.pop("format", None) != form:
                raise error(f"{path} does not hold {what}.")
            arrays = {name: jnp.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as problem:
        raise error(f"{path} is damaged or incomplete ({problem}). {remedy}".rstrip()) from problem
    return arrays, {name: json.loads(value) for name, value in header.items()}
