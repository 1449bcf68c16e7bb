"""Safetensors files, written atomically and one tensor at a time.

The header of tljax's own files says what they hold, with checksums of each tensor and of the header itself (the seal):
a file that was changed later is refused. CRC-32 takes 0.35 s a gigabyte. Files from before checksums have none.
"""

import contextlib
import json
import math
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from tljax.errors import CheckpointError, TljaxError
from tljax.schema import mismatch

_NAMES = {
    "bool": "BOOL", "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
}  # fmt: skip
"""NumPy's name of a dtype → safetensors' name."""

_CHECKSUMS, _SEAL = "checksums", "seal"

_OF_A_CHECKPOINT = {"format": "pt"}
"""Metadata that transformers requires."""


@contextlib.contextmanager
def replace_file(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Opens a temporary file that replaces ``path`` once it is complete, and vanishes if writing fails.

    Args:
        path: the file.
        durable: whether to wait until the disk has it, so that not even a power cut leaves half of it.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private
        os.replace(temporary, path)
        if durable:
            _sync_directory(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # it may have got its name already
            os.unlink(temporary)
        raise


def _sync_directory(directory: Path) -> None:
    """Waits until the disk has the directory's entries; where directories cannot be opened there is nothing to do."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_safetensors(
    path: Path,
    headers: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    tensor: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] = _OF_A_CHECKPOINT,
    *,
    sealed: bool = False,
    durable: bool = False,
) -> str | None:
    """Writes a safetensors file, one tensor at a time.

    Args:
        path: the file; replaced atomically.
        headers: dtype and shape of every tensor, in file order.
        tensor: returns a tensor by name; called once for each, just before it is written.
        metadata: strings for the file's header; by default those of a checkpoint.
        sealed: whether to put checksums into the header.
        durable: as in :func:`replace_file`.

    Returns:
        The seal, a checksum that identifies the contents, or ``None`` if not ``sealed``.
    """
    description: dict[str, Any] = {"__metadata__": dict(metadata)}
    checksums = dict.fromkeys(headers, "0" * 8)
    if sealed:
        description["__metadata__"] |= {_CHECKSUMS: json.dumps(checksums), _SEAL: "0" * 8}
    offset = 0
    for name, (dtype, shape) in headers.items():
        end = offset + dtype.itemsize * math.prod(shape)
        description[name] = {"dtype": _NAMES[dtype.name], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    with replace_file(path, durable=durable) as stream:
        stream.write(_header_bytes(description))
        for name, (dtype, shape) in headers.items():
            array = np.ascontiguousarray(tensor(name), dtype=dtype.newbyteorder("<")).reshape(-1)
            if array.size != math.prod(shape):
                raise ValueError(f"{name} has {array.size} values, its header says {list(shape)}.")
            stream.write(array.view(np.uint8).data)
            if sealed:
                checksums[name] = checksum(array)
        if not sealed:
            return None
        description["__metadata__"][_CHECKSUMS] = json.dumps(checksums)
        description["__metadata__"][_SEAL] = seal = seal_of(description)
        stream.seek(0)
        stream.write(_header_bytes(description))  # as long as before
        return seal


def _header_bytes(description: Mapping[str, Any]) -> bytes:
    header = json.dumps(description, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def checksum(array: np.ndarray, before: str = "0" * 8) -> str:
    """Returns the checksum of a contiguous array's bytes; ``before`` is that of the bytes before them, if any."""
    return f"{zlib.crc32(array.reshape(-1).view(np.uint8).data, int(before, 16)):08x}"


def seal_of(description: Mapping[str, Any]) -> str:
    """Returns the checksum of a header or any JSON object; the order of its keys and a seal in it do not count."""
    metadata = {key: value for key, value in description.get("__metadata__", {}).items() if key != _SEAL}
    counted = {**description, "__metadata__": metadata}
    return f"{zlib.crc32(json.dumps(counted, sort_keys=True).encode()):08x}"


def read_seal(path: Path) -> tuple[dict[str, str], str] | None:
    """Reads the checksums by tensor, and the seal, of a safetensors file; ``None`` if it has none.

    Raises:
        ValueError: the header is not the one that was written.
    """
    with path.open("rb") as stream:
        description = parse_json(stream.read(int.from_bytes(stream.read(8), "little")))
    metadata = description.get("__metadata__") or {}
    if _SEAL not in metadata and _CHECKSUMS not in metadata:
        return None
    if metadata.get(_SEAL) != seal_of(description):
        raise ValueError("its header was changed after it was written")
    return parse_json(metadata[_CHECKSUMS]), metadata[_SEAL]


def parse_json(text: str | bytes) -> Any:
    """Parses JSON.

    Raises:
        ValueError: this is not JSON, or it is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def write_own(path: str | os.PathLike[str], form: str, arrays: Mapping[str, Any], **header: Any) -> None:
    """Writes a file of tljax's own.

    Args:
        path: the file; replaced atomically, with missing folders made.
        form: what the file holds, as its header says.
        arrays: JAX or NumPy arrays by name.
        **header: more entries of the header, as JSON values.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    widest_first = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)  # keeps each aligned
    write_safetensors(
        path,
        {name: (np.dtype(arrays[name].dtype), np.shape(arrays[name])) for name in widest_first},
        lambda name: np.asarray(jax.device_get(arrays[name])),
        {"format": form, **{name: json.dumps(value) for name, value in header.items()}},
        sealed=True,
    )


def read_own(
    path: str | os.PathLike[str],
    form: str,
    what: str,
    remedy: str = "",
    error: type[TljaxError] = CheckpointError,
    fields: Mapping[str, Any] | None = None,
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Reads arrays and header that :func:`write_own` wrote; one array at a time is in memory twice.

    Args:
        path: the file.
        form: the ``form`` it must have been written with.
        what: the same in words, for the error.
        remedy: a sentence for the error of a damaged file.
        error: the class of the errors.
        fields: schema of the header, for :func:`tljax.schema.mismatch`; ``None`` checks nothing.

    Raises:
        CheckpointError: (or ``error``) the file is missing, damaged, or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise error(f"There is no file {path}.")
    unreadable = (SafetensorError, OSError, KeyError, AttributeError)  # the last two: dtypes that numpy lacks
    with own_errors(path, remedy, error, *unreadable), safe_open(path, framework="numpy") as file:
        metadata: dict[str, str] = file.metadata() or {}
        if metadata.pop("format", None) != form:
            raise error(f"{path} does not hold {what}.")
        checksums, _ = read_seal(Path(path)) or (None, None)
        header = {name: parse_json(value) for name, value in metadata.items() if name not in (_SEAL, _CHECKSUMS)}
        if fields is not None and (problem := mismatch(header, fields, "its header")):
            raise ValueError(problem)
        names = file.keys()
        if checksums is not None and checksums.keys() != set(names):
            raise ValueError("arrays were added or taken away")
        return {name: _intact(name, file.get_tensor(name), checksums) for name in names}, header


@contextlib.contextmanager
def own_errors(
    path: str | os.PathLike[str], remedy: str, error: type[TljaxError], *others: type[Exception]
) -> Iterator[None]:
    """Turns errors from parsing one of tljax's own files into an error that names the file."""
    try:
        yield
    except error:
        raise
    except (ValueError, TypeError, ArithmeticError, *others) as problem:
        raise error(f"{path} is damaged or incomplete ({problem}). {remedy}".rstrip()) from problem


def _intact(name: str, array: np.ndarray, checksums: Mapping[str, str] | None) -> jax.Array:
    if checksums is not None and checksum(array) != checksums[name]:
        raise ValueError(f"{name} does not have the checksum it was written with")
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise ValueError(f"{name} is {array.dtype}: jax.config.update('jax_enable_x64', True) first")
    return jnp.asarray(array)
