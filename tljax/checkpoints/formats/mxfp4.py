"""MXFP4 weights, four bits per number, unpacked to the bfloat16 they stand for (Open Compute Project 2023)."""

from typing import cast

import numpy as np

from tljax.checkpoints.files.reader import Tensors
from tljax.checkpoints.rows import TensorInfo
from tljax.checkpoints.slices import Index, PartTensors, reads_parts
from tljax.errors import CheckpointError

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK = 32
"""How many numbers share a scale; 16 bytes hold them, two each, the lower half of a byte first."""
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_POSITIVE, *(-value for value in _POSITIVE)], np.float32)
_BIAS = 127


class Unpacked:
    """Tensors of a checkpoint, with each pair ``x_blocks``, ``x_scales`` unpacked to one tensor ``x``.

    Blocks are ``[expert, out, block, 16]`` and scales ``[expert, out, block]``, both bytes; the unpacked tensor is
    ``[expert, in, out]``, the layout that gpt-oss multiplies by. Every MXFP4 number is exact in bfloat16.
    """

    def __init__(self, packed: Tensors) -> None:
        self._packed = packed
        names = [key.removesuffix(BLOCKS) for key in packed.info if key.endswith(BLOCKS)]
        self._names = {name for name in names if name + SCALES in packed.info}
        parts = {name + end for name in self._names for end in (BLOCKS, SCALES)}
        self.info = {key: info for key, info in packed.info.items() if key not in parts}
        self.info |= {name: TensorInfo("BF16", self._shape(name)) for name in sorted(self._names)}

    def _shape(self, name: str) -> tuple[int, ...]:
        blocks, scales = self._packed.info[name + BLOCKS].shape, self._packed.info[name + SCALES].shape
        if len(blocks) != 4 or blocks[-1] != BLOCK // 2 or blocks[:-1] != scales:
            raise CheckpointError(
                f"{name}{BLOCKS} is {list(blocks)} and {name}{SCALES} is {list(scales)}: expected [expert, out, block, "
                f"{BLOCK // 2}] and [expert, out, block]. The checkpoint is damaged, or packed in another way."
            )
        return blocks[0], blocks[2] * BLOCK, blocks[1]

    def read(self, key: str) -> np.ndarray:
        """Returns tensor ``key`` in its stored dtype, or bfloat16 if it was packed."""
        if key not in self._names:
            return self._packed.read(key)
        blocks, scales = self._packed.read(key + BLOCKS), self._packed.read(key + SCALES)
        experts, inward, outward = self._shape(key)
        unpacked = np.empty((experts, inward, outward), "bfloat16")
        for expert in range(experts):  # one at a time: float32 is eight times what is stored
            unpacked[expert] = unpack(blocks[expert], scales[expert]).T
        return unpacked

    def reads_parts(self, key: str) -> bool:
        """Whether a part of tensor ``key`` can be read alone: not of one that is packed, which is unpacked whole."""
        return key not in self._names and reads_parts(self._packed, [key])

    def read_part(self, key: str, index: Index) -> np.ndarray:
        """Returns ``tensor[index]`` in its stored dtype."""
        return cast(PartTensors, self._packed).read_part(key, index)


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Unpacks four-bit numbers in blocks, and multiplies each block by its power of two.

    Args:
        blocks: ``[out, block, 16]`` bytes.
        scales: ``[out, block]`` bytes, exponents of two plus 127.

    Returns:
        ``[out, in]`` float32.
    """
    halves = np.stack([_VALUES[blocks & 15], _VALUES[blocks >> 4]], axis=-1)
    exponents = scales.astype(np.int32)[..., None, None] - _BIAS
    return np.ldexp(halves, exponents).reshape(blocks.shape[0], -1)


def unpacked(tensors: Tensors) -> Tensors:
    """Returns ``tensors`` with those that are packed as MXFP4 unpacked."""
    packs = any(key.endswith(BLOCKS) and info.dtype == "U8" for key, info in tensors.info.items())
    return Unpacked(tensors) if packs else tensors
