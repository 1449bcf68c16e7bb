"""Reading checkpoint files lazily and without torch: headers first, then one tensor at a time.

Each tensor is read through a memory map that is closed right afterwards, so that the file's pages do not accumulate in
memory beside the model.
"""

import contextlib
import fnmatch
import zipfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp  # registers bfloat16 with numpy
import numpy as np
from safetensors import SafetensorError, safe_open

from tljax.checkpoints.files.array_parts import PARTS, ArrayParts
from tljax.checkpoints.rows import TensorInfo
from tljax.errors import CheckpointError, UnsupportedModelError
from tljax.safetensors_files import parse_json

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SAVING = ".saving-"
"""Start of the name of the folder that a checkpoint is written into before it replaces another."""
HOSTED = "*final.pth"
"""Pattern of the weight file's name, for models in TransformerLens's own format."""
_EIGHT_BIT_FLOATS = {"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2, "F8_E8M0": jnp.float8_e8m0fnu}
"""Dtypes that safetensors cannot give to numpy → numpy's."""


@runtime_checkable
class Tensors(Protocol):
    """The stored tensors of a checkpoint: their headers, and a way to read one."""

    info: dict[str, TensorInfo]

    def read(self, key: str) -> np.ndarray:
        """Returns tensor ``key`` in its stored dtype."""
        ...


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in ``path``.

    Raises:
        CheckpointError: the file is missing, is not JSON, or is not an object.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = sorted(entry.name for entry in path.parent.iterdir())[:8] if path.parent.is_dir() else []
        cut_off = " A save into it was cut off: save again." if found and found[0].startswith(SAVING) else ""
        raise CheckpointError(
            f"{path.parent} has no {path.name}; it holds {found or 'nothing'}. A checkpoint is a "
            f"directory with {CONFIG} and {SINGLE} (or {INDEX} and its shards).{cut_off}"
        ) from None
    except ValueError as error:  # bad syntax, encoding or depth, or a number of thousands of digits
        raise CheckpointError(
            f"{path} is not valid JSON ({error}). It may be half-downloaded: fetch it again."
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, expected an object.")
    return content


def open_tensors(directory: Path, weights: str | None = None) -> Tensors:
    """Opens the weights in ``directory`` after reading only their headers.

    A single safetensors file takes precedence, then an index with shards, then pickles (which need torch): those of
    transformers, then tljax's own arrays in parts, then a file whose name ends in ``final.pth``, as in models that
    TransformerLens hosts.

    Args:
        directory: the checkpoint's directory.
        weights: the pickle to open, if the directory holds several.

    Raises:
        CheckpointError: no weights, a damaged or missing file, or an index that points outside the directory.
        UnsupportedModelError: only pickles, and torch is not installed.
    """
    if weights is not None:
        return PickleFiles([directory / weights])
    if (directory / SINGLE).exists():
        return SafetensorsFiles([directory / SINGLE])
    if (directory / INDEX).exists():
        return SafetensorsFiles(*_shards(directory, INDEX))
    if (directory / PICKLE).exists():
        return PickleFiles([directory / PICKLE])
    if (directory / PICKLE_INDEX).exists():
        return PickleFiles(*_shards(directory, PICKLE_INDEX))
    if (directory / PARTS).is_dir():
        return ArrayParts(directory / PARTS)
    found = sorted(entry.name for entry in directory.iterdir())
    hosted = [name for name in found if fnmatch.fnmatch(name, HOSTED)]
    if len(hosted) > 1:
        raise CheckpointError(f"{directory} holds {', '.join(hosted)}: keep the one to load.")
    if hosted:
        return PickleFiles([directory / hosted[0]])
    raise CheckpointError(
        f"{directory} has no weights: expected {SINGLE} or {INDEX}, found {found[:12]}. "
        "Files ending in .incomplete are an interrupted download: run it again."
    )


class SafetensorsFiles:
    """Tensors in one or more safetensors files."""

    def __init__(self, files: list[Path], weight_map: Mapping[str, str] | None = None) -> None:
        info: dict[str, TensorInfo] = {}
        self._file: dict[str, Path] = {}
        self._seen: dict[Path, tuple[int, int]] = {}
        for file in files:
            with _opened(file) as handle:
                self._seen[file] = _version(file)
                for key in handle.keys():  # noqa: SIM118  (not a mapping)
                    header = handle.get_slice(key)
                    info[key] = TensorInfo(header.get_dtype(), tuple(header.get_shape()))
                    self._file[key] = file
        self.info = info
        if weight_map is not None:
            _check_index(weight_map, {key: file.name for key, file in self._file.items()})

    def read(self, key: str) -> np.ndarray:
        """Returns tensor ``key`` in its stored dtype."""
        file, own = self._unchanged(key), _EIGHT_BIT_FLOATS.get(self.info[key].dtype)
        with _opened(file) as handle:
            return handle.get_tensor(key) if own is None else _raw(file, key, np.dtype(own))

    def reads_parts(self, key: str) -> bool:
        """Whether a part of tensor ``key`` can be read alone."""
        return self.info[key].dtype not in _EIGHT_BIT_FLOATS

    def read_part(self, key: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns ``tensor[index]`` in its stored dtype."""
        if not index:
            return self.read(key)
        with _opened(self._unchanged(key)) as handle:
            return handle.get_slice(key)[index]

    def _unchanged(self, key: str) -> Path:
        """Returns the file of tensor ``key``, which must be the one whose header was read."""
        file = self._file[key]
        if file.exists() and _version(file) != self._seen[file]:
            raise CheckpointError(
                f"{file} has changed since the model was loaded from it, so what is read now may be of another model. "
                "Load the model again."
            )
        return file


class PickleFiles:
    """Tensors in PyTorch pickles, opened by torch with ``weights_only=True`` so that no code in them runs."""

    def __init__(self, files: list[Path], weight_map: Mapping[str, str] | None = None) -> None:
        self._tensors: dict[str, Any] = {}
        stored_in: dict[str, str] = {}
        for file in files:
            for key, tensor in _unpickle(file).items():
                self._tensors[key] = tensor
                stored_in[key] = file.name
        if weight_map is not None:
            _check_index(weight_map, stored_in)
        self.info = {key: TensorInfo(torch_dtype(tensor), tuple(tensor.shape)) for key, tensor in self._tensors.items()}

    def read(self, key: str) -> np.ndarray:
        """Returns tensor ``key`` in its stored dtype."""
        return host_array(self._tensors[key])


def host_array(tensor: Any) -> np.ndarray:
    """Returns a torch tensor as a numpy array, which shares its memory if it is contiguous on the host."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view("bfloat16")
    return tensor.numpy()


def _shards(directory: Path, index: str) -> tuple[list[Path], dict[str, str]]:
    weight_map = read_json(directory / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{directory / index} has no 'weight_map' from tensor names to files.")
    for name in weight_map.values():
        if not isinstance(name, str) or not name.strip(".") or set(name) & set("/\\:\0"):
            raise CheckpointError(
                f"{directory / index} names the shard {name!r}. A shard must be a plain file name next to "
                "the index: paths that lead elsewhere are refused."
            )
    names = sorted(set(weight_map.values()))
    if absent := [name for name in names if not (directory / name).is_file()]:
        raise CheckpointError(
            f"{directory} lacks {len(absent)} of the {len(names)} shards its index names: "
            f"{', '.join(absent[:8])}. The download is incomplete: run it again."
        )
    return [directory / name for name in names], weight_map


def _check_index(weight_map: Mapping[str, str], stored_in: Mapping[str, str]) -> None:
    wrong = [
        f"{key} (index: {weight_map.get(key)}, stored: {stored_in.get(key)})"
        for key in sorted(weight_map.keys() | stored_in.keys())
        if weight_map.get(key) != stored_in.get(key)
    ]
    if wrong:
        raise CheckpointError(f"The index and its shards disagree on {len(wrong)} tensors: {'; '.join(wrong[:8])}.")


def _raw(file: Path, key: str, dtype: np.dtype) -> np.ndarray:
    """Reads a tensor of a dtype that safetensors cannot give to numpy, from a file whose header is valid."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = parse_json(stream.read(length))[key]
        start, end = header["data_offsets"]
        stream.seek(8 + length + start)
        return np.frombuffer(stream.read(end - start), dtype).reshape(header["shape"])


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="numpy") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    """Returns the error for a file that cannot be opened or is damaged, with the likely reason."""
    if file.is_dir():
        reason = "is a directory, not a file. Move what it holds to where it belongs, or fetch the file again."
    elif isinstance(error, PermissionError):
        reason = "may not be read by this user (permission denied): change its permissions, or who you are."
    elif _size(file) == 0:
        reason = "is empty (0 bytes), as an interrupted download or a full disk leaves it: fetch it again."
    elif _starts_with(file, b"version https://git-lfs"):
        reason = "is a git-lfs pointer, not the weights: run `git lfs pull`."
    elif isinstance(error, OSError):
        reason = f"cannot be read: the system says {error}. The file itself may be whole: check its disk or network."
    else:
        reason = f"cannot be read ({error}). It is damaged or half-downloaded: fetch it again."
    return CheckpointError(f"{file} {reason}")


def _version(file: Path) -> tuple[int, int]:
    """Returns the size of a file, and when it was written."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None


def _starts_with(file: Path, start: bytes) -> bool:
    with contextlib.suppress(OSError), file.open("rb") as stream:
        return stream.read(len(start)) == start
    return False


def load_pickle(file: Path) -> Any:
    """Returns what is in a PyTorch pickle, read by torch with ``weights_only=True`` so that no code in it runs.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than tensors and plain values.
        UnsupportedModelError: torch is not installed.
    """
    if find_spec("torch") is None:
        raise UnsupportedModelError(
            f"{file.parent} holds its weights as a PyTorch pickle ({file.name}), and torch is "
            "not installed. Use a revision with safetensors, or `pip install torch` to read this one."
        )
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # torch raises anything from EOFError to its own pickle errors
        if isinstance(error, OSError) or _size(file) == 0:
            raise _unreadable(file, error) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file} is not a plain pickle of tensors, or is damaged ({reason}).") from error


def _unpickle(file: Path) -> Mapping[str, Any]:
    content = load_pickle(file)
    import torch

    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{file} does not hold a mapping from names to tensors.")
    return content


def torch_dtype(tensor: Any) -> str:
    """Returns the dtype of a torch tensor, named as in a safetensors header."""
    names = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    names |= {"int64": "I64", "int32": "I32", "int8": "I8", "uint8": "U8"}
    name = str(tensor.dtype).removeprefix("torch.")
    return names.get(name, name)
