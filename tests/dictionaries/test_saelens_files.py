"""SAELens's files of every version, written on the spot, against formulas in float64; and what is written back."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tljax.dictionaries import SAE, Dictionary, DictionaryConfig, Tap
from tljax.errors import DictionaryError

D, F = 6, 10


def weights(d: int = D, f: int = F, out: int | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    out, draw = out or d, np.random.default_rng(seed)
    shapes = {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, out), "b_dec": (out,)}
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def x(d: int = D) -> np.ndarray:
    return np.random.default_rng(9).normal(size=(4, 5, d)).astype(np.float32)


def write(path: Path, arrays: dict[str, np.ndarray], **cfg: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "cfg.json").write_text(json.dumps(cfg))
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path / "sae_weights.safetensors")
    return path


def relu_features(w: dict[str, np.ndarray], x: np.ndarray, subtracts: bool = True) -> np.ndarray:
    w = {name: array.astype(np.float64) for name, array in w.items()}
    return np.maximum((x - subtracts * w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)


def assert_equal(got: Any, right: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), right, rtol=0, atol=tolerance * np.abs(right).max())


V6 = {"architecture": "standard", "dtype": "float32", "metadata": {"sae_lens_version": "6.5.0"}}
SIZES = {"d_in": D, "d_sae": F}
VINTAGES = {
    "6": V6 | SIZES,
    "6 without version": {"architecture": "standard", "dtype": "float32", "metadata": {}} | SIZES,
    "5": {"architecture": "standard", "hook_name": "blocks.1.hook_resid_pre", "activation_fn_str": "relu"} | SIZES,
    "1, with its runner": {"hook_point": "blocks.1.hook_resid_pre", "lr": 4e-4, "expansion_factor": 4, "seed": 1}
    | SIZES,
    "torch's name of the dtype": {"dtype": "torch.float32", "normalize_activations": None} | SIZES,
    "normalisation as a flag": {"normalize_activations": False, "hook_point_head_index": None} | SIZES,
}


@pytest.mark.parametrize("cfg", VINTAGES.values(), ids=VINTAGES)
@pytest.mark.parametrize("width", [F, D], ids=["wide", "square"])
def test_every_version_computes_the_same(cfg: dict[str, Any], width: int, tmp_path: Path) -> None:
    w = weights(f=width)
    sae = SAE.load(write(tmp_path, w, **cfg | {"d_sae": width}))
    right = relu_features(w, x())
    assert_equal(sae.encode(x()), right)
    assert_equal(sae(x()).reconstruction, right @ w["W_dec"] + w["b_dec"])
    assert sae.cfg.tap.reads == ("blocks.1.hook_resid_pre" if "hook_name" in cfg or "hook_point" in cfg else None)


def test_a_matrix_either_way_round(tmp_path: Path) -> None:
    w = weights()
    turned = w | {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T}
    assert_equal(Dictionary.load(write(tmp_path, turned, **V6 | SIZES)).encode(x()), relu_features(w, x()))


def test_top_k_named_by_its_activation_function(tmp_path: Path) -> None:
    w = weights()
    cfg = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}} | SIZES
    features = np.asarray(Dictionary.load(write(tmp_path, w, **cfg)).encode(x()))
    dense = relu_features(w, x())
    kept = np.where(dense >= np.sort(dense, axis=-1)[..., [-2]], dense, 0)
    assert_equal(features, kept)
    assert (features > 0).sum(axis=-1).max() == 2


def test_batch_top_k_checkpoint_is_a_jumprelu_dictionary_with_folded_norms(tmp_path: Path) -> None:
    w = weights()
    cfg = V6 | SIZES | {"architecture": "batchtopk", "k": 3, "rescale_acts_by_decoder_norm": True}
    path = write(tmp_path, w | {"topk_threshold": np.asarray(1.5)}, **cfg)
    norms = np.linalg.norm(w["W_dec"].astype(np.float64), axis=1)
    rescaled = relu_features(w, x()) * norms
    released = Dictionary.load(path)
    assert released.cfg.architecture == "jumprelu"
    assert_equal(released.encode(x()), np.where(rescaled > 1.5, rescaled, 0))
    training = Dictionary.load(path, training=True)
    assert (training.cfg.architecture, training.cfg.k) == ("batchtopk", 3)
    flat = np.sort(rescaled.reshape(-1))[-3 * 20]
    assert_equal(training.encode(x()), np.where(rescaled >= flat, rescaled, 0))
    with pytest.raises(DictionaryError, match="topk_threshold"):
        Dictionary.load(write(tmp_path / "none", w, **cfg))


def test_heads_are_merged_and_dtype_is_the_config_s(tmp_path: Path) -> None:
    w = weights()
    sae = Dictionary.load(write(tmp_path, w, **SIZES, hook_name="blocks.0.attn.hook_z", dtype="bfloat16"))
    heads = x().reshape(4, 5, 2, 3)
    assert sae.dtype == jnp.bfloat16
    assert sae(heads).reconstruction.shape == heads.shape
    assert_equal(sae.encode(heads), relu_features(w, x()), 2e-2)
    stored = {name: array.astype(ml_dtypes.bfloat16) for name, array in w.items()}
    wide = Dictionary.load(write(tmp_path / "stored", stored, **V6 | SIZES))
    assert wide.dtype == jnp.float32
    assert_equal(
        wide.encode(x()), relu_features({name: array.astype(np.float32) for name, array in stored.items()}, x())
    )
    assert Dictionary.load(tmp_path, dtype="float32").dtype == jnp.float32


def dictionaries() -> dict[str, Dictionary]:
    draw = np.random.default_rng(3)
    w, plain, tap = weights(), SIZES, Tap(reads="blocks.1.hook_resid_pre", model_name="gpt2", processing=())
    threshold = {"threshold": draw.uniform(0.1, 1, F).astype(np.float32)}
    gated = {name: draw.normal(size=F).astype(np.float32) for name in ("b_gate", "b_mag", "r_mag")}
    skip = {"W_skip": draw.normal(size=(4, D)).astype(np.float32)}
    mlp = {
        "transcoder": True,
        "apply_b_dec_to_input": False,
        "d_out": 4,
        "tap": tap.replace(writes="blocks.1.hook_mlp_out"),
    }
    only = {name: w[name] for name in ("W_dec", "b_dec")}

    def made(params: dict[str, np.ndarray], **fields: Any) -> Dictionary:
        return Dictionary(params, DictionaryConfig(**{"tap": tap} | plain | fields))

    return {
        "standard": made(w, metadata=(("context_size", "128"), ("dataset_path", '"x/y"'), ("l0", "3.5"))),
        "processed": made(w, tap=tap.replace(processing=("center_writing_weights",))),
        "merged heads": made(w, tap=tap.replace(reads="blocks.1.attn.hook_z", merged_heads=True, head=None)),
        "gated": made({name: w[name] for name in ("W_enc", "W_dec", "b_dec")} | gated, architecture="gated"),
        "jumprelu": made(w | threshold, architecture="jumprelu", normalize_activations="layer_norm"),
        "topk": made(w, architecture="topk", k=3, rescale_acts_by_decoder_norm=True),
        "abstopk": made(w, architecture="abstopk", k=3),
        "matching_pursuit": made(only, architecture="matching_pursuit", max_iterations=3, residual_threshold=0.1),
        "transcoder": made(weights(out=4), **mlp),
        "skip transcoder": made(weights(out=4) | skip, **mlp),
        "jumprelu skip transcoder": made(weights(out=4) | skip | threshold, **mlp | {"architecture": "jumprelu"}),
        "bfloat16": made({name: array.astype(ml_dtypes.bfloat16) for name, array in w.items()}),
    }  # fmt: skip


@pytest.mark.parametrize("name", dictionaries())
def test_saved_and_loaded_is_the_same(name: str, tmp_path: Path) -> None:
    dictionary = dictionaries()[name].replace(sparsity=np.linspace(-9, -1, F, dtype=np.float32))
    dictionary.save(tmp_path / "new")
    again = Dictionary.load(tmp_path / "new")
    assert again.params.keys() == dictionary.params.keys()
    for key, array in dictionary.params.items():
        assert again.params[key].dtype == array.dtype
        assert np.array_equal(np.asarray(again.params[key]).view(np.uint8), np.asarray(array).view(np.uint8))
    assert np.array_equal(again.sparsity, dictionary.sparsity)
    assert dict(again.cfg.metadata).items() >= dict(dictionary.cfg.metadata).items()
    assert again.cfg.replace(metadata=()) == dictionary.cfg.replace(metadata=())
    again.replace(sparsity=None).save(tmp_path / "new")  # over the old one: its sparsity goes
    assert sorted(entry.name for entry in (tmp_path / "new").iterdir()) == (
        ["cfg.json", "sae_weights.safetensors", "sparsity.safetensors"]
    )


def test_saving_over_removes_what_the_new_one_has_not(tmp_path: Path) -> None:
    dictionary = dictionaries()["standard"]
    dictionary.replace(sparsity=np.zeros(F)).save(tmp_path)
    dictionary.save(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert Dictionary.load(tmp_path).sparsity is None


def test_a_save_that_fails_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary = dictionaries()["standard"]
    dictionary.save(tmp_path)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}

    def fails(*_: Any, **__: Any) -> str:
        raise OSError("disk full")

    monkeypatch.setattr("tljax.dictionaries.formats.saelens_writing.json.dumps", fails)
    for directory in (tmp_path, tmp_path / "new"):
        with pytest.raises(OSError, match="disk full"):
            jax.tree.map(lambda leaf: leaf + 1, dictionary).save(directory)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_written_files_are_version_6(tmp_path: Path) -> None:
    dictionaries()["skip transcoder"].save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["architecture"] == "skip_transcoder"
    assert (cfg["d_out"], cfg["dtype"], cfg["apply_b_dec_to_input"]) == (4, "float32", False)
    assert cfg["metadata"]["sae_lens_version"].startswith("6.")
    assert cfg["metadata"]["hook_name_out"] == "blocks.1.hook_mlp_out"
    assert {name: array.shape for name, array in load_file(tmp_path / "sae_weights.safetensors").items()} == {
        "W_enc": (D, F), "b_enc": (F,), "W_dec": (F, 4), "b_dec": (4,), "W_skip": (4, D),
    }  # fmt: skip


def test_files_that_are_damaged_say_so(tmp_path: Path) -> None:
    path = write(tmp_path, weights(), **V6 | SIZES)
    file = path / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DictionaryError, match="damaged or half-downloaded"):
        Dictionary.load(path)
