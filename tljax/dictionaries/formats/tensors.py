"""Arrays as other projects store them: read in SAELens's orientation, each of them used exactly once.

A format's layout is a table: for each parameter the names it may be stored under, with its axes in the order they are
stored in. Shapes decide the orientation of a matrix, by the lengths of the biases; where both orders fit, because the
matrix is square, the table does.
"""

import contextlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tljax.checkpoints.files.reader import SafetensorsFiles, host_array, load_pickle, read_json
from tljax.checkpoints.finite import all_finite
from tljax.errors import CheckpointError, DictionaryError, nearest

AXES = {
    "W_enc": ("d_in", "d_sae"), "W_dec": ("d_sae", "d_out"), "W_skip": ("d_out", "d_in"), "b_dec": ("d_out",),
    **dict.fromkeys(("b_enc", "threshold", "b_gate", "b_mag", "r_mag"), ("d_sae",)),
}  # fmt: skip
"""Axes of each parameter in memory."""

Rows = Mapping[str, Sequence[tuple[str, str]]]
"""For each parameter the names it may be stored under, each with its stored axes: ``[("encoder.weight", "d_sae
d_in")]``."""


@contextlib.contextmanager
def dictionary_errors() -> Iterator[None]:
    """Turns errors about a checkpoint's files into errors about a dictionary's."""
    try:
        yield
    except CheckpointError as error:
        raise DictionaryError(str(error)) from error


class Stored:
    """Arrays of a dictionary's files by name, each to be taken once.

    Args:
        origin: the file or directory, as errors name it.
        arrays: a function for each name that reads its array.
    """

    def __init__(self, origin: Path, arrays: Mapping[str, Callable[[], np.ndarray]]) -> None:
        self.origin = origin
        self._arrays = dict(arrays)
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    @property
    def names(self) -> list[str]:
        """Names of all arrays."""
        return sorted(self._arrays)

    def take(self, name: str, *, may_be_nan: bool = False) -> np.ndarray:
        """Returns an array, half precision as float32.

        Args:
            name: its stored name.
            may_be_nan: whether NaN has a meaning in this format.

        Raises:
            DictionaryError: there is none, it is no array of numbers, or it holds a NaN or an infinity.
        """
        if name not in self._arrays:
            raise DictionaryError(
                f"{self.origin} lacks {name!r}; it holds {', '.join(self.names) or 'nothing'}."
                + nearest(name, self.names)
            )
        self._taken.add(name)
        with dictionary_errors():
            array = self._arrays[name]()
        floats = array.dtype.name in ("float16", "bfloat16", "float32", "float64")
        if not floats and array.dtype.kind not in "iub":
            raise DictionaryError(f"{self.origin}: {name} holds {array.dtype}, expected numbers.")
        if floats and not may_be_nan and array.size and not all_finite(np.ascontiguousarray(array)):
            raise DictionaryError(
                f"{self.origin}: {name} holds NaN or infinities. The file is damaged, or its training had diverged."
            )
        return array.astype(np.float32) if array.dtype.name in ("float16", "bfloat16") else array

    def read(self, name: str) -> np.ndarray:
        """Returns an array as it is stored, unchecked; it does not count as taken."""
        with dictionary_errors():
            return self._arrays[name]()

    def number(self, name: str) -> float:
        """Returns an array of one number.

        Raises:
            DictionaryError: it has more.
        """
        array = self.take(name)
        if array.size != 1:
            raise DictionaryError(f"{self.origin}: {name} has shape {list(array.shape)}, expected one number.")
        return float(array.reshape(()))

    def ignore(self, *names: str) -> None:
        """Marks arrays as known to change nothing."""
        self._taken |= set(names)

    def finish(self) -> None:
        """Checks that every array was used.

        Raises:
            DictionaryError: some were not; lists them.
        """
        if left := sorted(self._arrays.keys() - self._taken):
            raise DictionaryError(
                f"{self.origin} holds arrays that this format does not have: {', '.join(left[:12])}. It is another "
                "format, or files of two dictionaries are mixed."
            )

    def without_prefix(self, prefix: str) -> "Stored":
        """Returns the same arrays under names that lack ``prefix``, wherever in the name it stands."""
        return Stored(self.origin, {name.replace(prefix, ""): read for name, read in self._arrays.items()})


def open_safetensors(*files: Path) -> Stored:
    """Opens safetensors files; arrays are read when taken."""
    with dictionary_errors():
        opened = SafetensorsFiles(list(files))
    return Stored(
        files[0] if len(files) == 1 else files[0].parent,
        {name: lambda name=name: opened.read(name) for name in opened.info},
    )


def open_npz(file: Path) -> Stored:
    """Opens an ``.npz`` file; arrays are read when taken."""

    def read(name: str) -> np.ndarray:
        with _npz_errors(file), file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return arrays[name]

    with _npz_errors(file), file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        return Stored(file, {name: lambda name=name: read(name) for name in arrays.files})


_UNREADABLE = (
    OSError, ValueError, KeyError, AttributeError, TypeError, EOFError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What NumPy raises for a file that is none of its own, or not whole."""


@contextlib.contextmanager
def _npz_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except (
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise DictionaryError(f"{file} is missing, damaged or half-downloaded ({error}): fetch it again.") from error


def open_pickle(file: Path) -> tuple[Stored, dict[str, Any]]:
    """Opens a PyTorch pickle: its tensors, and what else its mapping holds.

    Raises:
        DictionaryError: it is damaged, or no mapping.
        UnsupportedModelError: torch is not installed.
    """
    with dictionary_errors():
        content = load_pickle(file)
    if not isinstance(content, Mapping):
        raise DictionaryError(f"{file} holds a {type(content).__name__}, expected a mapping from names to tensors.")
    return tensors_of(content, file)


def tensors_of(content: Mapping[str, Any], origin: Path) -> tuple[Stored, dict[str, Any]]:
    """Splits a mapping with torch tensors in it into the tensors and the rest."""
    import torch

    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    rest = {name: value for name, value in content.items() if name not in tensors}
    return Stored(origin, {name: lambda tensor=tensor: host_array(tensor) for name, tensor in tensors.items()}), rest


def read_rows(
    stored: Stored, rows: Rows, *, optional: Sequence[str] = (), autoencoder: bool = True
) -> dict[str, np.ndarray]:
    """Reads parameters by a format's table, in the orientation of :class:`~tljax.dictionaries.Dictionary`.

    Args:
        stored: the arrays.
        rows: the table.
        optional: parameters that may be absent.
        autoencoder: whether the dictionary reconstructs what it reads, so that ``d_in`` is ``d_out``.

    Returns:
        The parameters, all float32 (float64 if the decoder is).

    Raises:
        DictionaryError: lists every parameter that is missing or whose shape fits in no orientation.
    """
    found, problems = {}, []
    for parameter, alternatives in rows.items():
        present = [(name, axes) for name, axes in alternatives if name in stored]
        if len(present) > 1:
            problems.append(f"{' and '.join(name for name, _ in present)} both say what {parameter} is")
        elif present:
            found[parameter] = (present[0][0], tuple(present[0][1].split()), stored.take(present[0][0]))
        elif parameter not in optional:
            problems.append(f"{' or '.join(name for name, _ in alternatives)} is missing")
    if problems:
        raise DictionaryError(
            f"{stored.origin}: {'; '.join(problems)}. It holds {', '.join(stored.names) or 'nothing'}."
        )
    sizes: dict[str, int] = {}
    for _, axes, array in found.values():
        if len(axes) == 1 and array.ndim == 1:
            sizes.setdefault(axes[0], array.shape[0])
    if autoencoder and "d_out" in sizes:
        sizes["d_in"] = sizes["d_out"]
    arrays = {}
    for parameter, (name, axes, array) in found.items():
        oriented = orient(array, axes, AXES[parameter], sizes)
        if oriented is None:
            expected = ", ".join(f"{axis}={sizes.get(axis, '?')}" for axis in axes)
            problems.append(f"{name} has shape {list(array.shape)}, expected [{expected}] in either order")
        else:
            arrays[parameter] = oriented
    if problems:
        raise DictionaryError(f"{stored.origin}: {'; '.join(problems)}. Files of two dictionaries may be mixed.")
    return same_dtype(arrays)


def orient(array: np.ndarray, stored: Sequence[str], wanted: Sequence[str], sizes: dict[str, int]) -> np.ndarray | None:
    """Returns an array with its axes in the wanted order, or ``None`` if its shape fits in neither.

    Args:
        array: as stored.
        stored: its axes in the order that the format stores them in, which counts where both orders fit.
        wanted: the same axes in the order to return them in.
        sizes: what is known of the axes' sizes; those that the array shows are added.
    """
    if array.ndim != len(stored):
        return None
    for axes in (tuple(stored), tuple(stored)[::-1]):
        if all(sizes.get(axis, size) == size for axis, size in zip(axes, array.shape, strict=True)):
            sizes |= dict(zip(axes, array.shape, strict=True))
            return array if axes == tuple(wanted) else array.T
    return None


def same_dtype(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns arrays in one dtype: float32, or float64 if the decoder is."""
    dtype = np.float64 if "W_dec" in arrays and arrays["W_dec"].dtype == np.float64 else np.float32
    return {name: np.ascontiguousarray(array, dtype) for name, array in arrays.items()}


def without_input_bias(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the parameters of the same function without ``b_dec`` subtracted from its input."""
    b_dec, W_enc = params["b_dec"].astype(np.float64), params["W_enc"].astype(np.float64)
    return params | {"b_enc": (params["b_enc"] - b_dec @ W_enc).astype(params["W_enc"].dtype)}


def fold_scales(params: dict[str, np.ndarray], read: float, written: float) -> dict[str, np.ndarray]:
    """Returns parameters that take and return raw activations, from ones for activations times a scale.

    Args:
        params: the parameters.
        read: the factor of the activations that are encoded.
        written: the factor of those that are reconstructed.
    """
    factors = {"W_enc": read, "W_dec": 1 / written, "b_dec": 1 / written}
    return {name: (array * array.dtype.type(factors.get(name, 1.0))) for name, array in params.items()}


def spread(threshold: float | np.ndarray, d_sae: int, origin: Path) -> np.ndarray:
    """Returns a threshold for each feature ``[d_sae]`` from one number or one for each.

    Raises:
        DictionaryError: the shape is another.
    """
    array = np.asarray(threshold).reshape(-1)
    if array.size not in (1, d_sae):
        raise DictionaryError(f"{origin}: threshold has {array.size} numbers, expected 1 or d_sae={d_sae}.")
    return np.ascontiguousarray(np.broadcast_to(array, d_sae))


def expect_sizes(origin: Path, **pairs: tuple[Any, int]) -> None:
    """Checks sizes that a config states, as ``d_sae=(stated, found)``; ``None`` states nothing.

    Raises:
        DictionaryError: a stated size is not the arrays'; lists them all.
    """
    wrong = [
        f"{name}={stated} (arrays: {found})" for name, (stated, found) in pairs.items() if stated not in (None, found)
    ]
    if wrong:
        raise DictionaryError(
            f"{origin}: the config and the arrays are of two dictionaries: the config says {', '.join(wrong)}."
        )


def read_config(file: Path, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the JSON object in a file, with the ``config_overrides`` of the facts.

    Raises:
        DictionaryError: the file is missing, damaged or no object.
    """
    with dictionary_errors():
        return read_json(file) | dict((facts or {}).get("config_overrides") or {})


def whole(origin: Path, config: Mapping[str, Any], key: str) -> int:
    """Returns a config's entry that must be a whole number of at least 1.

    Raises:
        DictionaryError: it is absent, or something else.
    """
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DictionaryError(f"{origin}: {key} is {value!r} in the config, expected a whole number of at least 1.")
    return value


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes in a safetensors file's header by name, nothing if it is no such file; never fails."""
    try:
        return {name: info.shape for name, info in SafetensorsFiles([file]).info.items()} if file.is_file() else {}
    except CheckpointError:
        return {}


def has_keys(file: Path, *keys: str) -> bool:
    """Whether a file holds a JSON object with all of these keys; never fails."""
    try:
        return all(key in read_json(file) for key in keys)
    except CheckpointError:
        return False


def metadata_of(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Returns a config's entries as a :attr:`DictionaryConfig.metadata`."""
    return tuple((str(key), json.dumps(value, sort_keys=True, default=str)) for key, value in config.items())
