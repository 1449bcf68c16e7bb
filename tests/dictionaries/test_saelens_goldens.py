"""Dictionaries that SAELens saved give SAELens's numbers; skipped where its files are not beside the checkout."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tljax.dictionaries import Dictionary, fold_activation_norm, fold_W_dec_norm
from tljax.errors import DictionaryError

FOLDER = Path(__file__).parents[3] / "shared" / "goldens" / "dictionaries" / "saelens"


def cases(group: str) -> dict[str, dict[str, Any]]:
    path = FOLDER / group / "cases.json"
    return json.loads(path.read_text()) if path.is_file() else {"none": {}}


def values(path: Path, case: dict[str, Any]) -> dict[str, np.ndarray]:
    stored = {name: array.astype(np.float64) for name, array in load_file(path / "io.safetensors").items()}
    return stored | {name: stored[kept] for name, kept in case.get("bit_equal", {}).items() if kept in stored}


def assert_close(got: Any, right: np.ndarray, tolerance: float) -> None:
    got = np.asarray(got, np.float64)
    assert got.shape == right.shape
    assert np.abs(got - right).max() <= tolerance * np.abs(right).max()


needs_files = pytest.mark.skipif(not FOLDER.is_dir(), reason="shared/goldens/dictionaries is not here")


@needs_files
@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in ("inference", "old_configs") for name in cases(group)]
)
def test_released(group: str, name: str, tmp_path: Path) -> None:
    path, case = FOLDER / group / name, cases(group)[name]
    if "refused" in case:
        with pytest.raises(DictionaryError, match="scaling_factor"):
            Dictionary.load(path)
        return
    dictionary, right = Dictionary.load(path), values(path, case)
    tolerance = 1e-2 if dictionary.dtype == jnp.bfloat16 else 1e-5
    x = jnp.asarray(right["x"], jnp.float32)
    features = dictionary.encode(x)
    assert_close(features, right["encode"], tolerance)
    assert_close(dictionary.decode(features, x), right["decode"], tolerance)
    assert_close(dictionary.forward(x), right["forward"], tolerance)
    if "f_any" in right:
        assert_close(dictionary.decode(jnp.asarray(right["f_any"], jnp.float32), x), right["decode_f_any"], tolerance)
    if "folded.encode" in right:
        folded = fold_W_dec_norm(dictionary)
        assert_close(folded.encode(x), right["folded.encode"], tolerance)
        assert_close(folded.forward(x), right["folded.forward"], tolerance)
    if "scaled.encode" in right:
        assert_close(fold_activation_norm(dictionary, 1.7).encode(x), right["scaled.encode"], tolerance)
    dictionary.save(tmp_path)
    again = Dictionary.load(tmp_path)
    assert all(np.array_equal(again.params[name], array) for name, array in dictionary.params.items())
    assert again.cfg.computation == dictionary.cfg.computation
    if group == "inference":
        assert again.cfg == dictionary.cfg
        assert json.loads((tmp_path / "cfg.json").read_text()) == json.loads((path / "cfg.json").read_text())


@needs_files
@pytest.mark.parametrize("name", cases("training_checkpoints"))
def test_training_checkpoint(name: str, tmp_path: Path) -> None:
    path = FOLDER / "training_checkpoints" / name
    right = values(path, {})
    x = jnp.asarray(right["x"], jnp.float32)
    if name == "jumprelu_log_threshold":
        assert_close(Dictionary.load(path / "checkpoint").encode(x), right["TrainingSAE.encode"], 1e-5)
        return
    for folder in ("inference", "checkpoint"):  # a checkpoint is read as what SAELens saves for inference
        dictionary = Dictionary.load(path / folder)
        key = f"SAE_of_{folder}" if f"SAE_of_{folder}.encode" in right else "SAE_of_inference"
        assert_close(dictionary.encode(x), right[f"{key}.encode"], 1e-5)
        assert_close(dictionary.forward(x), right[f"{key}.decode"], 1e-5)
    training = Dictionary.load(path / "checkpoint", training=True)
    assert_close(training.encode(x), right["training_class.encode"], 1e-5)
    assert_close(training.forward(x), right["training_class.decode"], 1e-5)
    training.save(tmp_path)
    assert Dictionary.load(tmp_path, training=True).cfg == training.cfg
    assert_close(Dictionary.load(tmp_path).encode(x), right["SAE_of_inference.encode"], 1e-5)
