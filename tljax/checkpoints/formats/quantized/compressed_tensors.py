"""compressed-tensors (llm-compressor, vLLM): ``w = (q - zero) * scale``, with ``q`` packed, in bytes or in FP8.

"pack-quantized": signed numbers of four or eight bits, stored plus ``2 ** (bits - 1)`` and packed along the inputs;
zero points likewise, packed along the outputs. "int-quantized": int8. "float-quantized": FP8. Scales are one number,
one per output, per group of inputs (whose groups ``weight_g_idx`` may name one by one) or per block.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.formats.quantized import fp8
from tljax.checkpoints.formats.quantized.bits import n_words, unpack
from tljax.checkpoints.formats.quantized.codes import Codes, place_of_rows
from tljax.checkpoints.formats.quantized.layout import SCALE_DTYPES, Layout, Packed, Quantization
from tljax.checkpoints.formats.quantized.scales import blocks_of, by_blocks, by_groups, group_of_inputs, places

INERT = """
    quantization_status global_compression_ratio version sparsity_config kv_cache_scheme run_compressed
    config_groups transform_config
"""
_FORMATS = {"pack-quantized": "int", "int-quantized": "int", "float-quantized": "float", "naive-quantized": ""}
"""Format → the type of its weights; empty: any."""
_STRATEGIES = ("tensor", "channel", "group", "block")
_PACKED, _SHAPE = ".weight_packed", ".weight_shape"
_WEIGHT, _SCALE, _ZERO, _GROUPS = ".weight", ".weight_scale", ".weight_zero_point", ".weight_g_idx"


@dataclasses.dataclass(frozen=True)
class _Form:
    bits: int
    symmetric: bool
    strategy: str
    group_size: int
    block: tuple[int, int]

    def scale(self, packed: Packed, shape: tuple[int, int]) -> tuple[int, int] | None:
        """Returns the shape of the scales, ``[out, groups]`` or that of the blocks; ``None`` for one number.

        Raises:
            CheckpointError: the groups do not divide the inputs.
        """
        if self.strategy == "block":
            rows, columns = blocks_of(shape, self.block)
            return rows, columns
        if self.strategy != "group":
            return None if self.strategy == "tensor" else (shape[0], 1)
        if shape[1] % self.group_size:
            raise packed.error(f"its {shape[1]} inputs are not a multiple of group_size={self.group_size}")
        return shape[0], shape[1] // self.group_size


def read(hf: HFConfig) -> Quantization:
    """Returns what a ``quantization_config`` of compressed-tensors says."""
    if hf("transform_config", {}):
        raise hf.unsupported("transform_config", hf("transform_config"), "none: weights are rotated there")
    if (sparsity := hf("sparsity_config", {})) and sparsity.get("format", "dense") != "dense":
        raise hf.unsupported("sparsity_config", sparsity, "format dense, or none")
    groups = hf("config_groups", {})
    if not groups or not all(isinstance(group, Mapping) and group.get("weights") for group in groups.values()):
        raise hf.unsupported("config_groups", groups, "groups with weights, each an object")
    forms = {group.get("format") or hf("format", None) for group in groups.values()}
    form = forms.pop()
    if forms or form not in _FORMATS:
        raise hf.unsupported("format", [form, *forms] if forms else form, f"{', '.join(_FORMATS)}; one for all groups")
    weights = [_form(hf, group["weights"], form) for group in groups.values()]
    if any(other != weights[0] for other in weights):
        raise hf.unsupported("config_groups", groups, "groups that store their weights alike")
    how = weights[0]
    layout = _packed(how) if form == "pack-quantized" else _plain(how)
    return Quantization("compressed-tensors", (layout,), tuple(hf("ignore", [], aka=("ignored_layers",))), fp8.UNUSED)


def _form(hf: HFConfig, weights: Mapping[str, Any], form: str) -> _Form:
    """Returns how the weights of one group are stored."""
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    if kind not in ("int", "float") or _FORMATS[form] not in ("", kind):
        raise hf.unsupported("weights type", kind, f"{_FORMATS[form] or 'int, float'} in {form}")
    known = (4, 8) if kind == "int" else (8,)
    if bits not in known:
        raise hf.unsupported("num_bits", bits, f"{', '.join(map(str, known))} for {kind}")
    size, block = weights.get("group_size"), weights.get("block_structure") or (128, 128)
    strategy = weights.get("strategy") or ("group" if size and size > 0 else "channel" if size == -1 else "tensor")
    if strategy not in _STRATEGIES or (form == "pack-quantized" and strategy == "block"):
        raise hf.unsupported("strategy", strategy, f"{', '.join(_STRATEGIES)}; no block in pack-quantized")
    if strategy == "group" and not (type(size) is int and size > 0):
        raise hf.unsupported("group_size", size, "at least 1 with strategy group")
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)):
        raise hf.unsupported("block_structure", block, "two positive integers")
    symmetric = bool(weights.get("symmetric", True))
    if strategy == "block" and not symmetric:
        raise hf.unsupported("symmetric", False, "true with strategy block")
    return _Form(bits, symmetric, strategy, int(size) if size and strategy == "group" else 0, (block[0], block[1]))


def _packed(how: _Form) -> Layout:
    return Layout(
        lead=_PACKED,
        weight=_WEIGHT,
        needed=(_SHAPE, _SCALE, *(() if how.symmetric else (_ZERO,))),
        optional=(_GROUPS, *((_ZERO,) if how.symmetric else ())),
        shape=functools.partial(_shape_of_packed, how=how),
        read=functools.partial(_read_packed, how=how),
        codes=functools.partial(_codes_of_packed, how=how),
    )


def _shape_of_packed(packed: Packed, how: _Form) -> tuple[int, int]:
    packed.check(_SHAPE, ("I64", "I32"), (2,))
    outward, inward = (int(size) for size in packed[_SHAPE])
    packed.check(_PACKED, ("I32",), (outward, n_words(inward, how.bits)))
    scale = _check_scale(packed, how, (outward, inward), SCALE_DTYPES)
    if not how.symmetric:
        packed.check(_ZERO, ("I32",), (n_words(outward, how.bits), 1 if scale is None else scale[1]))
    elif _ZERO in packed:
        packed.check(_ZERO, ("I8",), packed.info(_SCALE).shape)
    if _GROUPS in packed:
        packed.check(_GROUPS, ("I32", "I64"), (inward,))
    return outward, inward


def _check_scale(packed: Packed, how: _Form, shape: tuple[int, int], dtypes: tuple[str, ...]) -> tuple[int, int] | None:
    scale, found = how.scale(packed, shape), packed.info(_SCALE).shape
    if scale is None and found in ((), (1,), (1, 1)):
        packed.check(_SCALE, dtypes, found)
    else:
        rows = scale is not None and how.strategy == "channel" and found == scale[:1]
        packed.check(_SCALE, dtypes, found if rows else scale or (1,))
    return scale


def _read_packed(packed: Packed, how: _Form) -> np.ndarray:
    outward, inward = (int(size) for size in packed[_SHAPE])
    weight = unpack(packed[_PACKED], how.bits, 1)[:, :inward].astype(np.float32)
    scale = packed[_SCALE].astype(np.float32)
    zero = np.full_like(scale, 1 << (how.bits - 1))
    if not how.symmetric:
        zero = unpack(packed[_ZERO], how.bits, 0)[:outward].astype(np.float32)
    elif _ZERO in packed:
        zero += packed[_ZERO]
    return by_groups(weight, scale, zero, _order(packed, how, scale.shape))


def _order(packed: Packed, how: _Form, scale: tuple[int, ...]) -> np.ndarray | None:
    """Returns the group of each input; ``None``: groups are equal runs of inputs."""
    if _GROUPS in packed and how.strategy == "group" and packed[_GROUPS].min() >= 0:  # -1: no order of its own
        return group_of_inputs(packed, _GROUPS, scale[-1])
    return None


def _codes_of_packed(packed: Packed, how: _Form) -> Codes:
    outward, inward = (int(size) for size in packed[_SHAPE])
    middle, scale = 1 << (how.bits - 1), packed[_SCALE]
    numbers = (unpack(packed[_PACKED], how.bits, 1)[:, :inward] - np.uint8(middle)).view(np.int8)
    zero = None
    if not how.symmetric:
        zero = unpack(packed[_ZERO], how.bits, 0)[:outward].astype(np.int16) - np.int16(middle)
    elif _ZERO in packed and packed[_ZERO].any():
        zero = packed[_ZERO].astype(np.int16)
    return Codes(numbers, scale, _places(numbers.shape, scale, _order(packed, how, scale.shape)), how.bits, zero)


def _places(shape: tuple[int, ...], scale: np.ndarray, group: np.ndarray | None = None) -> np.ndarray:
    """Returns the place of each number's scale, for the scales that ``by_groups`` takes."""
    if scale.size == 1:
        return np.zeros((1, 1), np.int32)
    groups = scale.size // shape[0]
    group = np.arange(shape[1], dtype=np.int32) // np.int32(shape[1] // groups) if group is None else group
    return place_of_rows(shape) * np.int32(groups) + group.astype(np.int32)[None]


def _plain(how: _Form) -> Layout:
    return Layout(
        lead=_WEIGHT,
        weight=_WEIGHT,
        needed=(_SCALE, *(() if how.symmetric else (_ZERO,))),
        optional=(_ZERO,) if how.symmetric else (),
        dtypes=("I8", *fp8.FLOATS),
        shape=functools.partial(_shape_of_plain, how=how),
        read=functools.partial(_read_plain, how=how),
        codes=functools.partial(_codes_of_plain, how=how),
    )


def _shape_of_plain(packed: Packed, how: _Form) -> tuple[int, int]:
    outward, inward = packed.check(_WEIGHT, ("I8", *fp8.FLOATS), (None, None))
    _check_scale(packed, how, (outward, inward), SCALE_DTYPES)
    if _ZERO in packed:
        packed.check(_ZERO, ("I8", *fp8.FLOATS, *SCALE_DTYPES), packed.info(_SCALE).shape)
    return outward, inward


def _read_plain(packed: Packed, how: _Form) -> np.ndarray:
    weight, scale = packed[_WEIGHT].astype(np.float32), packed[_SCALE].astype(np.float32)
    if how.strategy == "block":
        return by_blocks(weight, scale, how.block)
    return by_groups(weight, scale, packed[_ZERO].astype(np.float32) if _ZERO in packed else None)


def _codes_of_plain(packed: Packed, how: _Form) -> Codes:
    numbers, scale = packed[_WEIGHT], packed[_SCALE]
    if how.strategy == "block":
        return Codes(numbers, scale, places(numbers.shape, scale.shape, how.block))
    zero = packed[_ZERO] if _ZERO in packed and packed[_ZERO].any() else None
    return Codes(numbers, scale, _places(numbers.shape, scale), zero=None if zero is None else zero.astype(np.float32))
