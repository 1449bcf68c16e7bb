"""Quantised checkpoints, written by packers of the tests' own, against the weights that they stand for."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import quantised_files as files
from hf_models import rewrite

from tljax import HookedTransformer
from tljax.checkpoints import load_checkpoint
from tljax.checkpoints.formats.quantized.settings import read_settings
from tljax.errors import CheckpointError, QuantizationError, UnsupportedModelError
from tljax.quantized_weight import QuantizedWeight

RAW = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
TOKENS = np.array([[1, 5, 2, 9, 3, 7], [4, 4, 0, 8, 6, 1]])


def gptq(**more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False} | more


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "GEMM"}
BNB8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
CASES: dict[str, tuple[dict[str, Any], Callable[..., files.Packed]]] = {
    "gptq": (gptq(), files.gptq),
    "gptq, version 2": (gptq(checkpoint_format="gptq_v2"), partial(files.gptq, version=2)),
    "gptq, another order": (gptq(desc_act=True), partial(files.gptq, ordered=False)),
    "gptq, two bits": (gptq(bits=2), partial(files.gptq, bits=2)),
    "gptq, three bits": (gptq(bits=3), partial(files.gptq, bits=3)),
    "gptq, eight bits, one group": (gptq(bits=8, group_size=-1), partial(files.gptq, bits=8, size=-1)),
    "gptq, symmetric": (gptq(sym=True), partial(files.gptq, symmetric=True)),
    "gptq, symmetric, says 1 and is 2": (gptq(sym=True), partial(files.gptq, symmetric=True, version=2)),
    "gptq, symmetric, says 2 and is 1": (
        gptq(sym=True, checkpoint_format="gptq_v2"), partial(files.gptq, symmetric=True)
    ),
    "awq": (AWQ, files.awq),
    "awq, one group": (AWQ | {"group_size": -1}, partial(files.awq, size=-1)),
    "int8 of bitsandbytes": (BNB8, files.int8),
    "nf4": (BNB4, files.four_bits),
    "nf4, double": (BNB4, partial(files.four_bits, nested=True)),
    "nf4, stored as bfloat16": (BNB4, partial(files.four_bits, storage="bfloat16")),
    "fp4, double": (BNB4 | {"bnb_4bit_quant_type": "fp4"}, partial(files.four_bits, kind="fp4", nested=True)),
    "fp8, blocks that do not divide": (FP8 | {"weight_block_size": [12, 20]}, partial(files.fp8, block=(12, 20))),
    "fp8, scales of powers of two": (FP8 | {"weight_block_size": [16, 8]}, partial(files.fp8, powers=True)),
    "fp8, one scale": (FP8 | {"weight_block_size": None}, partial(files.fp8, block=None, scale="")),
    "fp8, E5M2 per row": (FP8, partial(files.fp8, block=None, rows=True, dtype=ml_dtypes.float8_e5m2)),
    "fp8 of fbgemm": (
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        partial(files.fp8, block=None, rows=True, scale=""),
    ),
    "packed int4": (files.group_of(INT4, "pack-quantized"), files.pack_quantized),
    "packed int4, zero points, another order": (
        files.group_of(INT4 | {"symmetric": False}, "pack-quantized"),
        partial(files.pack_quantized, symmetric=False, ordered=False),
    ),
    "packed int8 per row": (
        files.group_of(INT8, "pack-quantized"), partial(files.pack_quantized, bits=8, size=0)
    ),
    "int8": (files.group_of(INT8, "int-quantized"), files.int_quantized),
    "int8, zero points": (
        files.group_of(INT8 | {"symmetric": False}, "int-quantized"), partial(files.int_quantized, symmetric=False)
    ),
    "float8 per row": (
        files.group_of(FLOAT8, "float-quantized"), partial(files.fp8, block=None, rows=True, scale="")
    ),
    "float8 in blocks": (
        files.group_of(FLOAT8 | {"strategy": "block", "block_structure": [16, 8]}, "float-quantized"),
        partial(files.fp8, scale=""),
    ),
}  # fmt: skip


def differences(one: Any, other: Any) -> float:
    """The largest difference between two trees of parameters."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(np.asarray(a, np.float64) - np.asarray(b)).max()) for a, b in pairs)


@pytest.mark.parametrize("name", CASES)
def test_weights_and_logits_are_those_the_packed_numbers_stand_for(name: str, tmp_path: Path) -> None:
    settings, pack = CASES[name]
    packed, plain = files.quantise(files.llama(), pack)
    config = files.LLAMA | {"quantization_config": settings}
    got = HookedTransformer.from_pretrained_no_processing(files.write(tmp_path / "packed", packed, config))
    expected = HookedTransformer.from_pretrained_no_processing(files.write(tmp_path / "plain", plain, files.LLAMA))
    assert differences(got.params, expected.params) < 1e-6
    np.testing.assert_allclose(got(TOKENS), expected(TOKENS), rtol=0, atol=1e-5)
    assert got.cfg == expected.cfg.replace(model_name=got.cfg.model_name)


@pytest.mark.parametrize("name", CASES)
def test_weights_may_stay_packed(name: str, tmp_path: Path) -> None:
    """What stays packed stands for the very floats that are loaded otherwise, and is saved and loaded as it is."""
    settings, pack = CASES[name]
    source = files.write(
        tmp_path / "packed", files.quantise(files.llama(), pack)[0], files.LLAMA | {"quantization_config": settings}
    )
    if "order" in name:
        with pytest.raises(UnsupportedModelError, match=r"q_proj.weight has scales that belong to no runs"):
            load_checkpoint(source, dequantize=False, **RAW)
        return
    floats = HookedTransformer.from_pretrained_no_processing(source)
    kept = HookedTransformer.from_pretrained_no_processing(source, dequantize=False)
    held = [leaf for block in kept.params["blocks"] for part in (block["attn"], block["mlp"]) for leaf in part.values()]
    bits = [leaf.bits for leaf in held if isinstance(leaf, QuantizedWeight)]
    assert bits == bits[:1] * 7 * 2
    assert differences(kept.dequantize().params, floats.params) == 0
    assert kept.nbytes < floats.nbytes * (0.4 if bits[0] == 8 else 0.3)
    kept.save_pretrained(tmp_path / "ours")
    again = HookedTransformer.from_pretrained_no_processing(tmp_path / "ours")
    assert jax.tree.structure(again.params) == jax.tree.structure(kept.params)
    assert differences(again.params, kept.params) == 0
    assert not HookedTransformer.from_pretrained_no_processing(tmp_path / "ours", dequantize=True).is_quantized
    if name in ("gptq", "nf4", "int8 of bitsandbytes"):
        np.testing.assert_allclose(kept(TOKENS), floats(TOKENS), rtol=0, atol=1e-5)


def test_weights_are_rounded_while_they_load(tmp_path: Path) -> None:
    plain = files.write(tmp_path, files.quantise(files.llama(), files.gptq)[1], files.LLAMA)
    options: Any = {"quantize": "int4", "group_size": 16}
    loaded = HookedTransformer.from_pretrained(plain, **options)
    expected = HookedTransformer.from_pretrained(plain).quantize("int4", group_size=16)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(expected.params)
    assert differences(loaded.params, expected.params) == 0


def test_weights_in_blocks_of_a_mixture_with_latent_attention(
    hf_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """DeepSeek-V3's layout: experts one by one, in blocks that divide no side."""
    made: dict[str, Any] = {}

    def pack(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        packed, made["plain"] = files.quantise(
            tensors, partial(files.fp8, block=(10, 7)), keep=("lm_head", "embed", "mlp.gate.weight")
        )
        return packed

    settings = {"quantization_config": FP8 | {"weight_block_size": [10, 7]}}
    source = hf_checkpoint("deepseek_v3_groups")
    got = load_checkpoint(rewrite(source, tmp_path / "packed", pack, lambda cfg: cfg | settings), **RAW)
    expected = load_checkpoint(rewrite(source, tmp_path / "plain", lambda _: made["plain"]), **RAW)
    assert any("experts.3.up_proj" in key for key in made["plain"])
    assert differences(got.params, expected.params) < 1e-6


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_experts_in_one_tensor(method: str, hf_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    plain: dict[str, np.ndarray] = {}
    fused = ("gate_up_proj", "down_proj")
    values = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

    def eight(key: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
        parts, weights = zip(*(files.fp8(*each.shape, seed=seed) for seed, each in enumerate(tensor)), strict=True)
        plain[key] = np.stack(weights).astype(np.float32)
        return {
            key: np.stack([part[".weight"] for part in parts]),
            f"{key}_scale_inv": np.stack([part[".weight_scale_inv"] for part in parts]),
        }

    def four(key: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
        experts, inward, out = tensor.shape
        rng = np.random.default_rng(len(key))
        codes = rng.integers(0, 16, (experts, out, inward))
        scales = rng.integers(120, 126, (experts, out, inward // 32)).astype(np.uint8)
        plain[key] = np.zeros(tensor.shape, np.float32)
        for e, o, i in np.ndindex(codes.shape):
            sign = -1 if codes[e, o, i] >= 8 else 1
            plain[key][e, i, o] = sign * values[codes[e, o, i] % 8] * 2.0 ** (int(scales[e, o, i // 32]) - 127)
        octets = (codes[..., 0::2] + 16 * codes[..., 1::2]).astype(np.uint8)
        return {f"{key}_blocks": octets.reshape(experts, out, inward // 32, 16), f"{key}_scales": scales}

    def pack(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        packed = {}
        for key, tensor in tensors.items():
            plain[key] = tensor
            packed |= (eight if method == "fp8" else four)(key, tensor) if key.endswith(fused) else {key: tensor}
        return packed

    settings = {"quantization_config": {"quant_method": method}}
    settings["quantization_config"] |= {"weight_block_size": [16, 8]} if method == "fp8" else {}
    source = hf_checkpoint("gpt_oss_gqa")
    packed = rewrite(source, tmp_path / "packed", pack, lambda cfg: cfg | settings)
    got = HookedTransformer.from_pretrained_no_processing(packed)
    expected = HookedTransformer.from_pretrained_no_processing(rewrite(source, tmp_path / "plain", lambda _: plain))
    assert differences(got.params, expected.params) < 1e-6
    np.testing.assert_allclose(got(TOKENS), expected(TOKENS), rtol=0, atol=1e-5)
    kept = HookedTransformer.from_pretrained_no_processing(packed, dequantize=False)
    assert kept.is_quantized
    assert differences(kept.dequantize().params, got.params) == 0


def write(directory: Path, settings: dict[str, Any], change: Callable[[dict[str, np.ndarray]], Any] = dict) -> Path:
    """A checkpoint in GPTQ's layout, with its tensors changed."""
    packed, _ = files.quantise(files.llama(), files.gptq)
    return files.write(directory, change(packed), files.LLAMA | {"quantization_config": settings})


def test_settings_may_be_where_older_files_have_them(tmp_path: Path) -> None:
    settings, pack = CASES["packed int4"]
    packed, plain = files.quantise(files.llama(), pack)
    got = load_checkpoint(files.write(tmp_path / "a", packed, files.LLAMA | {"compression_config": settings}), **RAW)
    assert (
        differences(got.params, load_checkpoint(files.write(tmp_path / "b", plain, files.LLAMA), **RAW).params) < 1e-6
    )


def test_biases_of_zeros_that_a_quantiser_added_are_left_out_and_others_are_not(tmp_path: Path) -> None:
    bias = {"model.layers.0.mlp.up_proj.bias": np.zeros(64, np.float16)}
    load_checkpoint(write(tmp_path / "zeros", gptq(), lambda tensors: tensors | bias), **RAW)
    bias["model.layers.0.mlp.up_proj.bias"][3] = 0.5
    with pytest.raises(CheckpointError, match=r"unexpected: model.layers.0.mlp.up_proj.bias"):
        load_checkpoint(write(tmp_path / "ones", gptq(), lambda tensors: tensors | bias), **RAW)


def test_the_dtype_is_the_callers_and_a_saved_copy_is_plain(tmp_path: Path) -> None:
    source = write(tmp_path / "packed", gptq())
    model = HookedTransformer.from_pretrained_no_processing(source, dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {"bfloat16"}
    model = HookedTransformer.from_pretrained_no_processing(source)
    model.save_hf(tmp_path / "plain")
    again = HookedTransformer.from_pretrained_no_processing(tmp_path / "plain")
    assert differences(again.params, model.params) == 0
    with pytest.raises(QuantizationError, match=r"is to stay packed, and weight processing \(fold_ln, "):
        HookedTransformer.from_pretrained(source, dequantize=False)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        del tensors["model.layers.0.mlp.up_proj.scales"]
        tensors["model.layers.1.mlp.up_proj.qzeros"] = tensors["model.layers.1.mlp.up_proj.qzeros"][:-1]
        return tensors

    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(write(tmp_path / "damaged", gptq(), damage), **RAW)
    assert "layers.0.mlp.up_proj.qweight is stored without model.layers.0.mlp.up_proj.scales" in str(caught.value)
    assert "layers.1.mlp.up_proj.qzeros is [1, 8], expected [2, 8]" in str(caught.value)


def test_pickles_are_read_too(tmp_path: Path) -> None:
    import torch

    source = write(tmp_path / "packed", gptq())
    packed, _ = files.quantise(files.llama(), files.gptq)
    (tmp_path / "pickle").mkdir()
    torch.save({key: torch.from_numpy(part) for key, part in packed.items()}, tmp_path / "pickle/pytorch_model.bin")
    (tmp_path / "pickle/config.json").write_bytes((source / "config.json").read_bytes())
    assert differences(load_checkpoint(tmp_path / "pickle", **RAW).params, load_checkpoint(source, **RAW).params) == 0


def test_an_adapter_is_merged_into_what_a_quantised_base_stands_for(tmp_path: Path) -> None:
    packed, plain = files.quantise(files.llama(), files.four_bits)
    quantised = files.write(tmp_path / "packed", packed, files.LLAMA | {"quantization_config": BNB4})
    start = "base_model.model.model.layers.1.mlp.up_proj.lora_"
    parts = {f"{start}A.weight": np.ones((2, 32), np.float32), f"{start}B.weight": np.full((64, 2), 0.1, np.float32)}
    adapter = files.write(tmp_path / "adapter", parts, {})
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(quantised)}))
    merged = load_checkpoint(adapter, **RAW)
    expected = load_checkpoint(files.write(tmp_path / "plain", plain, files.LLAMA), adapter=adapter, **RAW)
    assert differences(merged.params, expected.params) < 1e-6
    assert differences(merged.params, load_checkpoint(quantised, **RAW).params) > 0.1


PUBLISHED: tuple[dict[str, Any], ...] = (
    {
        "batch_size": 1, "bits": 4, "block_name_to_quantize": "model.layers", "damp_percent": 0.1,
        "dataset": "wikitext2", "desc_act": False, "disable_exllama": True, "group_size": 128, "model_seqlen": 4096,
        "module_name_preceding_first_block": ["model.embed_tokens"], "pad_token_id": None, "quant_method": "gptq",
        "sym": True, "true_sequential": True, "use_cuda_fp16": True,
    },
    {
        "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "float16",
        "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0, "load_in_4bit": True, "load_in_8bit": False, "quant_method": "bitsandbytes",
    },
    {
        "backend": "autoawq", "bits": 4, "do_fuse": False, "exllama_config": None, "fuse_max_seq_len": None,
        "group_size": 128, "modules_to_fuse": None, "modules_to_not_convert": None, "quant_method": "awq",
        "version": "gemm", "zero_point": True,
    },
    {
        "config_groups": {"group_0": {
            "input_activations": {"dynamic": False, "num_bits": 8, "strategy": "tensor", "type": "float"},
            "output_activations": None, "targets": ["Linear"],
            "weights": {"dynamic": False, "num_bits": 8, "strategy": "tensor", "type": "float"},
        }},
        "format": "naive-quantized", "ignored_layers": ["lm_head", "model.embed_tokens"], "kv_cache_scheme": None,
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
    },
)  # fmt: skip
"""Settings as they lie on the hub."""


@pytest.mark.parametrize("settings", PUBLISHED, ids=lambda settings: settings["quant_method"])
def test_published_settings_are_known_whole(settings: dict[str, Any]) -> None:
    said = read_settings({"quantization_config": settings}, "config.json")
    assert said is not None
    assert said.method == settings["quant_method"]
