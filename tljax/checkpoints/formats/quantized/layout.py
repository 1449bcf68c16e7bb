"""What the formats of quantised weights have in common: a layout of tensors, and the tensors of one weight in it."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from tljax.checkpoints.files.reader import Tensors
from tljax.checkpoints.formats.quantized.codes import Codes
from tljax.checkpoints.rows import TensorInfo
from tljax.errors import CheckpointError

SCALE_DTYPES = ("F16", "BF16", "F32")


class Packed:
    """The tensors that one weight is stored as, by the ends of their names; each is read when it is asked for.

    Args:
        name: the weight's name.
        keys: ends of names → names, of the tensors that are there.
        tensors: the tensors of the checkpoint.
    """

    def __init__(self, name: str, keys: Mapping[str, str], tensors: Tensors) -> None:
        self.name, self._keys, self._tensors = name, keys, tensors

    def __contains__(self, end: str) -> bool:
        return end in self._keys

    def __getitem__(self, end: str) -> np.ndarray:
        return self._tensors.read(self._keys[end])

    def info(self, end: str) -> TensorInfo:
        """Returns the dtype and shape of a tensor."""
        return self._tensors.info[self._keys[end]]

    def error(self, problem: str) -> CheckpointError:
        """Returns the error that this weight cannot be read."""
        return CheckpointError(f"{self.name}: {problem}")

    def check(self, end: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]) -> tuple[int, ...]:
        """Returns the shape of a tensor.

        Args:
            end: the end of its name.
            dtypes: those that it may have.
            shape: the shape that it must have; ``None`` is any length.

        Raises:
            CheckpointError: it has another dtype or shape.
        """
        info = self.info(end)
        if info.dtype not in dtypes:
            raise self.error(f"{self._keys[end]} is {info.dtype}, expected {' or '.join(dtypes)}")
        fits = len(info.shape) == len(shape) and all(
            want in (None, size) for want, size in zip(shape, info.shape, strict=True)
        )
        if not fits or 0 in info.shape:
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise self.error(f"{self._keys[end]} is {list(info.shape)}, expected [{expected}]")
        return info.shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How one weight is stored as several tensors, whose names share a start.

    Attributes:
        lead: end of the name of the tensor by which such a weight is recognised.
        weight: end of the name of the weight that they stand for.
        needed: ends of the names of the other tensors; of ``"a|b"`` one must be there, which counts as ``"a"``.
        shape: returns the weight's shape, having checked the dtypes and shapes of all tensors. Reads no large one.
        read: returns the weight, ``[out, in]`` for a matrix; experts stored in one tensor come first.
        codes: returns the weight as codes, for models that keep it packed; ``None``: it is always made floats.
        optional: ends of the names of tensors that may be there.
        dtypes: dtypes by which ``lead`` is recognised; empty: any.
        marks: of tensors beside it by which ``lead`` is recognised whatever its dtype.
        dtype: dtype of the weight.
    """

    lead: str
    weight: str
    needed: tuple[str, ...]
    shape: Callable[[Packed], tuple[int, ...]]
    read: Callable[[Packed], np.ndarray]
    codes: Callable[[Packed], Codes] | None = None
    optional: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    dtype: str = "F32"

    def base(self, key: str, info: Mapping[str, TensorInfo]) -> str | None:
        """Returns the start of the names that go with ``key``; ``None`` if it is no quantised weight."""
        if not key.endswith(self.lead):
            return None
        base = key[: len(key) - len(self.lead)]
        known = not self.dtypes or info[key].dtype in self.dtypes or any(base + mark in info for mark in self.marks)
        return base if known else None

    def keys(self, base: str, info: Mapping[str, TensorInfo]) -> dict[str, str]:
        """Returns the tensors of one weight: ends of names → names.

        Raises:
            CheckpointError: one is missing.
        """
        keys = {end: base + end for end in (self.lead, *self.optional) if base + end in info}
        for ends in self.needed:
            first, *others = ends.split("|")
            found = [base + end for end in (first, *others) if base + end in info]
            if not found:
                names = " or ".join(base + end for end in (first, *others))
                raise CheckpointError(f"{base + self.lead} is stored without {names}")
            keys[first] = found[0]
        return keys


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What a ``quantization_config`` says.

    Attributes:
        method: its ``quant_method``.
        layouts: how weights may be stored.
        skipped: names, patterns (``*`` is one part of a name) or ``re:`` expressions of modules that are not quantised.
        unused: ends of the names of tensors that only quantised activations or caches need.
    """

    method: str
    layouts: tuple[Layout, ...]
    skipped: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
