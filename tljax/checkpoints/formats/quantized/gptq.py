"""GPTQ (Frantar et al. 2022), as AutoGPTQ and GPTQModel write it: ``w = (q - zero) * scale`` per group of inputs.

``qweight`` holds ``q`` packed along the inputs, ``qzeros`` the zero points packed along the outputs, ``g_idx`` the
group of each input; a group need not be a run of inputs, where columns were quantised in another order (``desc_act``).
Files of version 1 store each zero point less one. A symmetric file has the same zero point everywhere, the middle, so
the stored number itself says its version: what ``checkpoint_format`` says of it is sometimes wrong.
"""

import dataclasses
import functools

import numpy as np

from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.formats.quantized.bits import WORD, unpack
from tljax.checkpoints.formats.quantized.codes import Codes, place_of_rows
from tljax.checkpoints.formats.quantized.layout import SCALE_DTYPES, Layout, Packed, Quantization
from tljax.checkpoints.formats.quantized.scales import group_of_inputs

INERT = """
    method gptaq foem damp_percent damp_auto_increment static_groups true_sequential desc_act act_group_aware
    model_seqlen max_input_length dataset tokenizer batch_size use_cuda_fp16 use_exllama exllama_config disable_exllama
    cache_block_outputs backend
    module_name_preceding_first_block block_name_to_quantize model_name_or_path model_file_base_name quant_path
    is_marlin_format meta mse lm_head modules_in_block_to_quantize device parallel_packing pack_impl offload_to_disk
    offload_to_disk_path gc_mode wait_for_submodule_finalizers auto_forward_data_parallelism rotation_none
    hessian_chunk_size hessian_chunk_bytes hessian_use_bfloat16_staging vram_strategy vram_strategy_config
    quantizer autoround_version iters low_gpu_mem_usage nsamples seqlen enable_quanted_input data_type
"""
"""What says how the file was made or which kernel reads it."""
_WEIGHT, _ZEROS, _SCALES, _GROUPS = ".qweight", ".qzeros", ".scales", ".g_idx"


@dataclasses.dataclass(frozen=True)
class _Form:
    bits: int
    group_size: int
    symmetric: bool
    second: bool


def read(hf: HFConfig) -> Quantization:
    """Returns what a ``quantization_config`` of GPTQ says."""
    bits = hf("bits", 4)
    if bits not in (2, 3, 4, 8):
        raise hf.unsupported("bits", bits, "2, 3, 4, 8")
    form = hf("checkpoint_format", "gptq", aka=("format",))
    if form not in ("gptq", "gptq_v2"):
        raise hf.unsupported("checkpoint_format", form, "gptq, gptq_v2")
    hf.only(pack_dtype="int32", is_marlin_format=False)
    rules = hf("dynamic", {})
    if any(not rule.startswith("-") for rule in rules):
        raise hf.unsupported("dynamic", rules, "rules that leave modules out, which start with '-'")
    how = _Form(bits, hf("group_size", 128), hf("sym", True), form == "gptq_v2")
    if how.group_size != -1 and how.group_size < 1:
        raise hf.unsupported("group_size", how.group_size, "-1, or at least 1")
    layout = Layout(
        lead=_WEIGHT,
        weight=".weight",
        needed=(_ZEROS, _SCALES),
        optional=(_GROUPS,),
        shape=functools.partial(_shape, how=how),
        read=functools.partial(_read, how=how),
        codes=functools.partial(_codes, how=how),
    )
    return Quantization("gptq", (layout,), tuple(hf("modules_to_not_convert", [])))


def _shape(packed: Packed, how: _Form) -> tuple[int, int]:
    words, outward = packed.check(_WEIGHT, ("I32",), (None, None))
    inward = words * WORD // how.bits
    groups = 1 if how.group_size == -1 else -(-inward // how.group_size)
    if words * WORD % how.bits or outward * how.bits % WORD:
        raise packed.error(f"{words} words of {outward} numbers cannot hold numbers of {how.bits} bits")
    packed.check(_SCALES, SCALE_DTYPES, (groups, outward))
    packed.check(_ZEROS, ("I32",), (groups, outward * how.bits // WORD))
    if _GROUPS in packed:
        packed.check(_GROUPS, ("I32",), (inward,))
    return outward, inward


def _read(packed: Packed, how: _Form) -> np.ndarray:
    weight = unpack(packed[_WEIGHT], how.bits, 0).astype(np.float32)
    scales = packed[_SCALES].astype(np.float32)
    zeros = _zeros(packed, how)
    group = _group(packed, how, len(scales), weight.shape[0])
    for number, (zero, scale) in enumerate(zip(zeros, scales, strict=True)):
        inputs = np.flatnonzero(group == number)
        weight[inputs] = (weight[inputs] - zero) * scale
    return np.ascontiguousarray(weight.T)


def _codes(packed: Packed, how: _Form) -> Codes:
    middle, scales = 1 << (how.bits - 1), packed[_SCALES]
    numbers = (unpack(packed[_WEIGHT], how.bits, 0) - np.uint8(middle)).view(np.int8).T
    outward, inward = numbers.shape
    group = _group(packed, how, len(scales), inward).astype(np.int32)
    place = group[None] * np.int32(outward) + place_of_rows(numbers.shape)
    zero = (_zeros(packed, how) - middle).astype(np.int16)  # of a symmetric file all are 0
    zero = None if how.symmetric else zero
    return Codes(numbers, scales, place, 8 if how.bits == 8 else 4, zero)


def _group(packed: Packed, how: _Form, groups: int, inward: int) -> np.ndarray:
    """Returns the group of each input."""
    if _GROUPS in packed:
        return group_of_inputs(packed, _GROUPS, groups)
    return np.arange(inward) // (inward if how.group_size == -1 else how.group_size)


def _zeros(packed: Packed, how: _Form) -> np.ndarray:
    """Returns the zero points, ``[groups, out]`` float32."""
    stored = unpack(packed[_ZEROS], how.bits, 1).astype(np.float32)
    if not how.symmetric:
        return stored if how.second else stored + 1
    middle = 1 << (how.bits - 1)
    if not ((stored == middle).all() or (stored == middle - 1).all()):
        raise packed.error(
            f"quantization_config says sym=true, but its zero points are not all {middle - 1} (version 1) or {middle} "
            "(version 2); they run from "
            f'{int(stored.min())} to {int(stored.max())}. Set "sym": false there if that is what the file is'
        )
    return np.full_like(stored, middle)
