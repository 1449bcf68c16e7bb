"""Quantised checkpoints that are incomplete, mislabelled, or of a kind that tljax does not read."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import quantised_files as files
from table import Case

from tljax import HookedTransformer
from tljax.errors import CheckpointError, InputError, QuantizationError, UnsupportedModelError
from tljax.train import TrainConfig, train

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
BNB = {"quant_method": "bitsandbytes", "load_in_8bit": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 8]}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8}
PACKED = files.group_of(INT4, "pack-quantized")
PROMPTS = np.arange(64, dtype=np.int32).reshape(4, 16)
UP = "model.layers.0.mlp.up_proj"
Change = Callable[[dict[str, np.ndarray]], Any]


def load(
    pack: Callable[..., files.Packed], settings: Any, change: Change = dict, config: Any = files.LLAMA, **options: Any
) -> HookedTransformer:
    """A small Llama that is packed so, with its tensors changed and these settings in its config.json."""
    packed, _ = files.quantise(files.llama(), pack)
    with tempfile.TemporaryDirectory() as directory:
        extra = {} if settings is None else {"quantization_config": settings}
        files.write(Path(directory), change(packed), config | extra)
        return HookedTransformer.from_pretrained_no_processing(directory, **options)


def without(end: str) -> Change:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != UP + end}


def put(end: str, value: Any) -> Change:
    """One tensor replaced by a value, or by what a function makes of it."""
    return lambda tensors: tensors | {UP + end: value(tensors[UP + end]) if callable(value) else value}


def case(
    name: str, error: type[Exception], *says: str, pack: Any = files.gptq, settings: Any = GPTQ, **more: Any
) -> Case:
    return Case(name, lambda w: load(pack, settings, **more), error, *says)


GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2}
CASES = (
    case("a method that is misspelt", UnsupportedModelError, "Did you mean 'gptq'", "full-precision",
         settings=GPTQ | {"quant_method": "gptqq"}),
    case("MLX's settings", UnsupportedModelError, "whose quant_method", "it reads gptq, awq",
         settings={"group_size": 64, "bits": 4}),
    case("no settings", UnsupportedModelError, "qweight, as gptq and awq do", "has no quantization_config",
         "quantize_config.json", settings=None),
    case("settings left out by hand", UnsupportedModelError, "has no quantization_config",
         ignore_config="quantization_config"),
    case("an unknown setting", UnsupportedModelError, "rotation_seed=3", "quantization_config.rotation_seed",
         settings=GPTQ | {"rotation_seed": 3}),
    case("five bits", UnsupportedModelError, "bits=5", "2, 3, 4, 8", settings=GPTQ | {"bits": 5}),
    case("bits in words", CheckpointError, "bits='4'", "an integer", settings=GPTQ | {"bits": "4"}),
    case("Marlin's tiles", UnsupportedModelError, "checkpoint_format='marlin'",
         settings=GPTQ | {"checkpoint_format": "marlin"}),
    case("bits that differ by module", UnsupportedModelError, "dynamic=", "leave modules out",
         settings=GPTQ | {"dynamic": {"+:.*up.*": {"bits": 8}}}),
    case("four bits read as eight", CheckpointError, "expected [1, 64]", "Nothing was loaded",
         settings=GPTQ | {"bits": 8}),
    case("another group size", CheckpointError, f"{UP}.scales is [2, 64], expected [4, 64]", "correct that",
         settings=GPTQ | {"group_size": 8}),
    case("GPTQ called AWQ", CheckpointError, "'awq'", "not a multiple of group_size=16", settings=AWQ),
    case("AWQ called GPTQ", CheckpointError, "'gptq'", "expected", pack=files.awq),
    case("scales lost", CheckpointError, f"{UP}.qweight is stored without {UP}.scales", change=without(".scales")),
    case("scales of another dtype", CheckpointError, "is I32, expected F16 or BF16 or F32",
         change=put(".scales", lambda scales: scales.astype(np.int32))),
    case("a group that does not exist", CheckpointError, "puts an input into group 7", "groups 0 to 1",
         change=put(".g_idx", np.full(32, 7, np.int32))),
    case("called symmetric and is not", CheckpointError, "says sym=true", 'Set "sym": false',
         settings=GPTQ | {"sym": True}),
    case("quantised against its own list", CheckpointError, "'up_proj' is among the modules that are not",
         settings=GPTQ | {"modules_to_not_convert": ["up_proj"]}),
    case("a weight stored twice", CheckpointError, f"stores {UP}.weight twice",
         change=put(".weight", np.zeros((64, 32), np.float32))),
    case("AWQ for GEMV", UnsupportedModelError, "version='gemv'", "gemm", pack=files.awq,
         settings=AWQ | {"version": "gemv"}),
    case("AWQ's groups do not divide", CheckpointError, "32 inputs are not a multiple of group_size=24",
         pack=files.awq, settings=AWQ | {"group_size": 24}),
    case("int8 in a kernel's tiles", CheckpointError, "weight_format is 2", "bitsandbytes 0.45", pack=files.int8,
         settings=BNB, change=put(".weight_format", np.array(2, np.uint8))),
    case("int8 without SCB", CheckpointError, "stored without", f"{UP}.SCB", pack=files.int8, settings=BNB,
         change=without(".SCB")),
    case("a damaged quant_state", CheckpointError, "quant_state is not what bitsandbytes writes", pack=files.four_bits,
         settings=BNB, change=put(".weight.quant_state.bitsandbytes__nf4", lambda text: text[:-5])),
    case("half of the bytes", CheckpointError, "cannot be the 2048 numbers", pack=files.four_bits, settings=BNB,
         change=put(".weight", lambda octets: octets[::2])),
    case("FP8 without scales", CheckpointError, "stored without", "_scale_inv", pack=files.fp8, settings=FP8,
         change=without(".weight_scale_inv")),
    case("FP8 in other blocks", CheckpointError, "expected one number", "for blocks of [16, 16]", pack=files.fp8,
         settings=FP8 | {"weight_block_size": [16, 16]}),
    case("FP8 called MXFP4", UnsupportedModelError, "as fp8 do", "says quant_method 'mxfp4'", pack=files.fp8,
         settings={"quant_method": "mxfp4"}),
    case("compressed-tensors' groups do not divide", CheckpointError, "not a multiple of group_size=24",
         pack=files.pack_quantized, settings=files.group_of(INT4 | {"group_size": 24}, "pack-quantized")),
    case("three bits of compressed-tensors", UnsupportedModelError, "num_bits=3", pack=files.pack_quantized,
         settings=files.group_of(INT4 | {"num_bits": 3}, "pack-quantized")),
    case("rotated weights", UnsupportedModelError, "transform_config", pack=files.pack_quantized,
         settings=PACKED | {"transform_config": {"config_groups": {"a": 1}}}),
    case("two dense formats", UnsupportedModelError, "format='marlin-24'", "pack-quantized", pack=files.pack_quantized,
         settings=files.group_of(INT4, "marlin-24")),
    case("two settings", CheckpointError, "contradicts itself", "quantization_config and compression_config differ",
         config=files.LLAMA | {"compression_config": PACKED}),
    case("GPT-2, whose matrices lie the other way", UnsupportedModelError, "inputs first", "full-precision",
         config=GPT2),
    case("packed weights, folded", QuantizationError, "(fold_ln)", "no_processing(..., dequantize=False)",
         dequantize=False, fold_ln=True),
    case("packed weights, rounded", QuantizationError, "stay packed", "dequantize=True", dequantize=False,
         quantize="int8"),
    Case("three bits", lambda w: w.tiny.quantize("int3"), QuantizationError, "'int3'", "int8"),
    Case("a number of bits", lambda w: w.tiny.quantize(4), InputError, "bits"),
    Case("groups that do not divide", lambda w: w.tiny.quantize("int4", group_size=24), QuantizationError,
         "group_size=24", "divisor of 64"),
    Case("groups of nothing", lambda w: w.tiny.quantize("int4", group_size=0), QuantizationError, "group_size=0"),
    Case("groups of floats", lambda w: HookedTransformer.from_pretrained("tljax-tiny", group_size=32),
         QuantizationError, 'quantize="int4"'),
    Case("quantised twice", lambda w: w.tiny.quantize("int8").quantize("int4"), QuantizationError, "quantised already",
         "second error"),
    Case("processing of rounded weights", lambda w: w.tiny.quantize("int8").process_weights(fold_ln=True),
         QuantizationError, "Weight processing", "model.dequantize()"),
    Case("rounded weights for Hugging Face", lambda w: w.tiny.quantize("int8").save_hf("nowhere"), QuantizationError,
         "save_hf", "model.dequantize()"),
    Case("rounded weights are trained", lambda w: train(w.tiny.quantize("int8"), PROMPTS, TrainConfig(steps=1)),
         QuantizationError, "Training", "model.dequantize()"),
    Case(
        "a pattern in the list",
        lambda w: load(
            partial(files.gptq), GPTQ | {"modules_to_not_convert": ["model.layers.*.mlp.gate", "lm_head"]}
        ).cfg.n_layers,
        equals=2,
    ),
)  # fmt: skip
