"""bitsandbytes: eight bits (Dettmers et al. 2022, LLM.int8()), and four (Dettmers et al. 2023, QLoRA).

Eight bits: ``w = q * SCB / 127``, one ``SCB`` per output, the largest magnitude of its row. Four bits: the weight's
numbers in a row, two in a byte, the first one in its upper half; each is a place in ``quant_map`` (nf4 or fp4),
multiplied by the ``absmax`` of its block. With double quantisation ``absmax`` itself is a byte, a place in
``nested_quant_map``, multiplied by the ``nested_absmax`` of its block of blocks, plus an offset.
"""

import json
import math
from typing import Any

import numpy as np

from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.formats.quantized.codes import Codes, place_of_rows
from tljax.checkpoints.formats.quantized.layout import Layout, Packed, Quantization
from tljax.safetensors_files import parse_json

INERT = """
    llm_int8_threshold llm_int8_has_fp16_weight llm_int8_enable_fp32_cpu_offload bnb_4bit_compute_dtype
    bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_quant_storage load_in_4bit load_in_8bit _load_in_4bit
    _load_in_8bit
"""
"""How activations are treated and, since each weight says it again, how weights are stored."""
_WEIGHT = ".weight"
_SCB, _FORMAT = ".SCB", ".weight_format"
_ABSMAX, _MAP = ".weight.absmax", ".weight.quant_map"
_NESTED, _NESTED_MAP = ".weight.nested_absmax", ".weight.nested_quant_map"
_STATE = ".weight.quant_state.bitsandbytes__nf4"
_STATE_FP4 = ".weight.quant_state.bitsandbytes__fp4"
_STORAGE = ("U8", "I8", "BF16", "F16", "F32")
"""Dtypes that four-bit numbers may be stored as; the bytes count."""
_ROWS = 0
"""``weight_format`` of a weight that is stored row by row, not in tiles for a kernel."""


def read(hf: HFConfig) -> Quantization:
    """Returns what a ``quantization_config`` of bitsandbytes says."""
    eight = Layout(
        lead=_WEIGHT,
        weight=_WEIGHT,
        needed=(_SCB,),
        optional=(_FORMAT,),
        dtypes=("I8",),
        shape=_shape_of_eight,
        read=_read_eight,
        codes=_codes_of_eight,
    )
    four = Layout(
        lead=_WEIGHT,
        weight=_WEIGHT,
        needed=(_ABSMAX, _MAP, f"{_STATE}|{_STATE_FP4}"),
        optional=(_NESTED, _NESTED_MAP),
        dtypes=("U8",),
        marks=(_ABSMAX,),
        shape=_shape_of_four,
        read=_read_four,
        codes=_codes_of_four,
    )
    return Quantization("bitsandbytes", (four, eight), tuple(hf("llm_int8_skip_modules", [])))


def _shape_of_eight(packed: Packed) -> tuple[int, ...]:
    outward, inward = packed.check(_WEIGHT, ("I8",), (None, None))
    packed.check(_SCB, ("F32",), (outward,))
    if _FORMAT in packed and (packed[_FORMAT] != _ROWS).any():
        raise packed.error(
            f"weight_format is {packed[_FORMAT].tolist()}: it is stored in tiles for one kind of GPU. Save it with "
            "bitsandbytes 0.45 or later, which stores rows (0)"
        )
    return outward, inward


def _read_eight(packed: Packed) -> np.ndarray:
    weight = packed[_WEIGHT].astype(np.float32)
    weight *= (packed[_SCB].astype(np.float32) / 127)[:, None]
    return weight


def _codes_of_eight(packed: Packed) -> Codes:
    numbers = packed[_WEIGHT]
    return Codes(numbers, packed[_SCB].astype(np.float32) / 127, place_of_rows(numbers.shape))


def _state(packed: Packed) -> dict[str, Any]:
    """Returns the JSON object that is stored beside a weight of four bits."""
    try:
        state = parse_json(packed[_STATE].tobytes())
        sizes = [*state["shape"], state["blocksize"]]
        if _NESTED in packed:
            sizes.append(state["nested_blocksize"])
            float(state["nested_offset"])
    except (ValueError, KeyError, TypeError) as error:
        raise packed.error(f"its quant_state is not what bitsandbytes writes ({error})") from error
    if not all(type(size) is int and size > 0 for size in sizes):
        raise packed.error(f"its quant_state has a size that is not a positive integer: {json.dumps(state)}")
    return state


def _shape_of_four(packed: Packed) -> tuple[int, ...]:
    state = _state(packed)
    shape = tuple(state["shape"])
    count, blocks = math.prod(shape), -(-math.prod(shape) // state["blocksize"])
    packed.check(_WEIGHT, _STORAGE, (None,) * len(packed.info(_WEIGHT).shape))
    width = {"F16": 2, "BF16": 2, "F32": 4}.get(packed.info(_WEIGHT).dtype, 1)
    held = math.prod(packed.info(_WEIGHT).shape) * width
    if not -(-count // 2) <= held < -(-count // 2) + width:
        raise packed.error(f"its {held} bytes cannot be the {count} numbers of four bits that quant_state tells of")
    packed.check(_MAP, ("F32",), (16,))
    if (_NESTED in packed) != (_NESTED_MAP in packed):
        raise packed.error("nested_absmax and nested_quant_map go together, and one of them is missing")
    if _NESTED in packed:
        packed.check(_ABSMAX, ("U8",), (blocks,))
        packed.check(_NESTED, ("F32",), (-(-blocks // state["nested_blocksize"]),))
        packed.check(_NESTED_MAP, ("F32",), (256,))
    else:
        packed.check(_ABSMAX, ("F32",), (blocks,))
    return shape


def _read_four(packed: Packed) -> np.ndarray:
    state = _state(packed)
    count, size = math.prod(state["shape"]), state["blocksize"]
    numbers, absmax = _numbers_of_four(packed, state)
    weight = packed[_MAP][numbers]
    whole = count // size * size
    weight[:whole].reshape(-1, size)[:] *= absmax[: whole // size, None]
    weight[whole:] *= absmax[-1]
    return weight.reshape(state["shape"])


def _numbers_of_four(packed: Packed, state: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of four bits in a row, and the largest magnitude of each block."""
    octets = np.ascontiguousarray(packed[_WEIGHT]).reshape(-1).view(np.uint8)
    numbers = np.stack([octets >> 4, octets & 15], axis=-1).reshape(-1)[: math.prod(state["shape"])]
    absmax = packed[_ABSMAX]
    if _NESTED in packed:
        outer = np.repeat(packed[_NESTED], state["nested_blocksize"])[: len(absmax)]
        absmax = packed[_NESTED_MAP][absmax] * outer + np.float32(state["nested_offset"])
    return numbers, absmax


def _codes_of_four(packed: Packed) -> Codes:
    state = _state(packed)
    numbers, absmax = _numbers_of_four(packed, state)
    place = np.arange(len(numbers), dtype=np.int32) // np.int32(state["blocksize"])
    shape = state["shape"]
    return Codes(numbers.reshape(shape), absmax, place.reshape(shape), 4, None, packed[_MAP])
