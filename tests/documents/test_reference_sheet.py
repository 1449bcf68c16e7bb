"""The document "TransformerLens Reference": every block in JAX spelling, on the bundled model."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import HookedTransformer
from tljax.checkpoints.description import describe
from tljax.checkpoints.files.names import hub_id
from tljax.errors import HookError, InputError

pytestmark = pytest.mark.xdist_group("documents")


@pytest.fixture(scope="module")
def input_ids(model: HookedTransformer) -> jax.Array:
    return model.to_tokens("The Colosseum is in the city of")


@pytest.fixture(scope="module")
def reference(model: HookedTransformer, input_ids: jax.Array) -> Any:
    """Every activation of an unhooked run, and the optional one that the document names."""
    names = [point.name for point in model.hook_points() if not point.optional or point.name.endswith("mlp.hook_in")]
    return model.run_with_cache(input_ids, names_filter=names)[1]


# Loading Models


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_hooked_transformer(device: str, dtype: str) -> None:
    model = HookedTransformer.from_pretrained(
        "tljax-tiny",  # Model name
        device=device,  # "cuda" or "cpu"
        dtype=dtype,  # "float32", "float16", "bfloat16"
    )

    assert model.W_E.dtype == model.blocks[0].attn.W_Q.dtype == jnp.dtype(dtype)
    assert {held.platform for held in model.W_E.devices()} == {"gpu" if device == "cuda" else "cpu"}
    assert model.cfg.dtype == dtype


def test_device_that_is_not_there() -> None:
    missing = "tpu" if jax.default_backend() == "gpu" else "cuda"
    with pytest.raises(InputError, match=rf"no '{missing}' device .* install tljax\[cuda\]"):
        HookedTransformer.from_pretrained("tljax-tiny", device=missing)


@pytest.mark.parametrize(
    ("name", "d_model", "n_layers", "n_heads"),
    [("gpt2", 768, 12, 12), ("gpt2-medium", 1024, 24, 16), ("gpt2-large", 1280, 36, 20), ("gpt2-xl", 1600, 48, 25)],
)
def test_gpt2_model_variants(tmp_path: Path, name: str, d_model: int, n_layers: int, n_heads: int) -> None:
    hf = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new", "n_ctx": 1024,
        "n_embd": d_model, "n_head": n_heads, "n_layer": n_layers, "n_positions": 1024, "vocab_size": 50257,
        "layer_norm_epsilon": 1e-5,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(hf))
    cfg = describe(tmp_path).cfg
    assert hub_id(name) == f"openai-community/{name}"
    assert (cfg.d_model, cfg.n_layers, cfg.n_heads, cfg.d_head) == (d_model, n_layers, n_heads, 64)


# Hook System


def test_basic_pattern(model: HookedTransformer, input_ids: jax.Array, reference: Any) -> None:
    hook_name = "blocks.2.hook_resid_pre"

    # Storage for activations
    all_activations = []

    # Define hook function
    def save_acts(act, hook):
        all_activations.append(jax.lax.stop_gradient(act))

    # Run with hooks
    output = model.run_with_hooks(
        input_ids,  # Token tensor
        fwd_hooks=[(hook_name, save_acts)],  # List of (name, function) tuples
        return_type=None,  # None = don't return model output
    )

    assert output is None
    assert len(all_activations) == 1
    np.testing.assert_allclose(all_activations[0], reference[hook_name], atol=1e-5)


def test_hook_function_signature(model: HookedTransformer, input_ids: jax.Array) -> None:
    saved = []

    def hook_fn(activation: jax.Array, hook) -> jax.Array | None:
        # For extraction: just save
        saved.append((hook.name, jax.lax.stop_gradient(activation)))

    def halve(activation: jax.Array, hook) -> jax.Array | None:
        # For intervention: return modified tensor
        return activation * 0.5

    normal = model(input_ids)
    extracted = model.run_with_hooks(input_ids, fwd_hooks=[("blocks.2.hook_mlp_out", hook_fn)])
    halved = model.run_with_hooks(
        input_ids, fwd_hooks=[("blocks.2.hook_mlp_out", halve), ("blocks.2.hook_mlp_out", hook_fn)]
    )

    np.testing.assert_allclose(extracted, normal, atol=1e-5)
    assert [name for name, _ in saved] == ["blocks.2.hook_mlp_out"] * 2
    np.testing.assert_allclose(saved[1][1], 0.5 * saved[0][1], atol=1e-6)
    assert float(jnp.abs(halved - normal).max()) > 1e-2


# Hook Names


HOOK_NAMES = {
    "blocks.{layer}.hook_resid_pre": "blocks.{layer}.hook_resid_pre",
    "blocks.{layer}.attn.hook_q": "blocks.{layer}.attn.hook_q",
    "blocks.{layer}.attn.hook_k": "blocks.{layer}.attn.hook_k",
    "blocks.{layer}.attn.hook_v": "blocks.{layer}.attn.hook_v",
    "blocks.{layer}.attn.hook_attn": "blocks.{layer}.attn.hook_pattern",
    "blocks.{layer}.attn.hook_out": "blocks.{layer}.hook_attn_out",
    "blocks.{layer}.mlp.hook_in": "blocks.{layer}.mlp.hook_in",
    "blocks.{layer}.mlp.hook_pre": "blocks.{layer}.mlp.hook_pre",
    "blocks.{layer}.mlp.hook_out": "blocks.{layer}.hook_mlp_out",
    "blocks.{layer}.hook_resid_post": "blocks.{layer}.hook_resid_post",
}
"""The document's names, in firing order, and TransformerLens's own."""


@pytest.mark.parametrize("layer", [1, 3])
def test_hook_names(model: HookedTransformer, input_ids: jax.Array, reference: Any, layer: int) -> None:
    seen: dict[str, jax.Array] = {}

    def save(act, hook):
        seen[hook.name] = act

    names = {their_name.format(layer=layer): name.format(layer=layer) for their_name, name in HOOK_NAMES.items()}
    model.run_with_hooks(input_ids, fwd_hooks=[(their_name, save) for their_name in names])
    assert list(seen) == list(names.values())
    for their_name, name in names.items():
        np.testing.assert_allclose(seen[name], reference[name], atol=1e-4)
        assert reference[their_name] is reference[name]


def test_hook_names_mean_what_the_document_says(model: HookedTransformer, reference: Any) -> None:
    block, weights = model.blocks[1], reference["blocks.1.attn.hook_attn"]  # softmax output
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(weights, jnp.tril(weights))
    z = np.einsum("bhqk,bkhd->bqhd", weights, reference["blocks.1.attn.hook_v"])
    attention_output = np.einsum("bqhd,hdm->bqm", z, block.attn.W_O) + block.attn.b_O
    np.testing.assert_allclose(reference["blocks.1.attn.hook_out"], attention_output, atol=1e-4)
    np.testing.assert_allclose(
        reference["blocks.1.hook_resid_post"],  # AFTER layer computation
        reference["blocks.1.hook_resid_pre"] + reference["blocks.1.attn.hook_out"] + reference["blocks.1.mlp.hook_out"],
        atol=1e-4,
    )
    np.testing.assert_allclose(reference["blocks.1.hook_resid_pre"], reference["blocks.0.hook_resid_post"], atol=1e-5)


def test_mlp_input_is_what_the_mlp_reads(model: HookedTransformer, reference: Any) -> None:
    pre = reference["blocks.1.mlp.hook_in"] @ model.W_in[1] + model.b_in[1]
    np.testing.assert_allclose(pre, reference["blocks.1.mlp.hook_pre"], atol=1e-4)
    out = jax.nn.gelu(pre, approximate=True) @ model.W_out[1] + model.b_out[1]
    np.testing.assert_allclose(out, reference["blocks.1.mlp.hook_out"], atol=1e-4)


def test_layer_index(model: HookedTransformer, input_ids: jax.Array) -> None:
    LAYER_IDX = 2
    HOOK = f"blocks.{LAYER_IDX}.hook_resid_pre"  # Layer 2 residual input

    np.testing.assert_allclose(
        model.run_with_cache(input_ids, names_filter=HOOK)[1][HOOK],
        model(input_ids, stop_at_layer=LAYER_IDX),
        atol=1e-5,
    )


# Complete Activation Extraction Pattern


def test_complete_activation_extraction_pattern(device: str) -> None:
    model = HookedTransformer.from_pretrained("tljax-tiny", device=device, dtype="float32")
    tok = model.tokenizer

    LAYER_IDX = 2
    HOOK = f"blocks.{LAYER_IDX}.hook_resid_pre"
    D_MODEL = 64

    # TOKENIZE
    text = "The quick brown fox jumps over the lazy dog. " * 8
    ids = tok(text, add_special_tokens=False).input_ids

    # Pad to create 64-token windows (matching SAE training)
    windows = []
    for i in range(0, len(ids), 64):
        window = ids[i : i + 64]
        if len(window) < 64:
            window = window + [tok.eos_token_id] * (64 - len(window))
        windows.append(window)

    windows_tensor = jax.device_put(jnp.array(windows), jax.devices(device)[0])

    # EXTRACT ACTIVATIONS
    all_activations = []

    def save_acts(act, hook):
        """Extract and normalize activations"""
        flat = jax.lax.stop_gradient(act).reshape(-1, D_MODEL)

        # Normalize: mean-center and L2-normalize
        flat = flat - flat.mean(-1, keepdims=True)
        flat = flat / jnp.linalg.norm(flat, axis=-1, keepdims=True)

        all_activations.append(flat)

    output = model.run_with_hooks(windows_tensor, fwd_hooks=[(HOOK, save_acts)], return_type=None)

    # Concatenate: shape (n_tokens, D_MODEL)
    gpt2_acts = jnp.concatenate(all_activations, axis=0)

    # PASS THROUGH SAE
    x_hat, z = sae(gpt2_acts)  # z = sparse feature activations

    assert output is None
    assert len(windows) == 2
    assert windows[1][-1] == tok.eos_token_id
    assert gpt2_acts.shape == x_hat.shape == (64 * len(windows), D_MODEL)
    np.testing.assert_allclose(jnp.linalg.norm(gpt2_acts, axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(gpt2_acts.mean(-1), 0, atol=1e-6)
    resid = np.asarray(model.run_with_cache(windows_tensor, names_filter=HOOK)[1][HOOK]).reshape(-1, D_MODEL)
    resid = resid - resid.mean(-1, keepdims=True)
    np.testing.assert_allclose(gpt2_acts, resid / np.linalg.norm(resid, axis=-1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(x_hat, gpt2_acts, atol=1e-5)
    assert z.shape == (len(gpt2_acts), 2 * D_MODEL)
    assert float((z > 0).mean()) < 0.6


def sae(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A stand-in for a trained SAE: features are the coordinates and their negatives, so it reconstructs exactly."""
    encoder = jnp.concatenate([jnp.eye(x.shape[-1]), -jnp.eye(x.shape[-1])], axis=1)
    z = jax.nn.relu(x @ encoder)
    return z @ encoder.T, z


# Multiple Hooks, Extract All Layers


def test_multiple_hooks(model: HookedTransformer, input_ids: jax.Array, reference: Any) -> None:
    pre_acts = []
    post_acts = []

    def save_pre(act, hook):
        pre_acts.append(jax.lax.stop_gradient(act))

    def save_post(act, hook):
        post_acts.append(jax.lax.stop_gradient(act))

    model.run_with_hooks(
        input_ids,
        fwd_hooks=[
            ("blocks.2.hook_resid_pre", save_pre),
            ("blocks.2.hook_resid_post", save_post),
        ],
        return_type=None,
    )

    assert len(pre_acts) == len(post_acts) == 1
    np.testing.assert_allclose(pre_acts[0], reference["resid_pre", 2], atol=1e-5)
    np.testing.assert_allclose(post_acts[0], reference["resid_post", 2], atol=1e-5)


def test_extract_all_layers(model: HookedTransformer, input_ids: jax.Array, reference: Any) -> None:
    layer_activations = {}

    for layer_idx in range(4):
        activations = []

        def save_acts(act, hook, layer=layer_idx):
            activations.append(jax.lax.stop_gradient(act))  # noqa: B023

        model.run_with_hooks(input_ids, fwd_hooks=[(f"blocks.{layer_idx}.hook_resid_pre", save_acts)], return_type=None)

        layer_activations[layer_idx] = jnp.concatenate(activations, axis=0)

    assert list(layer_activations) == list(range(model.cfg.n_layers))
    for layer, value in layer_activations.items():
        np.testing.assert_allclose(value, reference["resid_pre", layer], atol=1e-5)


# Intervention (Activation Patching)


def test_intervention(model: HookedTransformer, input_ids: jax.Array) -> None:
    def zero_feature_hook(act, hook):
        """Zero out a specific feature direction"""
        # act shape: (batch, seq, d_model)
        act = act.at[..., 42].set(0)  # Zero dimension 42
        return act  # Return modified activation

    logits = model.run_with_hooks(
        input_ids,
        fwd_hooks=[("blocks.2.hook_resid_pre", zero_feature_hook)],
        return_type="logits",  # Get model output
    )

    assert float(jnp.abs(logits - model(input_ids)).max()) > 1e-3
    zeroed = model(input_ids, stop_at_layer=2).at[..., 42].set(0)
    np.testing.assert_allclose(logits, model(zeroed, start_at_layer=2), atol=1e-4)


def test_intervention_in_place_says_what_to_write(model: HookedTransformer, input_ids: jax.Array) -> None:
    def steer(act, hook):
        act[:, 3] = 0
        return act

    with pytest.raises(HookError, match=r"return act.at\[:, 3\].set\(0\)"):
        model.run_with_hooks(input_ids, fwd_hooks=[("blocks.0.hook_resid_post", steer)])


@pytest.mark.parametrize(
    ("names", "axes"),
    [
        (("hook_resid_pre", "hook_resid_post"), ("batch", "seq", "d_model")),
        (("attn.hook_q", "attn.hook_k", "attn.hook_v"), ("batch", "seq", "n_heads", "d_head")),
        (("attn.hook_attn",), ("batch", "n_heads", "seq", "seq")),
        (("mlp.hook_out",), ("batch", "seq", "d_model")),
    ],
)
def test_activation_shapes(model: HookedTransformer, names: tuple[str, ...], axes: tuple[str, ...]) -> None:
    input_ids = model.to_tokens(["The Colosseum is in the city of", "The Louvre is in the city of"])
    sizes = {"batch": 2, "seq": 8, "d_model": 64, "n_heads": 4, "d_head": 16}
    full = [f"blocks.1.{name}" for name in names]
    _, cache = model.run_with_cache(input_ids)
    assert {cache[name].shape for name in full} == {tuple(sizes[axis] for axis in axes)}


def test_common_gotchas(model: HookedTransformer, input_ids: jax.Array) -> None:
    acts = []
    kept = model.run_with_hooks(
        input_ids, fwd_hooks=[("resid_pre2", lambda act, hook: acts.append(act))], return_type=None
    )
    assert kept is None  # 3. return_type=None
    assert not isinstance(acts[0], jax.core.Tracer)  # 1. nothing to detach: a number carries no gradient
    flat = acts[0].reshape(-1, model.cfg.d_model)  # 2. (n_tokens, d_model), not (batch, seq, d_model)
    np.testing.assert_array_equal(flat[-1], acts[0][0, -1])
    assert sae(flat)[1].shape == (input_ids.shape[1], 2 * model.cfg.d_model)
