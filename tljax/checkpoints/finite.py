"""Checks on load: NaN, infinities and overflows are errors that name the tensor."""

from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checkpoints.files.reader import Tensors
from tljax.checkpoints.formats.quantized.codes import Codes, codes_of, has_codes
from tljax.checkpoints.slices import Index, PartTensors, reads_parts
from tljax.errors import CheckpointError

_CHUNK = 1 << 17
"""How many numbers are checked at once: few enough to fit in a processor's cache."""
GO_ON = "allow_nonfinite=True loads it all the same."


class Finite:
    """Tensors of a checkpoint, where reading one that holds a NaN or an infinity is an error.

    Args:
        tensors: the tensors to read.
        origin: the checkpoint's name in errors.
    """

    def __init__(self, tensors: Tensors, origin: str) -> None:
        self._tensors, self._origin = tensors, origin
        self._found_finite: set[str] = set()
        self.info = tensors.info

    def read(self, key: str) -> np.ndarray:
        """Returns tensor ``key`` in its stored dtype.

        Raises:
            CheckpointError: it holds a NaN or an infinity.
        """
        array = self._tensors.read(key)
        if key not in self._found_finite and not all_finite(array):
            raise CheckpointError(
                f"{self._origin}: {key} holds {_described(array)}. No trained model has these: the file is damaged, or "
                f"it was written after training had diverged. {GO_ON}"
            )
        self._found_finite.add(key)
        return array

    def reads_parts(self, key: str) -> bool:
        """Whether a part of tensor ``key`` can be read alone."""
        return reads_parts(self._tensors, [key])

    def read_part(self, key: str, index: Index) -> np.ndarray:
        """Returns ``tensor[index]``; an error as in :meth:`read` if it holds a NaN or an infinity."""
        part = cast(PartTensors, self._tensors).read_part(key, index)
        return part if all_finite(np.ascontiguousarray(part)) else self.read(key)[index]

    def has_codes(self, key: str) -> bool:
        """Whether tensor ``key`` can be read as codes."""
        return has_codes(self._tensors, [key])

    def codes(self, key: str) -> Codes:
        """Returns a quantised weight as its codes; an error as in :meth:`read` if a scale is NaN or infinite."""
        codes = codes_of(self._tensors, key)
        eight_bit_floats = codes.numbers.dtype.itemsize == 1 and codes.numbers.dtype.kind not in "iu"
        if not all_finite(codes.scale) or (eight_bit_floats and not np.isfinite(codes.numbers.astype("float32")).all()):
            self.read(key)
        return codes


def all_finite(array: np.ndarray) -> bool:
    """Whether an array of floats holds neither NaN nor infinity; needs little memory, and less time than a copy."""
    bits = np.dtype(f"u{array.dtype.itemsize}")
    infinity = np.array(np.inf, array.dtype).view(bits)
    unsigned = np.array(~np.array(0, bits) >> np.array(1, bits), bits)
    flat = array.reshape(-1).view(bits)
    chunks = (flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))
    return all((chunk & unsigned).max() < infinity for chunk in chunks)


def _well(array: jax.Array) -> bool:
    """Whether a parameter is finite; one on the CPU is checked in place."""
    if all(device.platform == "cpu" for device in array.devices()):
        parts = (shard.data for shard in array.addressable_shards if shard.replica_id == 0)
        return all(all_finite(np.asarray(part)) for part in parts)
    return bool(_finite_on_device(array))


@jax.jit
def _finite_on_device(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def _described(array: np.ndarray) -> str:
    """Describes how many NaN and infinities there are, and where the first is."""
    bad = ~np.isfinite(array)
    nans = int(np.isnan(array).sum())
    counts = [f"{count} {word}" for count, word in ((nans, "NaN"), (int(bad.sum()) - nans, "infinite")) if count]
    first = [int(index) for index in np.unravel_index(int(bad.argmax()), array.shape)]
    return f"{' and '.join(counts)} of {array.size} numbers, the first at {first}"


def refuse_overflow(
    params: Mapping[str, jax.Array], keys: Mapping[str, tuple[str, ...]], tensors: Tensors, origin: str
) -> None:
    """Raises an error if parameters that are finite in the file are not finite after loading.

    Args:
        params: the loaded parameters, by path.
        keys: names of the tensors that each parameter was read from, by path.
        tensors: the stored tensors.
        origin: the checkpoint's name in errors.

    Raises:
        CheckpointError: a number overflowed.
    """
    causes = []
    for path in sorted(path for path, array in params.items() if not _well(array)):
        dtype = params[path].dtype
        ends, stored = float(jnp.finfo(dtype).max), keys.get(path, ())
        largest = max((float(np.abs(tensors.read(key).astype(np.float64)).max(initial=0)) for key in stored), default=0)
        cause = f"{', '.join(stored) or 'weight processing'} ({path}) overflows {dtype}, which ends at {ends:.6g}: "
        past = largest > ends
        cause += f"its largest number is {largest:.6g}" if past else "that is what weight processing makes of it"
        causes.append((not past, cause))
    if causes:
        more = f" (and {len(causes) - 1} more)" if len(causes) > 1 else ""
        raise CheckpointError(
            f"{origin}: {min(causes)[1]}{more}. Load with another dtype= ('bfloat16' and 'float32' reach 3e38), or "
            f"without weight processing (from_pretrained_no_processing). {GO_ON}"
        )
