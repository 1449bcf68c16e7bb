"""Experts of four bits a number, against transformers' own unpacking."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hf_models import rewrite
from safetensors.numpy import load_file

from tljax import HookedTransformer
from tljax.checkpoints import load_checkpoint
from tljax.checkpoints.formats.quantized.mxfp4 import unpack
from tljax.errors import CheckpointError, UnsupportedModelError
from tljax.quantized_weight import QuantizedWeight

RAW = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
PACKING = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
EXPERTS, WIDTH = 6, 32


def packed(rng: np.random.Generator, out: int) -> tuple[np.ndarray, np.ndarray]:
    blocks = rng.integers(0, 256, (EXPERTS, out, WIDTH // 32, 16), dtype=np.uint8)
    return blocks, rng.integers(120, 126, (EXPERTS, out, WIDTH // 32), dtype=np.uint8)


def pack(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every expert's matrix replaced by random numbers of four bits."""
    rng, kept = np.random.default_rng(0), {}
    for key, tensor in tensors.items():
        if key.endswith(("gate_up_proj", "down_proj")):
            kept[f"{key}_blocks"], kept[f"{key}_scales"] = packed(rng, tensor.shape[2])
        else:
            kept[key] = tensor
    return kept


@pytest.fixture
def checkpoint(hf_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return rewrite(
        hf_checkpoint("gpt_oss_gqa"), tmp_path / "packed", pack, lambda cfg: cfg | {"quantization_config": PACKING}
    )


def test_every_pair_of_bytes_is_what_transformers_makes_of_it() -> None:
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = packed(np.random.default_rng(1), 8)
    blocks[0, :, 0] = np.arange(128, dtype=np.uint8).reshape(8, 16)
    blocks[1, :, 0] = np.arange(128, 256, dtype=np.uint8).reshape(8, 16)
    expected = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales)).float().numpy()
    got = np.stack([unpack(*parts) for parts in zip(blocks, scales, strict=True)])
    np.testing.assert_array_equal(got.swapaxes(1, 2), expected)


def test_a_packed_checkpoint_is_loaded(checkpoint: Path) -> None:
    loaded = load_checkpoint(checkpoint, **RAW)
    stored, key = load_file(checkpoint / "model.safetensors"), "model.layers.0.mlp.experts.gate_up_proj"
    both = unpack(stored[f"{key}_blocks"][3], stored[f"{key}_scales"][3])  # gate and input, neuron by neuron
    experts = loaded.params["blocks"][0]["mlp"]["experts"]
    np.testing.assert_array_equal(np.asarray(experts["W_gate"])[3], both[0::2].T)
    np.testing.assert_array_equal(np.asarray(experts["W_in"])[3], both[1::2].T)


def test_experts_stay_packed_on_request(checkpoint: Path) -> None:
    floats = HookedTransformer.from_pretrained_no_processing(checkpoint)
    kept = HookedTransformer.from_pretrained_no_processing(checkpoint, dequantize=False)
    for name, expected in floats.params["blocks"][1]["mlp"]["experts"].items():
        held = kept.params["blocks"][1]["mlp"]["experts"][name]
        assert isinstance(held, QuantizedWeight) == name.startswith("W_")
        if isinstance(held, QuantizedWeight):
            np.testing.assert_array_equal(held.dequantized(), expected)
            np.testing.assert_array_equal(held[2], expected[2])
            assert held.nbytes < expected.nbytes / 6.9
            assert held.scale.dtype == "bfloat16"
    tokens = np.array([[1, 5, 2, 9, 3, 7]])
    np.testing.assert_allclose(kept(tokens), floats(tokens), rtol=0, atol=1e-5)


def test_other_packings_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    def fp8(cfg: dict[str, object]) -> dict[str, object]:
        return cfg | {"quantization_config": {"quant_method": "fp8"}}

    other = rewrite(checkpoint, tmp_path / "other", config=fp8)
    with pytest.raises(UnsupportedModelError, match="full-precision original"):
        load_checkpoint(other, **RAW)


def test_blocks_that_do_not_fit_their_scales(checkpoint: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {key: tensor[:, :-1] if key.endswith("_scales") else tensor for key, tensor in tensors.items()}

    with pytest.raises(CheckpointError, match="damaged, or packed in another way"):
        load_checkpoint(rewrite(checkpoint, tmp_path / "damaged", damage), **RAW)


def test_a_lost_scale_is_missed_by_name(checkpoint: Path, tmp_path: Path) -> None:
    def lose(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        del tensors["model.layers.1.mlp.experts.down_proj_scales"]
        return tensors

    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.down_proj"):
        load_checkpoint(rewrite(checkpoint, tmp_path / "lost", lose), **RAW)


def test_the_config_is_read_whole(checkpoint: Path) -> None:
    assert json.loads((checkpoint / "config.json").read_text())["quantization_config"] == PACKING
    assert load_checkpoint(checkpoint, **RAW).cfg.num_experts == EXPERTS
