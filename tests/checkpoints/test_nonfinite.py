"""A NaN, an infinity or an overflow on load is an error that names the tensor, unless it is asked for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hf_models import rewrite
from safetensors.numpy import load_file, save_file

from tljax import HookedTransformer
from tljax.checkpoints import load_checkpoint
from tljax.checkpoints.finite import all_finite
from tljax.checkpoints.layout import flatten
from tljax.errors import CheckpointError

KEY = "transformer.h.1.mlp.c_fc.weight"


def with_number(number: float, key: str = KEY, dtype: Any = np.float32) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Puts ``number`` into a tensor at [2, 3]."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        tensors[key] = tensors[key].astype(dtype)
        tensors[key][2, 3] = number
        return tensors

    return change


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16], ids=lambda d: d.__name__)
def test_finite(dtype: Any) -> None:
    largest = np.finfo(dtype).max if dtype is not ml_dtypes.bfloat16 else ml_dtypes.finfo(dtype).max
    numbers = np.full((3, 100_003), largest, dtype)  # more than one chunk
    assert all_finite(numbers)
    assert all_finite(np.negative(numbers).T)
    assert all_finite(np.zeros((0, 4), dtype))
    assert all_finite(np.zeros((), dtype))
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        spoilt = numbers.copy()
        spoilt[2, -1] = bad
        assert not all_finite(spoilt)


@pytest.mark.parametrize(
    ("number", "dtype", "says"),
    [(np.nan, np.float32, "1 NaN"), (-np.inf, np.float16, "1 infinite"), (np.inf, ml_dtypes.bfloat16, "1 infinite")],
)
def test_stored_ones_are_named(number: float, dtype: Any, says: str, gpt2: Path, tmp_path: Path) -> None:
    spoilt = rewrite(gpt2, tmp_path, with_number(number, dtype=dtype))
    with pytest.raises(
        CheckpointError, match=rf"{KEY} holds {says} of 4096 numbers, the first at \[2, 3\].*allow_nonf"
    ):
        load_checkpoint(spoilt)
    loaded = load_checkpoint(spoilt, allow_nonfinite=True, first_n_layers=2)
    assert not np.isfinite(loaded.params["blocks"][1]["mlp"]["W_in"]).all()


def test_what_is_not_loaded_is_not_looked_at(gpt2: Path, tmp_path: Path) -> None:
    load_checkpoint(rewrite(gpt2, tmp_path, with_number(np.nan)), first_n_layers=1)


@pytest.mark.parametrize("processed", [True, False])
def test_an_overflow_is_named(processed: bool, gpt2: Path, tmp_path: Path) -> None:
    large = rewrite(gpt2, tmp_path, with_number(1e6))
    load = HookedTransformer.from_pretrained if processed else HookedTransformer.from_pretrained_no_processing
    message = (
        rf"{KEY} \(blocks.1.mlp.W_in\) overflows float16, which ends at 65504: its largest number is 1e\+06.*dtype="
    )
    with pytest.raises(CheckpointError, match=message):
        load(large, dtype="float16")
    load(large, dtype="bfloat16")
    assert np.isinf(load(large, dtype="float16", allow_nonfinite=True).params["blocks"][1]["mlp"]["W_in"]).any()


def test_float64_numbers_that_float32_does_not_hold(gpt2: Path, tmp_path: Path) -> None:
    large = rewrite(gpt2, tmp_path, with_number(-1e300, dtype=np.float64))
    with np.errstate(over="ignore"), pytest.raises(CheckpointError, match=r"overflows float32.* number is 1e\+300"):
        load_checkpoint(large)


def test_what_processing_makes_too_large_is_named(gpt2: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        tensors["transformer.h.0.ln_1.weight"][:] = 3e4
        tensors["transformer.h.0.attn.c_attn.weight"][:, 32:64] *= 1e3
        return tensors

    large = rewrite(gpt2, tmp_path, change)
    with pytest.raises(
        CheckpointError, match=r"\(blocks.0.attn.W_K\).*what weight processing makes of it.*no_processing"
    ):
        load_checkpoint(large, dtype="float16")
    HookedTransformer.from_pretrained_no_processing(large, dtype="float16")


def test_a_checkpoint_of_our_own(tmp_path: Path) -> None:
    HookedTransformer.from_pretrained("tljax-tiny").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(with_number(np.nan, "unembed.W_U")(tensors), tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())  # as of before there were checksums
    del config["tljax_checksum"], config["tljax_weights"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"unembed.W_U holds 1 NaN .* at \[2, 3\]"):
        HookedTransformer.from_pretrained_no_processing(tmp_path)
    assert HookedTransformer.from_pretrained_no_processing(tmp_path, allow_nonfinite=True).cfg.d_model == 64


def test_positions_that_are_computed_may_be_what_they_like(hf_checkpoint: Callable[[str], Path]) -> None:
    """XGLM's are not stored, and are not looked at."""
    assert "pos_embed.W_pos" in flatten(load_checkpoint(hf_checkpoint("xglm")).params)
