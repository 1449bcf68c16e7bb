"""Eight-bit floats (E4M3 or E5M2), ``w = q * scale``: a scale per block, as DeepSeek-V3 stores it, per output, or one.

The scale is stored as ``weight_scale_inv`` or ``weight_scale``, and multiplies in both cases. Scales that are powers
of two may be stored as bytes (E8M0). Experts in one tensor have a first axis more, and so have their scales.
"""

import functools

import numpy as np

from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.formats.quantized.codes import Codes
from tljax.checkpoints.formats.quantized.layout import SCALE_DTYPES, Layout, Packed, Quantization
from tljax.checkpoints.formats.quantized.scales import blocks_of, by_blocks, fits, places

INERT = """
    activation_scheme fmt scale_fmt dequantize activation_scale_ub modules_to_convert kv_cache_quant_method
    kv_cache_scheme exclude_modules
"""
UNUSED = (
    ".input_scale", ".activation_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale", ".prob_scale",
    ".k_zero_point", ".v_zero_point", ".input_zero_point", ".input_scale_ub", ".weight_scale_ub",
    "_activation_scale", "_input_scale",
)  # fmt: skip
"""Ends of the names of scales of activations and of caches, which are not quantised here."""
FLOATS = ("F8_E4M3", "F8_E5M2")
_BLOCK = (128, 128)
_SCALE = "_scale_inv"


def read(hf: HFConfig) -> Quantization:
    """Returns what a ``quantization_config`` of FP8 says."""
    sizes = hf("weight_block_size", list(_BLOCK))
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise hf.unsupported("weight_block_size", sizes, "two positive integers, or null")
    hf.only(expert_dtype="fp8")
    skipped = tuple(hf("modules_to_not_convert", [], aka=("ignored_layers",)))
    block = (sizes[0], sizes[1])
    layout = Layout(
        lead="",
        weight="",
        needed=(f"{_SCALE}|_scale",),
        dtypes=FLOATS,
        shape=functools.partial(_shape, block=block),
        read=functools.partial(_read, block=block),
        codes=functools.partial(_codes, block=block),
    )
    return Quantization("fp8", (layout,), skipped, UNUSED)


def _shape(packed: Packed, block: tuple[int, int]) -> tuple[int, ...]:
    shape, scale = packed.info("").shape, packed.info(_SCALE)
    if len(shape) not in (2, 3):
        raise packed.error(f"it is {list(shape)}: expected a matrix, or one for each expert")
    if not fits(shape, scale.shape, block):
        raise packed.error(
            f"it is {list(shape)} and its scale {list(scale.shape)}: expected one number, one for each of the "
            f"{shape[-2]} outputs, or {list(blocks_of(shape, block))} for blocks of {list(block)}"
        )
    packed.check(_SCALE, (*SCALE_DTYPES, "F8_E8M0", "U8"), (None,) * len(scale.shape))
    return shape


def _read(packed: Packed, block: tuple[int, int]) -> np.ndarray:
    return by_blocks(packed[""].astype(np.float32), _scale(packed), block)


def _codes(packed: Packed, block: tuple[int, int]) -> Codes:
    numbers, scale = packed[""], _scale(packed)
    return Codes(numbers, scale, places(numbers.shape, scale.shape, block))


def _scale(packed: Packed) -> np.ndarray:
    scale = packed[_SCALE]
    exponents = scale.dtype == np.uint8
    return np.ldexp(np.float32(1), scale.astype(np.int32) - 127) if exponents else scale.astype(np.float32)
