"""Files of quantised weights, written number by number from the formats' descriptions; no code of the readers' is used.

Each packer makes random packed tensors of one matrix ``[out, in]``, and works out in float64 what they stand for.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

Packed = tuple[dict[str, np.ndarray], np.ndarray]
"""Tensors by the end of their names, and the weight in float64."""
RNG = np.random.default_rng


def words_of(numbers: list[int], bits: int) -> list[int]:
    """32-bit words, signed, of one long string of bits, lowest bit first."""
    string = sum(number << (bits * place) for place, number in enumerate(numbers))
    count = -(-len(numbers) * bits // 32)
    unsigned = [(string >> (32 * word)) & 0xFFFFFFFF for word in range(count)]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in unsigned]


def scales_of(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.uniform(0.005, 0.05, shape).astype(np.float16)


def grouped_weight(q: np.ndarray, zero: np.ndarray, scale: np.ndarray, group: list[int]) -> np.ndarray:
    """What numbers ``[out, in]`` stand for, with zeros and scales ``[out, group]`` and the group of each column."""
    weight = np.zeros(q.shape)
    for row in range(q.shape[0]):
        for column, g in enumerate(group):
            weight[row, column] = float(scale[row, g]) * (int(q[row, column]) - int(zero[row, g]))
    return weight


def gptq(
    out: int, inward: int, *, bits: int = 4, size: int = 16, version: int = 1, symmetric: bool = False,
    ordered: bool = True, seed: int = 0,
) -> Packed:  # fmt: skip
    rng, groups = RNG(seed), -(-inward // size) if size > 0 else 1
    q = rng.integers(0, 2**bits, (out, inward))
    zero = np.full((out, groups), 2 ** (bits - 1)) if symmetric else rng.integers(1, 2**bits, (out, groups))
    scale = scales_of(rng, groups, out)
    group = [i // size if size > 0 else 0 for i in range(inward)]
    group = group if ordered else [int(g) for g in rng.permutation(group)]
    weight = grouped_weight(q, zero, scale.T, group)
    stored = zero - (1 if version == 1 else 0)
    tensors = {
        ".qweight": np.array([words_of([int(n) for n in q[row]], bits) for row in range(out)], np.int32).T.copy(),
        ".qzeros": np.array([words_of([int(n) for n in stored[:, g]], bits) for g in range(groups)], np.int32),
        ".scales": scale,
        ".g_idx": np.array(group, np.int32),
    }
    return tensors, weight


def awq(out: int, inward: int, *, size: int = 16, seed: int = 0) -> Packed:
    rng, groups = RNG(seed), inward // size if size > 0 else 1
    q, zero = rng.integers(0, 16, (out, inward)), rng.integers(0, 16, (out, groups))
    scale = scales_of(rng, groups, out)
    per = inward // groups
    weight = np.zeros((out, inward))
    for row in range(out):
        for column in range(inward):
            g = column // per
            weight[row, column] = float(scale[g, row]) * (int(q[row, column]) - int(zero[row, g]))

    def pack(column: np.ndarray) -> list[int]:
        found: list[int] = []
        for start in range(0, out, 8):
            eight = [int(column[start + place]) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
            found += words_of(eight, 4)
        return found

    tensors = {
        ".qweight": np.array([pack(q[:, column]) for column in range(inward)], np.int32),
        ".qzeros": np.array([pack(zero[:, g]) for g in range(groups)], np.int32),
        ".scales": scale,
    }
    return tensors, weight


def int8(out: int, inward: int, *, seed: int = 0) -> Packed:
    rng = RNG(seed)
    q, largest = rng.integers(-127, 128, (out, inward)).astype(np.int8), rng.uniform(0.2, 1, out).astype(np.float32)
    weight = np.array([[float(largest[row]) * int(n) / 127 for n in q[row]] for row in range(out)])
    return {".weight": q, ".SCB": largest, ".weight_format": np.array(0, np.uint8)}, weight


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (0.0, 0.0052083, 0.6666667, 1.0, 0.3333333, 0.5, 0.1666667, 0.25)


def four_bits(
    out: int, inward: int, *, kind: str = "nf4", nested: bool = False, storage: str = "uint8", seed: int = 0
) -> Packed:
    rng, count, size, outer_size = RNG(seed), out * inward, 64, 4
    levels = np.array(NF4 if kind == "nf4" else (*FP4, *(-level for level in FP4)), np.float32)
    q, blocks = [int(n) for n in rng.integers(0, 16, count)], -(-count // size)
    octets = [16 * q[i] + (q[i + 1] if i + 1 < count else 0) for i in range(0, count, 2)]
    state: dict[str, Any] = {"quant_type": kind, "blocksize": size, "dtype": "bfloat16", "shape": [out, inward]}
    tensors: dict[str, np.ndarray] = {}
    if nested:
        table = np.linspace(-1, 1, 256).astype(np.float32)
        chosen = rng.integers(0, 256, blocks).astype(np.uint8)
        outer = rng.uniform(0.05, 0.1, -(-blocks // outer_size)).astype(np.float32)
        state |= {"nested_blocksize": outer_size, "nested_dtype": "float32", "nested_offset": 0.4}
        largest = [float(table[n]) * float(outer[i // outer_size]) + 0.4 for i, n in enumerate(chosen)]
        tensors = {".weight.absmax": chosen, ".weight.nested_absmax": outer, ".weight.nested_quant_map": table}
    else:
        absmax = rng.uniform(0.2, 1, blocks).astype(np.float32)
        largest, tensors = [float(n) for n in absmax], {".weight.absmax": absmax}
    weight = np.array([float(levels[n]) * largest[i // size] for i, n in enumerate(q)]).reshape(out, inward)
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors |= {
        ".weight": np.array(octets, np.uint8).view(storage)[:, None],
        ".weight.quant_map": levels,
        f".weight.quant_state.bitsandbytes__{kind}": text,
    }
    return tensors, weight


def floats8(rng: np.random.Generator, *shape: int, dtype: Any = ml_dtypes.float8_e4m3fn) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def fp8(
    out: int, inward: int, *, block: tuple[int, int] | None = (16, 8), scale: str = "_inv", rows: bool = False,
    powers: bool = False, dtype: Any = ml_dtypes.float8_e4m3fn, seed: int = 0,
) -> Packed:  # fmt: skip
    rng = RNG(seed)
    q = floats8(rng, out, inward, dtype=dtype)
    high, wide = block or ((1 if rows else out), inward)
    shape = (-(-out // high), -(-inward // wide))
    scales = rng.uniform(0.1, 0.3, shape).astype(np.float32)
    if powers:
        scales = (2.0 ** rng.integers(-4, -1, shape)).astype(ml_dtypes.float8_e8m0fnu)
    weight = np.zeros((out, inward))
    for row in range(out):
        for column in range(inward):
            weight[row, column] = float(q[row, column]) * float(scales[row // high, column // wide])
    stored = scales if block or rows else scales.reshape(())
    return {".weight": q, f".weight_scale{scale}": stored}, weight


def pack_quantized(
    out: int, inward: int, *, bits: int = 4, size: int = 8, symmetric: bool = True, ordered: bool = True, seed: int = 0
) -> Packed:
    rng, groups, middle = RNG(seed), inward // size if size > 0 else 1, 2 ** (bits - 1)
    q = rng.integers(-middle, middle, (out, inward))
    zero = np.zeros((out, groups), int) if symmetric else rng.integers(-middle, middle, (out, groups))
    scale = scales_of(rng, out, groups)
    group = [i // size if size > 0 else 0 for i in range(inward)]
    group = group if ordered else [int(g) for g in rng.permutation(group)]
    weight = grouped_weight(q, zero, scale, group)
    tensors = {
        ".weight_packed": np.array([words_of([int(n) + middle for n in q[row]], bits) for row in range(out)], np.int32),
        ".weight_scale": scale,
        ".weight_shape": np.array([out, inward], np.int64),
    }
    if not symmetric:
        columns = [words_of([int(n) + middle for n in zero[:, g]], bits) for g in range(groups)]
        tensors[".weight_zero_point"] = np.array(columns, np.int32).T.copy()
    if not ordered:
        tensors[".weight_g_idx"] = np.array(group, np.int32)
    return tensors, weight


def int_quantized(out: int, inward: int, *, symmetric: bool = True, seed: int = 0) -> Packed:
    rng = RNG(seed)
    q, scale = rng.integers(-128, 128, (out, inward)).astype(np.int8), scales_of(rng, out, 1) / 8
    zero = np.zeros((out, 1), np.int8) if symmetric else rng.integers(-20, 20, (out, 1)).astype(np.int8)
    weight = np.array([[float(scale[r, 0]) * (int(n) - int(zero[r, 0])) for n in q[r]] for r in range(out)])
    tensors = {".weight": q, ".weight_scale": scale, ".input_scale": np.ones(1, np.float32)}
    return tensors | ({} if symmetric else {".weight_zero_point": zero}), weight


def group_of(weights: dict[str, Any], form: str, **more: Any) -> dict[str, Any]:
    """A ``quantization_config`` of compressed-tensors with one group."""
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"],
        "quantization_status": "compressed", "kv_cache_scheme": None, "global_compression_ratio": 1.5, **more,
    }  # fmt: skip


def quantise(
    tensors: dict[str, np.ndarray], pack: Callable[..., Packed], keep: tuple[str, ...] = ("lm_head", "embed", "router")
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A checkpoint with every matrix replaced by packed numbers, and with the weights that they stand for."""
    packed, plain = {}, {}
    for place, (key, tensor) in enumerate(sorted(tensors.items())):
        if tensor.ndim != 2 or any(part in key for part in keep):
            packed[key] = plain[key] = tensor
            continue
        parts, weight = pack(*tensor.shape, seed=place)
        packed |= {key.removesuffix(".weight") + end: part for end, part in parts.items()}
        plain[key] = weight.astype(np.float32)
    return packed, plain


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 20}
LLAMA = SIZES | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 4,
    "max_position_embeddings": 16, "tie_word_embeddings": False,
}  # fmt: skip


def llama() -> dict[str, np.ndarray]:
    """Tensors of a small random Llama."""
    rng, width, inner = RNG(7), SIZES["hidden_size"], SIZES["intermediate_size"]
    shapes = {f"self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
    shapes |= {f"mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
    shapes |= {"mlp.down_proj.weight": (width, inner), "input_layernorm.weight": (width,)}
    shapes |= {"post_attention_layernorm.weight": (width,)}
    whole = {f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in shapes.items()}
    whole |= {"model.embed_tokens.weight": (20, width), "lm_head.weight": (20, width), "model.norm.weight": (width,)}
    return {name: rng.standard_normal(shape).astype(np.float32) * 0.3 for name, shape in whole.items()}


def write(directory: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({key: np.asarray(tensor, order="C") for key, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory
