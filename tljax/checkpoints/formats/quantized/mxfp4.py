"""MXFP4, as gpt-oss stores its experts: four-bit floats that share a power of two (Open Compute Project 2023)."""

import numpy as np

from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.formats.quantized.codes import Codes
from tljax.checkpoints.formats.quantized.layout import Layout, Packed, Quantization

INERT = "dequantize"
_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK = 32
"""How many numbers share a scale; 16 bytes hold them, two each, the lower half of a byte first."""
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_POSITIVE, *(-value for value in _POSITIVE)], np.float32)
_BIAS = 127


def read(hf: HFConfig) -> Quantization:
    """Returns what a ``quantization_config`` of MXFP4 says.

    Blocks are ``[expert, out, block, 16]`` and scales ``[expert, out, block]``, both bytes; the unpacked tensor is
    ``[expert, in, out]``, the layout that gpt-oss multiplies by. Every MXFP4 number is exact in bfloat16.
    """
    layout = Layout(
        lead=_BLOCKS, weight="", needed=(_SCALES,), dtypes=("U8",), shape=_shape, read=_read, codes=_codes, dtype="BF16"
    )
    return Quantization("mxfp4", (layout,), tuple(hf("modules_to_not_convert", [])))


def _shape(packed: Packed) -> tuple[int, int, int]:
    blocks, scales = packed.info(_BLOCKS).shape, packed.info(_SCALES).shape
    if len(blocks) != 4 or blocks[-1] != _BLOCK // 2 or blocks[:-1] != scales:
        raise packed.error(
            f"its blocks are {list(blocks)} and its scales {list(scales)}, expected [expert, out, block, "
            f"{_BLOCK // 2}] and [expert, out, block]"
        )
    packed.check(_SCALES, ("U8",), scales)
    return blocks[0], blocks[2] * _BLOCK, blocks[1]


def _read(packed: Packed) -> np.ndarray:
    blocks, scales = packed[_BLOCKS], packed[_SCALES]
    weight = np.empty(_shape(packed), "bfloat16")
    for expert in range(len(weight)):  # one at a time: float32 is eight times what is stored
        weight[expert] = unpack(blocks[expert], scales[expert]).T
    return weight


def _codes(packed: Packed) -> Codes:
    blocks, scales = packed[_BLOCKS], packed[_SCALES]
    numbers = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:2], -1)
    powers = np.ldexp(np.float32(1), scales.astype(np.int32) - _BIAS).astype("bfloat16")
    place = np.repeat(np.arange(scales.size, dtype=np.int32).reshape(scales.shape), _BLOCK, -1)
    return Codes(numbers.swapaxes(1, 2), powers, place.swapaxes(1, 2), 4, None, _VALUES)


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
