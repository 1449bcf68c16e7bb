"""Crosscoders of every layout and normalisation against float64, tljax's own files, and what is saved comes back."""

import json
from pathlib import Path
from typing import Any

import foreign_files as files
import jax
import ml_dtypes
import numpy as np
import pytest
from foreign_files import Arrays, crosscoder_parameters, relu, top_k, wide

from tljax.dictionaries import (
    Crosscoder,
    CrosscoderConfig,
    CrossLayerConfig,
    CrossLayerTranscoder,
    Tap,
    save_transcoders,
)
from tljax.errors import DictionaryError

N, D, F = 3, 5, 7


def x_of(n: int = N, d: int = D) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(6, n, d)).astype(np.float32)


def close(got: Any, right: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), right, rtol=0, atol=1e-5 * np.abs(right).max())


def hidden(p: Arrays, x: np.ndarray) -> np.ndarray:
    return relu(np.einsum("bnd,ndf->bf", x, p["W_enc"]) + p["b_enc"])


def decoded(p: Arrays, f: np.ndarray) -> np.ndarray:
    axes = "bf,fnd->bnd" if f.ndim == 2 else "bnf,fnd->bnd"
    return np.einsum(axes, f, p["W_dec"]) + p["b_dec"]


def norms(p: Arrays, number: int) -> np.ndarray:
    """What features are multiplied by where they are selected; ``alpha_cc`` is 0.2 in the files."""
    each = np.linalg.norm(p["W_dec"], axis=2).T
    summed, together = each.sum(axis=0), np.sqrt((each**2).sum(axis=0))
    return {1: summed, 2: together, 3: together + 0.2 * summed, 4: np.ones(F), 5: each}[number]


@pytest.mark.parametrize("size", [(3, 5, 7), (4, 4, 4)])
def test_files_of_neel_nanda(size: tuple[int, int, int], tmp_path: Path) -> None:
    p, x = crosscoder_parameters(*size), x_of(*size[:2])
    loaded = Crosscoder.load(files.crosscoder_nc(tmp_path, p))
    right = hidden(wide(p), x)
    close(loaded.encode(x), right)
    close(loaded(x).reconstruction, decoded(wide(p), right))
    assert loaded.cfg.taps[2].reads == "blocks.2.hook_resid_post"


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_thresholds_apply_to_features_times_their_code_norms(number: int, prefix: str, tmp_path: Path) -> None:
    p, x = crosscoder_parameters(N, D, F), x_of()
    threshold = np.array([0.9, 1.4, 2.0] if number == 5 else 1.9, np.float32)
    buffers = {"code_normalization_id": np.array(number), "k": np.array(2, np.int32), "threshold": threshold}
    loaded = Crosscoder.load(files.crosscoder_sf(tmp_path, p, prefix, **buffers))
    h, c = hidden(wide(p), x), norms(wide(p), number)
    right = h[:, None] * (h[:, None] * c > threshold[:, None]) if number == 5 else h * (h * c > threshold)
    assert 0 < (right != 0).mean() < 0.9 * (h != 0).mean()  # the threshold takes some, not all
    close(loaded.encode(x), right)
    close(loaded(x).reconstruction, decoded(wide(p), right))
    close(loaded.code_norms, c)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_an_unset_threshold_selects_the_largest_of_the_batch(number: int, tmp_path: Path) -> None:
    p, x = crosscoder_parameters(N, D, F), x_of()
    unset = np.full(N if number == 5 else (), -1, np.float32)
    buffers = {"code_normalization_id": np.array(number), "k": np.array(2, np.int32), "threshold": unset}
    loaded = Crosscoder.load(files.crosscoder_sf(tmp_path, p, **buffers))
    h, c = hidden(wide(p), x), norms(wide(p), number)
    if number == 5:
        right = np.stack([h * top_k((h * one).reshape(-1), 12).reshape(h.shape) for one in c], axis=1)
    else:
        right = h * top_k((h * c).reshape(-1), 12).reshape(h.shape)
    close(loaded.encode(x), right)


@pytest.mark.parametrize("stored_scale", [True, False])
def test_standardised_activations_come_back_in_their_own_units(stored_scale: bool, tmp_path: Path) -> None:
    p, x = crosscoder_parameters(N, D, F), x_of()
    rng = np.random.default_rng(1)
    mean, std = rng.normal(size=(N, D)).astype(np.float32), rng.uniform(900, 2000, (N, D)).astype(np.float32)
    scale = 1.5 / np.sqrt((std.astype(np.float64) ** 2).sum(-1) + 1e-8)
    buffers: dict[str, Any] = {"activation_mean": mean, "activation_std": std, "target_rms": np.array(1.5, np.float32)}
    buffers |= {"activation_global_scale": scale.astype(np.float32)} if stored_scale else {}
    loaded = Crosscoder.load(files.crosscoder_sf(tmp_path, p, **buffers))
    x = x * 1000
    right = hidden(wide(p), (x - mean) * scale[:, None])
    close(loaded.encode(x), right)
    close(loaded(x).reconstruction, decoded(wide(p), right) / (scale + 1e-8)[:, None] + mean)


def test_crosscoders_go_through_jit_and_grad(tmp_path: Path) -> None:
    p, x = crosscoder_parameters(N, D, F), x_of()
    loaded = Crosscoder.load(files.crosscoder_sf(tmp_path, p, code_normalization_id=np.array(5), k=np.array(2),
                                                 threshold=np.array([0.9, 1.4, 2.0], np.float32)))  # fmt: skip
    close(jax.jit(lambda one, x: one(x).reconstruction)(loaded, x), np.asarray(loaded(x).reconstruction, np.float64))
    gradient = jax.grad(lambda one: one(x).reconstruction.sum())(loaded)
    close(gradient.params["b_dec"], np.full((N, D), 6.0))


CFG = CrosscoderConfig(
    n_sources=N, d_in=D, d_sae=F, code_normalization="mixed", alpha_cc=0.3, architecture="batchtopk", k=2,
    taps=tuple(Tap(reads=f"blocks.{n}.hook_resid_post", processing=("fold_ln",)) for n in range(N)),
    metadata=(("seed", "3"),),
)  # fmt: skip


def cross_layer(*, skip: bool = True) -> CrossLayerTranscoder:
    rng = np.random.default_rng(0)
    shapes = [
        {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, 2 - n, D), "b_dec": (D,), "threshold": (F,)} for n in (0, 1)
    ]
    shapes = [one | ({"W_skip": (D, D)} if skip else {}) for one in shapes]
    layers = [{name: rng.normal(size=shape).astype(np.float32) for name, shape in one.items()} for one in shapes]
    taps = tuple(Tap(reads=f"blocks.{n}.hook_resid_mid", writes=f"blocks.{n}.hook_mlp_out") for n in (0, 1))
    return CrossLayerTranscoder(layers, CrossLayerConfig(n_layers=2, d_in=D, d_sae=F, jumprelu=True, taps=taps))


def test_a_nan_shows_in_the_features(tmp_path: Path) -> None:
    x = x_of()
    x[2, 1, 3] = np.nan
    for number, threshold in ((1, 1.9), (4, 0.3), (5, [0.9, 1.4, 2.0])):
        buffers = {"code_normalization_id": np.array(number), "k": np.array(2)}
        written = files.crosscoder_sf(
            tmp_path / str(number), crosscoder_parameters(N, D, F), **buffers, threshold=np.array(threshold, np.float32)
        )
        features = np.asarray(Crosscoder.load(written).encode(x))
        assert np.isnan(features[2]).all()
        assert np.isfinite(np.delete(features, 2, axis=0)).all()
    layers = np.random.default_rng(2).normal(size=(2, 4, D)).astype(np.float32)
    layers[1, 0] = np.nan
    assert np.isnan(np.asarray(cross_layer().encode(layers))[1, 0]).all()


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    params = crosscoder_parameters(N, D, F)
    one = Crosscoder({name: array.astype(ml_dtypes.bfloat16) for name, array in params.items()}, CFG)
    one.save(tmp_path / "crosscoder")
    again = Crosscoder.load(tmp_path / "crosscoder")
    assert again.cfg == CFG
    assert again.params["W_dec"].dtype == "bfloat16"
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, one.params))
    other = cross_layer()
    other.save(tmp_path / "clt")
    back = CrossLayerTranscoder.load(tmp_path / "clt")
    assert back.cfg == other.cfg
    assert jax.tree.all(jax.tree.map(np.array_equal, back.layers, other.layers))
    with pytest.raises(DictionaryError, match="not a crosscoder"):
        Crosscoder.load(tmp_path / "clt")


def test_files_of_two_saves_are_refused(tmp_path: Path) -> None:
    for seed in (0, 1):
        Crosscoder(crosscoder_parameters(N, D, F, seed), CFG).save(tmp_path / str(seed))
    (tmp_path / "0" / "cfg.json").write_bytes((tmp_path / "1" / "cfg.json").read_bytes())
    with pytest.raises(DictionaryError, match="two saves"):
        Crosscoder.load(tmp_path / "0")
    config = json.loads((tmp_path / "1" / "cfg.json").read_text())
    (tmp_path / "1" / "cfg.json").write_text(json.dumps(config | {"code_normalization": "norms"}))
    with pytest.raises(DictionaryError, match="code_normalization"):
        Crosscoder.load(tmp_path / "1")


def test_cross_layer_transcoders_written_for_circuit_tracer(tmp_path: Path) -> None:
    one = cross_layer(skip=False)
    save_transcoders(one, tmp_path, model_name="gpt2")
    again = CrossLayerTranscoder.load(tmp_path)
    x = np.random.default_rng(2).normal(size=(2, 4, D)).astype(np.float32)
    close(again(x).reconstruction, np.asarray(one(x).reconstruction, np.float64))
    assert [tap.writes for tap in again.cfg.taps] == ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]
    with pytest.raises(DictionaryError, match="skip"):
        save_transcoders(cross_layer(), tmp_path, model_name="gpt2")
