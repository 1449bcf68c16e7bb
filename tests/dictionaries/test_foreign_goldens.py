"""Files that other libraries wrote, with the values that they or their formulas give for them."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tljax.dictionaries import CrossLayerTranscoder, Dictionary, fold_W_dec_norm, scale_biases
from tljax.dictionaries.formats import dictionary_learning
from tljax.dictionaries.formats.read import Read
from tljax.dictionaries.formats.table import detected
from tljax.dictionaries.maths.config import DictionaryConfig

GOLDENS = Path(__file__).parents[3] / "shared" / "goldens" / "dictionaries"
TOLERANCE = 1e-5
"""Relative to the largest entry."""

pytestmark = pytest.mark.skipif(not GOLDENS.is_dir(), reason="the shared golden files are not on this machine")


def io(folder: str) -> dict[str, np.ndarray]:
    return load_file(GOLDENS / folder / "io.safetensors")


def read(folder: str, **facts: Any) -> Read:
    """Reads a golden folder by the one format that detects it."""
    path = GOLDENS / folder
    (row,) = detected(path)
    return row.reads(path, **facts)


def dictionary(folder: str, **facts: Any) -> Dictionary:
    found = read(folder, **facts)
    assert isinstance(found.params, dict)
    assert isinstance(found.cfg, DictionaryConfig)
    return Dictionary(found.params, found.cfg, found.sparsity)


def close(got: Any, right: np.ndarray) -> None:
    error = np.abs(np.asarray(got, np.float64) - right).max() / np.abs(right).max()
    assert error < TOLERANCE, error


CLASSES = sorted(dictionary_learning.CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_dictionary_learning(name: str) -> None:
    folder, values = f"dictionary_learning/{name}", io(f"dictionary_learning/{name}")
    loaded, x = dictionary(folder), values["x"]
    close(loaded.encode(x), values["encode"])
    close(loaded.decode(loaded.encode(x)), values["decode"])
    close(loaded.forward(x), values.get("forward", values["decode"]))
    assert loaded.cfg.tap.reads == "blocks.1.hook_resid_post"
    assert loaded.cfg.tap.model_name == "EleutherAI/pythia-70m-deduped"
    assert loaded.cfg.tap.processing == ()
    pickled = dictionary_learning.read(GOLDENS / folder / "ae.pt")
    assert isinstance(pickled.params, dict)
    assert all(np.array_equal(pickled.params[key], loaded.params[key]) for key in loaded.params)
    for use in (True, False):
        if f"encode.use_threshold_{use}" in values or (use and name == "BatchTopKSAE"):
            other = dictionary(folder, use_threshold=use)
            close(other.encode(x), values.get(f"encode.use_threshold_{use}", values["encode"]))
            close(other.forward(x), values.get(f"decode.use_threshold_{use}", values["decode"]))
    if "after_scale_biases_1.9.encode" in values:
        close(scale_biases(loaded, 1.9).encode(x), values["after_scale_biases_1.9.encode"])
    if "normalize_decoder.encode" in values:
        close(fold_W_dec_norm(loaded).encode(x), values["normalize_decoder.encode"])
        close(fold_W_dec_norm(loaded).forward(x), values["normalize_decoder.forward"])
    if "forward_features" in values:
        close(fold_W_dec_norm(loaded).encode(x), values["forward_features"])
    if "encode.apply_b_dec_to_input_True" in values:
        changed = loaded.replace(cfg=loaded.cfg.replace(apply_b_dec_to_input=True))
        close(changed.encode(x), values["encode.apply_b_dec_to_input_True"])


def test_matryoshka_widths() -> None:
    assert dictionary("dictionary_learning/MatryoshkaBatchTopKSAE").cfg.matryoshka_widths == (16, 32, 64)


SPARSIFY = {
    "sae_topk/layers.1": ("blocks.1.hook_resid_post", None),
    "sae_groupmax/h.0.attn": ("blocks.0.hook_attn_out", None),
    "sae_unnormalized/embed_tokens": ("hook_embed", None),
    "transcoder/layers.1.mlp": ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"),
    "transcoder_skip/layers.2.mlp": ("blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out"),
}


@pytest.mark.parametrize("name", SPARSIFY)
def test_sparsify(name: str) -> None:
    values, loaded = io(f"sparsify/{name}"), dictionary(f"sparsify/{name}")
    close(loaded.encode(values["x"]), values["encode.dense"])
    close(loaded.decode(loaded.encode(values["x"])), values["decode"])
    close(loaded.forward(values["x"]), values.get("forward.sae_out", values["decode"]))
    assert (loaded.cfg.tap.reads, loaded.cfg.tap.writes) == SPARSIFY[name]


GEMMA = {
    "gemma_scope/res/layer_1/width_64/average_l0_12": ("blocks.1.hook_resid_post", None, None),
    "gemma_scope/embedding/embedding/width_64/average_l0_5": ("hook_embed", None, None),
    "gemma_scope/transcoder/layer_1/width_64/average_l0_9": (
        "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out", False,
    ),
    "gemma_scope_2/resid_post/layer_1_width_16k_l0_medium": ("blocks.1.hook_resid_post", None, None),
    "gemma_scope_2/transcoder_all/layer_1_width_16k_l0_small_affine": (
        "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out", True,
    ),
    "gemma_scope_2/transcoder_all/layer_2_width_16k_l0_small": (
        "blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out", True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GEMMA)
def test_gemma_scope(name: str) -> None:
    values, loaded = io(name), dictionary(name)
    close(loaded.encode(values["x"]), values["acts"])
    right = values["out_x_at_A"] if "out_x_at_A" in values else values["out"]
    close(loaded.forward(values["x"]), right)
    if "error" in values:
        target = values.get("y", values["x"])
        close(target - np.asarray(loaded.forward(values["x"]), np.float64), values["error"])
    if "out_x_at_A_transposed_WRONG" in values:
        assert np.abs(np.asarray(loaded.forward(values["x"])) - values["out_x_at_A_transposed_WRONG"]).max() > 0.1
    tap = loaded.cfg.tap
    assert (tap.reads, tap.writes, tap.gain) == GEMMA[name]


@pytest.mark.parametrize(
    ("name", "point"),
    [("Llama3_1-8B-Base-L15R-8x", "blocks.15.hook_resid_post"), ("Llama3_1-8B-Base-L3M-8x", "blocks.3.hook_mlp_out")],
)
def test_llama_scope(name: str, point: str) -> None:
    values, loaded = io(f"llama_scope/{name}"), dictionary(f"llama_scope/{name}")
    close(loaded.encode(values["x"]), values["threshold_times_s.acts"])
    close(loaded.forward(values["x"]), values["threshold_times_s.out"])
    assert loaded.cfg.tap.reads == point
    assert loaded.cfg.normalize_activations == "none"


SETS = {
    "plt_relu": (1, "hook_resid_mid", None),
    "plt_relu_old_W_dec_transposed": (1, "hook_resid_mid", None),
    "plt_relu_skip": (3, "hook_resid_mid", None),
    "plt_jumprelu_skip": (1, "mlp.hook_in", True),
}


@pytest.mark.parametrize("name", SETS)
def test_sets_of_transcoders(name: str) -> None:
    values = io(f"circuit_tracer/{name}")
    layers, point, gain = SETS[name]
    for layer in range(layers):
        loaded = dictionary(f"circuit_tracer/{name}", layer=layer)
        close(loaded.encode(values["x"][layer]), values["acts"][layer])
        close(loaded.forward(values["x"][layer]), values["out"][layer])
        tap = loaded.cfg.tap
        assert (tap.reads, tap.writes, tap.gain) == (f"blocks.{layer}.{point}", f"blocks.{layer}.hook_mlp_out", gain)


@pytest.mark.parametrize("name", ["clt_relu", "clt_jumprelu"])
def test_cross_layer_transcoders(name: str) -> None:
    values = io(f"circuit_tracer/{name}")
    loaded = CrossLayerTranscoder.load(GOLDENS / "circuit_tracer" / name)
    y_hat, features = loaded(jnp.asarray(values["x"]))
    close(features, values["acts"])
    close(y_hat, values["out"])
    assert loaded.cfg.taps[2].reads == "blocks.2.hook_resid_mid"
