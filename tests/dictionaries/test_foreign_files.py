"""Every layout, written here, computes what its own project computes: formulas in float64, nothing of tljax's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_files as files
import ml_dtypes
import numpy as np
import pytest
import torch
from foreign_files import Arrays, inputs, parameters, relu, top_k, wide

from tljax.dictionaries import CrossLayerTranscoder, Dictionary, load_transcoders, save_transcoders, transcoder_sizes
from tljax.dictionaries.formats.points import point_of
from tljax.dictionaries.formats.table import detected
from tljax.dictionaries.maths.config import DictionaryConfig
from tljax.errors import DictionaryError

SIZES = [(6, 16), (8, 8)]
"""Of the second, shapes do not tell how a matrix lies: the format must."""


def load(path: Path, **facts: Any) -> Dictionary:
    """Loads a path by the one format that detects it, with facts that only a release or the caller knows."""
    if not facts:
        return Dictionary.load(path)
    (row,) = detected(path)
    found = row.reads(path, **facts)
    assert isinstance(found.params, dict)
    assert isinstance(found.cfg, DictionaryConfig)
    return Dictionary(found.params, found.cfg, found.sparsity)


def close(got: Any, right: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), right, rtol=0, atol=tolerance * np.abs(right).max())


def jump(h: np.ndarray, threshold: Any) -> np.ndarray:
    return relu(h) * (h > threshold)


def plain(p: Arrays, x: np.ndarray) -> np.ndarray:
    return x @ p["W_enc"] + p["b_enc"]


def less_bias(p: Arrays, x: np.ndarray) -> np.ndarray:
    return (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]


def gated(p: Arrays, x: np.ndarray) -> np.ndarray:
    u = (x - p["b_dec"]) @ p["W_enc"]
    return (u + p["b_gate"] > 0) * relu(u * np.exp(p["r_mag"]) + p["b_mag"])


K = np.array(3, np.int32)
SET = np.array(0.25, np.float32)
LEARNED: dict[str, tuple[dict[str, Any], files.Computes]] = {
    "AutoEncoder": ({}, lambda p, x: relu(less_bias(p, x))),
    "AutoEncoderNew": ({}, lambda p, x: relu(plain(p, x))),
    "AutoEncoderTopK": ({"k": K, "threshold": SET}, lambda p, x: relu(less_bias(p, x)) * top_k(less_bias(p, x), 3)),
    "BatchTopKSAE": ({"k": K, "threshold": SET}, lambda p, x: jump(less_bias(p, x), 0.25)),
    "GatedAutoEncoder": ({}, gated),
    "JumpReluAutoEncoder": ({}, lambda p, x: jump(plain(p, x), p["threshold"])),
    "MatryoshkaBatchTopKSAE": (
        {"k": K, "threshold": SET, "group_sizes": np.array([4, 4], np.int64)}, lambda p, x: jump(less_bias(p, x), 0.25),
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", LEARNED)
def test_dictionary_learning(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    p, x = parameters(*size), inputs(size[0])
    more, features = LEARNED[kind]
    loaded = load(files.dictionary_learning(tmp_path, p, kind, **more))
    right = features(wide(p), x)
    close(loaded.encode(x), right)
    close(loaded.forward(x), right @ wide(p)["W_dec"] + p["b_dec"])
    assert loaded.cfg.tap.reads == "blocks.2.hook_mlp_out"


def test_a_threshold_that_was_never_set_selects_as_in_training(tmp_path: Path) -> None:
    p, x = parameters(6, 16), inputs(6)
    unset = {"k": K, "threshold": np.array(-1, np.float32)}
    loaded = load(files.dictionary_learning(tmp_path, p, "BatchTopKSAE", **unset))
    h = relu(less_bias(wide(p), x))
    close(loaded.encode(x), h * top_k(h.reshape(-1), 15).reshape(h.shape))
    with pytest.raises(DictionaryError, match="never set"):
        load(tmp_path, use_threshold=True)
    files.dictionary_learning(tmp_path, p, "BatchTopKSAE", k=K, threshold=SET)
    np.testing.assert_array_equal(Dictionary.load(tmp_path, training=True).encode(x), loaded.encode(x))


def test_what_an_interrupted_run_left_is_for_raw_activations_too(tmp_path: Path) -> None:
    p, x = parameters(6, 16), inputs(6)
    whole = files.dictionary_learning(tmp_path / "whole", p, "AutoEncoder")
    state = torch.load(whole / "ae.pt", weights_only=True)
    left = tmp_path / "trainer_0"
    config = {"dict_class": "AutoEncoder", "submodule_name": "resid_post_layer_4", "layer": 4}
    content = {"step": 7, "ae": state, "optimizer": {"state": {}}, "config": config, "norm_factor": 2.5}
    files.write_pickle(left / "ae.pt", content)
    loaded = load(left)
    close(loaded.encode(2.5 * x), 2.5 * relu(less_bias(wide(p), x)))
    assert loaded.cfg.tap.reads == "blocks.4.hook_resid_post"


SPARSIFIED: dict[str, tuple[dict[str, Any], Callable[[Arrays, np.ndarray], np.ndarray]]] = {
    "layers.1": ({}, less_bias),
    "layers.1.mlp": ({"transcode": True, "multi_topk": True}, plain),
    "layers.2.mlp": ({"transcode": True, "skip_connection": True}, plain),
    "layers.3.mlp": ({"skip_connection": True}, less_bias),  # as published before there was "transcode"
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SPARSIFIED)
def test_sparsify(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    d, f = size[0], size[0] * (size[1] // size[0])
    p, x = parameters(d, f), inputs(d)
    changes, hidden = SPARSIFIED[name]
    loaded = load(files.sparsify(tmp_path / name, p, **changes))
    h = relu(hidden(wide(p), x))
    right = h * top_k(h, 3)
    close(loaded.encode(x), right)
    skipped = x @ wide(p)["W_skip"].T if "skip_connection" in changes else 0
    close(loaded.forward(x), right @ wide(p)["W_dec"] + p["b_dec"] + skipped)
    assert loaded.cfg.transcoder == bool(changes)


def test_signed_sparsify_keeps_the_largest_magnitudes(tmp_path: Path) -> None:
    p, x = parameters(6, 12), inputs(6)
    h = less_bias(wide(p), x)
    close(load(files.sparsify(tmp_path / "layers.1", p, signed=True)).encode(x), h * top_k(np.abs(h), 3))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lower", [False, True])
def test_gemma_scope(size: tuple[int, int], lower: bool, tmp_path: Path) -> None:
    p, x = parameters(*size), inputs(size[0])
    names = {"W_enc": "w_enc", "W_dec": "w_dec"} if lower else {}
    path = tmp_path / "models--google--gemma-scope-9b-it-att" / "layer_7" / "width_16k" / "average_l0_71"
    loaded = load(files.gemma_scope(path, p, **names))
    right = jump(plain(wide(p), x), p["threshold"])
    close(loaded.encode(x), right)
    close(loaded.forward(x), right @ wide(p)["W_dec"] + p["b_dec"])
    tap = loaded.cfg.tap
    assert (tap.reads, tap.model_name, tap.merged_heads) == ("blocks.7.attn.hook_z", "gemma-2-9b-it", True)


def test_gemma_scope_of_the_embedding_and_facts_of_the_caller(tmp_path: Path) -> None:
    p, x = parameters(6, 16), inputs(6)
    loaded = load(files.gemma_scope(tmp_path / "embedding" / "width_4k" / "average_l0_6", p))
    right = jump(plain(wide(p), x / np.sqrt(6)), p["threshold"])
    close(loaded.encode(x), right)
    close(loaded.forward(x), right @ wide(p)["W_dec"] * np.sqrt(6) + p["b_dec"])
    elsewhere = files.gemma_scope(tmp_path / "mine", p)
    assert load(elsewhere).cfg.tap.reads is None
    told = load(elsewhere, reads="blocks.3.hook_resid_post", model_name="gemma-2-2b", processing=("fold_ln",)).cfg.tap
    assert (told.reads, told.model_name, told.processing) == ("blocks.3.hook_resid_post", "gemma-2-2b", ("fold_ln",))


GEMMA_3 = {
    "17.output": "blocks.17.hook_resid_post",
    "17.post_feedforward_layernorm.output": "blocks.17.hook_mlp_out",
    "17.self_attn.o_proj.input": "blocks.17.attn.hook_z",
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("point", GEMMA_3)
def test_gemma_scope_2(point: str, size: tuple[int, int], tmp_path: Path) -> None:
    p, x = parameters(*size), inputs(size[0])
    loaded = load(files.gemma_scope_2(tmp_path, p, point, point))
    close(loaded.forward(x), jump(plain(wide(p), x), p["threshold"]) @ wide(p)["W_dec"] + p["b_dec"])
    assert (loaded.cfg.tap.reads, loaded.cfg.transcoder) == (GEMMA_3[point], False)


@pytest.mark.parametrize("size", SIZES)
def test_the_affine_skip_of_gemma_scope_2_is_not_transposed(size: tuple[int, int], tmp_path: Path) -> None:
    p, x = parameters(*size), inputs(size[0])
    points = ("5.pre_feedforward_layernorm.output", "5.post_feedforward_layernorm.output")
    loaded = load(files.gemma_scope_2(tmp_path, p, *points, affine=True))
    A = wide(p)["W_skip"].T  # as stored
    right = jump(plain(wide(p), x), p["threshold"]) @ wide(p)["W_dec"] + p["b_dec"]
    close(loaded.forward(x), right + x @ A)
    assert (loaded.cfg.tap.reads, loaded.cfg.tap.gain) == ("blocks.5.mlp.hook_in", True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("top", [True, False])
def test_openai(size: tuple[int, int], top: bool, tmp_path: Path) -> None:
    p, x = parameters(*size), inputs(size[0]) * 3 + 1
    changes = {} if top else {"activation": "ReLU", "activation_state_dict": {}}
    loaded = load(files.openai(tmp_path / "resid_post_attn_v5_32k" / "autoencoders" / "4.pt", p, **changes))
    mean, deviation = (x.mean(-1, keepdims=True), x.std(-1, keepdims=True, ddof=1)) if top else (0, 1)
    h = less_bias(wide(p), (x - mean) / (deviation + 1e-5) if top else x)
    right = relu(h) * top_k(h, 3) if top else relu(h)
    close(loaded.encode(x), right)
    close(loaded.forward(x), (right @ wide(p)["W_dec"] + p["b_dec"]) * deviation + mean)
    assert loaded.cfg.tap.reads == "blocks.4.hook_resid_mid"
    close(loaded.sparsity, np.log10(np.linspace(0.01, 0.1, size[1])))


@pytest.mark.parametrize("size", SIZES)
def test_llama_scope(size: tuple[int, int], tmp_path: Path) -> None:
    p, x = parameters(*size, dtype=ml_dtypes.bfloat16), inputs(size[0])
    loaded = load(files.llama_scope(tmp_path, p))
    s = np.sqrt(size[0]) / 7.3
    right = jump(plain(wide(p), s * x), 0.3 * s)
    close(loaded.encode(x), right)
    close(loaded.forward(x), (right @ wide(p)["W_dec"] + wide(p)["b_dec"]) / s)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("names", ["linear", "native"])
def test_later_vintages_of_llama_scope(names: str, size: tuple[int, int], tmp_path: Path) -> None:
    p, x = parameters(*size), inputs(size[0])
    loaded = load(files.llamascopium(tmp_path, p, names))
    s, t = np.sqrt(size[0]) / 5, np.sqrt(size[0]) / 2
    h, norms = plain(wide(p), s * x), np.linalg.norm(wide(p)["W_dec"], axis=1)
    right = relu(h) * (h * norms > p["threshold"])
    close(loaded.encode(x), right)
    close(loaded.forward(x), (right @ wide(p)["W_dec"] + p["b_dec"]) / t)
    folded = load(
        files.llamascopium(tmp_path, p, names, norm_activation="inference", sparsity_include_decoder_norm=False)
    )
    close(folded.encode(x), jump(plain(wide(p), x), p["threshold"]))
    assert (folded.cfg.tap.reads, folded.cfg.tap.writes) == ("blocks.3.hook_resid_mid", "blocks.3.hook_mlp_out")


SIMPLE: dict[str, tuple[Callable[[Path, Arrays], Path], files.Computes, str]] = {
    "goodfire": (
        lambda path, p: _pickled(path / "Llama-3.3-70B-Instruct-SAE-l50.pt", {
            "encoder_linear.weight": p["W_enc"].T, "encoder_linear.bias": p["b_enc"],
            "decoder_linear.weight": p["W_dec"].T, "decoder_linear.bias": p["b_dec"],
        }),
        lambda p, x: relu(plain(p, x)), "blocks.50.hook_resid_post",
    ),
    "connor_rob": (
        lambda path, p: _pickled(path / "gpt2_L5.pt", {
            "W_enc": p["W_enc"], "W_dec": p["W_dec"], "b_enc": p["b_enc"], "b_dec": p["b_dec"],
        }, {
            "act_size": len(p["b_dec"]), "dict_size": len(p["b_enc"]), "act_name": "blocks.5.attn.hook_z",
        }),
        lambda p, x: relu(less_bias(p, x)), "blocks.5.attn.hook_z",
    ),
    "qwen_scope": (
        lambda path, p: _pickled(path / "layer5.sae.pt", {
            "W_enc": p["W_enc"].T, "W_dec": p["W_dec"].T, "b_enc": p["b_enc"], "b_dec": p["b_dec"],
        }, {"k": 3, "d_model": len(p["b_dec"]), "hook_point": "resid_post", "base_model": "Qwen/Qwen3"}, "config.json"),
        lambda p, x: relu(plain(p, x)) * top_k(plain(p, x), 3), "blocks.5.hook_resid_post",
    ),
}  # fmt: skip


def _pickled(file: Path, content: Arrays, config: Any = None, name: str | None = None) -> Path:
    files.write_pickle(file, content)
    if config is not None:
        files.write_json(file.with_name(name or f"{file.stem}_cfg.json"), config)
    return file.parent


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SIMPLE)
def test_pickles_with_few_facts(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    p, x = parameters(*size), inputs(size[0])
    writes, features, point = SIMPLE[name]
    path = writes(tmp_path, p)
    for loaded in (load(path), load(next(path.glob("*.pt")))):  # the directory, and the file in it
        right = features(wide(p), x)
        close(loaded.encode(x), right)
        close(loaded.forward(x), right @ wide(p)["W_dec"] + p["b_dec"])
        assert loaded.cfg.tap.reads == point


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_sets_of_transcoders(size: tuple[int, int], dtype: Any, tmp_path: Path) -> None:
    layers, x = [parameters(*size, seed, dtype) for seed in range(3)], inputs(size[0])
    loaded = load_transcoders(files.circuit_tracer(tmp_path / "set", layers))
    for layer, p in enumerate(layers):
        h = plain(wide(p), x)
        right = h * (h > wide(p)["threshold"])
        close(loaded[layer].encode(x), right)
        close(loaded[layer].forward(x), right @ wide(p)["W_dec"] + wide(p)["b_dec"] + x @ wide(p)["W_skip"].T)
        tap = loaded[layer].cfg.tap
        assert (tap.reads, tap.gain) == (f"blocks.{layer}.ln2.hook_normalized", False)
    assert list(load_transcoders(tmp_path / "set", [2])) == [2]
    close(load(tmp_path / "set" / "layer_1.safetensors").W_dec, wide(layers[1])["W_dec"])
    d, f = size
    assert transcoder_sizes(tmp_path / "set") == dict.fromkeys(range(3), 2 * d * f + d * d + 2 * f + d)
    save_transcoders(loaded, tmp_path / "again")
    again = load_transcoders(tmp_path / "again")
    assert again[2].cfg.tap == loaded[2].cfg.tap
    for name, array in loaded[2].params.items():
        np.testing.assert_array_equal(again[2].params[name], array)


def test_old_and_remote_files_of_a_set(tmp_path: Path) -> None:
    p, x = parameters(6, 16), inputs(6)
    old = load_transcoders(files.circuit_tracer(tmp_path, [p, p], old=True, skip=False))
    close(old[1].decode(old[1].encode(x)), jump(plain(wide(p), x), p["threshold"]) @ wide(p)["W_dec"] + p["b_dec"])
    entries = [
        {"id": f"l{n}", "layer": n, "filepath": f"hf://org/repo/layer_{n}.safetensors?revision=x"} for n in (1, 0)
    ]
    files.circuit_tracer(tmp_path, [p, p], skip=False, transcoders=entries)
    close(load_transcoders(tmp_path)[1].W_dec, p["W_dec"])


def test_sets_that_point_to_gemma_scope(tmp_path: Path) -> None:
    p, q = parameters(6, 16), parameters(6, 16, 1)
    files.gemma_scope(tmp_path / "layer_0" / "width_16k" / "average_l0_76", p)
    files.gemma_scope_2(tmp_path / "layer_1_width_16k", q, "1.output", "1.output", affine=True)
    names = ["layer_0/width_16k/average_l0_76/params.npz", "layer_1_width_16k/params.safetensors"]
    config = {"model_name": "gemma", "model_kind": "transcoder_set", "feature_output_hook": "hook_mlp_out"}
    files.write_yaml(tmp_path / "config.yaml", config | {"feature_input_hook": "mlp.hook_in", "transcoders": names})
    loaded = load_transcoders(tmp_path)
    close(loaded[0].W_enc, p["W_enc"])
    close(loaded[1].params["W_skip"], q["W_skip"])
    assert [loaded[layer].cfg.tap.reads for layer in (0, 1)] == ["blocks.0.mlp.hook_in", "blocks.1.mlp.hook_in"]
    assert transcoder_sizes(tmp_path)[0] == 2 * 6 * 16 + 2 * 16 + 6


def test_transcoders_written_compute_the_same(tmp_path: Path) -> None:
    p, x = parameters(6, 16), inputs(6)
    p["threshold"][:4] = -0.3
    tap = {"reads": "blocks.0.hook_resid_mid", "writes": "blocks.0.hook_mlp_out"}
    cfg = load(files.circuit_tracer(tmp_path / "a", [parameters(6, 16)], skip=False), **tap).cfg
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    one = Dictionary({name: p[name] for name in names}, cfg)
    save_transcoders([one], tmp_path / "b", model_name="pythia")
    close(load_transcoders(tmp_path / "b")[0].forward(x), np.asarray(one.forward(x), np.float64))


def _cross_layer(layers: list[Arrays], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    features = np.stack([jump(plain(wide(p), x[n]), wide(p)["threshold"]) for n, p in enumerate(layers)])
    outputs = [
        sum(features[n] @ wide(layers[n])["decoders"][:, w - n] for n in range(w + 1)) + wide(layers[w])["b_dec"]
        for w in range(len(layers))
    ]
    return features, np.stack(outputs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", ["circuit_tracer", "split", "full", "stacked"])
def test_cross_layer_transcoders(layout: str, size: tuple[int, int], tmp_path: Path) -> None:
    d, f = size
    rng = np.random.default_rng(3)
    layers = [parameters(d, f, n) for n in range(3)]
    for n, p in enumerate(layers):
        p["decoders"] = rng.normal(size=(f, 3 - n, d)).astype(np.float32)
    x = rng.normal(size=(3, 4, d)).astype(np.float32)
    features, outputs = _cross_layer(layers, x)
    if layout == "circuit_tracer":
        for n, p in enumerate(layers):
            arrays = {"W_enc": p["W_enc"].T, "b_enc": p["b_enc"], "b_dec": p["b_dec"], "threshold": p["threshold"]}
            files.write_arrays(tmp_path / f"W_enc_{n}.safetensors", {f"{k}_{n}": v for k, v in arrays.items()})
            files.write_arrays(tmp_path / f"W_dec_{n}.safetensors", {f"W_dec_{n}": p["decoders"]})
        config = {"model_name": "gpt2", "model_kind": "cross_layer_transcoder", "feature_output_hook": "hook_mlp_out"}
        files.write_yaml(tmp_path / "config.yaml", config | {"feature_input_hook": "hook_resid_mid"})
        reads = "blocks.2.hook_resid_mid"
    else:
        each = []
        for n, p in enumerate(layers):
            arrays = {name.lower(): p[name] for name in ("W_enc", "b_enc", "b_dec", "threshold")}
            full = np.concatenate([np.zeros((f, n, d), np.float32), p["decoders"]], axis=1)
            arrays |= {"w_dec": p["decoders"] if layout == "split" else full, "affine_skip_connection": p["W_skip"].T}
            each.append(arrays)
        outputs = outputs + np.stack([x[n] @ wide(p)["W_skip"].T for n, p in enumerate(layers)])
        if layout == "stacked":
            files.write_arrays(
                tmp_path / "params.safetensors", {k: np.stack([one[k] for one in each]) for k in each[0]}
            )
        for n, arrays in enumerate([] if layout == "stacked" else each):
            files.write_arrays(tmp_path / f"params_layer_{n}.safetensors", arrays)
        layer = "{5,9,12}" if layout == "full" else "{all}"
        config = {"architecture": "jump_relu", "hf_hook_point_in": f"model.layers.{layer}.output", "type": "crosscoder"}
        files.write_json(
            tmp_path / "config.json", config | {"hf_hook_point_out": config["hf_hook_point_in"], "width": 3 * f}
        )
        reads = f"blocks.{12 if layout == 'full' else 2}.hook_resid_post"
    loaded = CrossLayerTranscoder.load(tmp_path)
    got = loaded(x)
    close(got.features, features)
    close(got.reconstruction, outputs)
    assert loaded.cfg.taps[2].reads == reads


def test_sites_of_modules() -> None:
    assert point_of("h.0.attn") == "blocks.0.hook_attn_out"
    assert point_of("gpt_neox.layers.3.attention.dense", "input") == "blocks.3.attn.hook_z"
    assert point_of("layers.1.mlp.down_proj", "input") == "blocks.1.mlp.hook_post"
    assert point_of("embed_tokens") == "hook_embed"
    assert point_of("layers.1.post_attention_layernorm") is None  # before the MLP in Llama, after attention in Gemma
