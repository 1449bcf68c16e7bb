"""AWQ (Lin et al. 2023), in AutoAWQ's "gemm" form: ``w = (q - zero) * scale`` per group of inputs.

``qweight`` is ``[in, out / 8]``: a word holds eight outputs of four bits, in an order of its own.
"""

import functools

import numpy as np

from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.formats.quantized.bits import unpack
from tljax.checkpoints.formats.quantized.codes import Codes, place_of_rows
from tljax.checkpoints.formats.quantized.layout import SCALE_DTYPES, Layout, Packed, Quantization

INERT = """
    backend do_fuse fuse_max_seq_len modules_to_fuse exllama_config damp_percent dataset tokenizer desc_act sym
    true_sequential model_seqlen use_cuda_fp16 cache_block_outputs block_name_to_quantize
    module_name_preceding_first_block batch_size pad_token_id max_input_length act_group_aware meta
    modules_in_block_to_quantize use_exllama
"""
_BITS, _PER_WORD = 4, 8
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in a word each of eight outputs lies: outputs 0, 2, 4, 6 in the lower half, 1, 3, 5, 7 in the upper one."""
_WEIGHT, _ZEROS, _SCALES = ".qweight", ".qzeros", ".scales"


def read(hf: HFConfig) -> Quantization:
    """Returns what a ``quantization_config`` of AWQ says."""
    version = str(hf("version", "gemm", aka=("format", "checkpoint_format"))).lower()
    if version != "gemm":
        raise hf.unsupported("version", version, "gemm")
    bits, size = hf("bits", _BITS, aka=("w_bit",)), hf("group_size", 128, aka=("q_group_size",))
    if bits != _BITS:
        raise hf.unsupported("bits", bits, "4")
    if size != -1 and size < 1:
        raise hf.unsupported("group_size", size, "-1, or at least 1")
    hf.only(zero_point=True)
    layout = Layout(
        lead=_WEIGHT,
        weight=".weight",
        needed=(_ZEROS, _SCALES),
        shape=functools.partial(_shape, size=size),
        read=_read,
        codes=_codes,
    )
    return Quantization("awq", (layout,), tuple(hf("modules_to_not_convert", [])))


def _shape(packed: Packed, size: int) -> tuple[int, int]:
    inward, words = packed.check(_WEIGHT, ("I32",), (None, None))
    if size != -1 and inward % size:
        raise packed.error(f"its {inward} inputs are not a multiple of group_size={size}")
    groups, outward = 1 if size == -1 else inward // size, words * _PER_WORD
    packed.check(_SCALES, SCALE_DTYPES, (groups, outward))
    packed.check(_ZEROS, ("I32",), (groups, words))
    return outward, inward


def _read(packed: Packed) -> np.ndarray:
    scales = packed[_SCALES].astype(np.float32)
    weight = _outputs(packed[_WEIGHT]).astype(np.float32)
    grouped = weight.reshape(len(scales), -1, weight.shape[1])
    grouped -= _outputs(packed[_ZEROS]).astype(np.float32)[:, None]
    grouped *= scales[:, None]
    return np.ascontiguousarray(weight.T)


def _codes(packed: Packed) -> Codes:
    middle, scales = 1 << (_BITS - 1), packed[_SCALES]
    numbers = (_outputs(packed[_WEIGHT]) - np.uint8(middle)).view(np.int8).T
    outward, inward = numbers.shape
    group = np.arange(inward, dtype=np.int32) // np.int32(inward // len(scales))
    place = group[None] * np.int32(outward) + place_of_rows(numbers.shape)
    return Codes(numbers, scales, place, _BITS, _outputs(packed[_ZEROS]).astype(np.int16) - np.int16(middle))


def _outputs(words: np.ndarray) -> np.ndarray:
    """Unpacks ``[…, out / 8]`` words to ``[…, out]`` numbers in the order of outputs."""
    numbers = unpack(words, _BITS, 1)
    return numbers.reshape(len(words), -1, _PER_WORD)[..., _PLACES].reshape(numbers.shape)
