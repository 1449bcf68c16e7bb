"""The document "TransformerLens API Reference": HookedTransformer, every block and table in JAX spelling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import ActivationCache, HookedTransformer, HookedTransformerConfig
from tljax.checkpoints.files.names import hub_id
from tljax.errors import HookError, TokenizerError

pytestmark = pytest.mark.xdist_group("documents")


# Loading Models


def test_basic_loading() -> None:
    # Basic loading
    model = HookedTransformer.from_pretrained("tljax-tiny")

    assert (model.cfg.n_layers, model.cfg.n_heads, model.cfg.dtype) == (4, 4, "float32")


def test_loading_with_specific_device_and_dtype(device: str) -> None:
    model = HookedTransformer.from_pretrained("tljax-tiny", device=device, dtype=jnp.float16)

    assert model.W_Q.dtype == jnp.float16
    assert {held.platform for held in model.W_Q.devices()} == {"gpu" if device == "cuda" else "cpu"}


def test_gated_models_are_found_by_name() -> None:
    """Downloading them with ``HF_TOKEN`` is tested against a local hub in tests/checkpoints/test_hub.py."""
    assert hub_id("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"
    assert hub_id("gpt2-small") == "openai-community/gpt2"
    assert hub_id("gpt2-medium") == "openai-community/gpt2-medium"


def test_from_pretrained_parameters(model: HookedTransformer) -> None:
    raw = HookedTransformer.from_pretrained(
        model_name="tljax-tiny", fold_ln=False, center_writing_weights=False, center_unembed=False
    )
    assert (raw.cfg.normalization_type, model.cfg.normalization_type) == ("LN", "LNPre")
    assert float(jnp.abs(raw.W_out.mean(-1)).max()) > 1e-3
    np.testing.assert_allclose(model.W_out.mean(-1), 0, atol=1e-6)
    assert float(jnp.abs(raw.W_U.mean(-1)).max()) > 1e-3
    np.testing.assert_allclose(model.W_U.mean(-1), 0, atol=1e-6)
    for parameter in ("fold_ln", "center_writing_weights", "center_unembed"):
        assert (model.processing[parameter], raw.processing[parameter]) == ("applied", "not applied")


def test_weight_matrices(model: HookedTransformer, tokens: jax.Array) -> None:
    cfg = model.cfg
    d_vocab, d_model, n_ctx, d_mlp = cfg.d_vocab, cfg.d_model, cfg.n_ctx, cfg.d_mlp
    n_layers, n_heads, d_head = cfg.n_layers, cfg.n_heads, cfg.d_head
    assert model.W_E.shape == (d_vocab, d_model)
    assert model.W_U.shape == (d_model, d_vocab)
    assert model.W_pos.shape == (n_ctx, d_model)
    assert model.W_Q.shape == (n_layers, n_heads, d_model, d_head)
    assert model.W_K.shape == (n_layers, n_heads, d_model, d_head)
    assert model.W_V.shape == (n_layers, n_heads, d_model, d_head)
    assert model.W_O.shape == (n_layers, n_heads, d_head, d_model)
    assert model.W_in.shape == (n_layers, d_model, d_mlp)
    assert model.W_out.shape == (n_layers, d_mlp, d_model)

    _, cache = model.run_with_cache(tokens)
    np.testing.assert_allclose(cache["hook_embed"][0], model.W_E[tokens[0]], atol=1e-6)
    np.testing.assert_allclose(cache["hook_pos_embed"][0], model.W_pos[: tokens.shape[1]], atol=1e-6)
    read = cache["normalized", 2, "ln1"]
    for key, weight, bias in (("q", model.W_Q, model.b_Q), ("k", model.W_K, model.b_K), ("v", model.W_V, model.b_V)):
        np.testing.assert_allclose(
            np.einsum("bpm,hmd->bphd", read, weight[2]) + bias[2], cache[key, 2], atol=1e-4, err_msg=key
        )
    attn_out = np.einsum("bphd,hdm->bpm", cache["z", 2], model.W_O[2]) + model.b_O[2]
    np.testing.assert_allclose(attn_out, cache["attn_out", 2], atol=1e-4)
    pre = cache["normalized", 2, "ln2"] @ model.W_in[2] + model.b_in[2]
    np.testing.assert_allclose(pre, cache["pre", 2], atol=1e-4)
    np.testing.assert_allclose(cache["post", 2] @ model.W_out[2] + model.b_out[2], cache["mlp_out", 2], atol=1e-4)


# Core Methods


def test_forward(model: HookedTransformer, tokens: jax.Array) -> None:
    logits = model(tokens)
    np.testing.assert_array_equal(model(tokens, return_type="logits"), logits)
    loss = model(tokens, return_type="loss")
    both = model(tokens, return_type="both")
    logits, both_loss = both

    assert logits.shape == (1, tokens.shape[1], model.cfg.d_vocab)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits[0, :-1]), tokens[0, 1:, None], axis=-1)
    np.testing.assert_allclose([loss, both_loss], -picked.mean(), rtol=1e-5)
    assert both.logits is logits


def test_forward_parameters(model: HookedTransformer, tokens: jax.Array) -> None:
    logits = model(tokens)
    np.testing.assert_allclose(model(input="The capital of France is"), logits, atol=1e-5)  # token tensor or string
    assert model(tokens, return_type=None) is None
    without = model("The capital of France is", prepend_bos=False)
    np.testing.assert_allclose(without, model(tokens[:, 1:]), atol=1e-5)
    residual = model(tokens, stop_at_layer=2)
    assert residual.shape == (*tokens.shape, model.cfg.d_model)
    np.testing.assert_allclose(model(residual, start_at_layer=2), logits, atol=1e-5)


def test_run_with_cache(model: HookedTransformer, tokens: jax.Array) -> None:
    logits, cache = model.run_with_cache(tokens)
    np.testing.assert_allclose(logits, model(tokens), atol=1e-5)

    # Selective caching (saves memory)
    logits, some = model.run_with_cache(tokens, names_filter=lambda name: "resid_post" in name)
    assert list(some.keys()) == [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    for name, activation in some.items():
        np.testing.assert_allclose(activation, cache[name], atol=1e-5)

    # Cache on CPU
    logits, on_cpu = model.run_with_cache(tokens, device="cpu")
    assert on_cpu.keys() == cache.keys()
    assert all(value.devices() == {jax.devices("cpu")[0]} for value in on_cpu.values())


def my_hook(activation, hook):
    # Modify activation
    activation = activation.at[:, :, 0].set(0)
    return activation


def test_run_with_hooks(model: HookedTransformer, tokens: jax.Array) -> None:
    logits = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_post", my_hook)])

    zeroed = model(tokens, stop_at_layer=2).at[:, :, 0].set(0)
    np.testing.assert_allclose(logits, model(zeroed, start_at_layer=2), atol=1e-4)
    assert float(jnp.abs(logits - model(tokens)).max()) > 1e-3


def test_generate(model: HookedTransformer) -> None:
    tokens = model.to_tokens("The movie was")
    output = model.generate(
        tokens, max_new_tokens=50, temperature=0.7, top_k=40, top_p=0.9, freq_penalty=1.0, use_past_kv_cache=True
    )

    np.testing.assert_array_equal(output[:, : tokens.shape[1]], tokens)
    assert tokens.shape[1] < output.shape[1] <= tokens.shape[1] + 50
    logits, counts = np.array(model(tokens))[0, -1], np.bincount(tokens[0], minlength=model.cfg.d_vocab)
    settings = {"max_new_tokens": 1, "top_k": 40, "top_p": 0.9}
    drawn = model.generate(tokens, temperature=0.7, freq_penalty=1.0, **settings)[0, -1]
    assert drawn in np.argsort(counts - logits / 0.7)[:40]  # the penalty comes after the temperature
    for freq_penalty in (1.0, 5000.0):
        best = (logits / 0.02 - freq_penalty * counts).argmax()
        assert model.generate(tokens, temperature=0.02, freq_penalty=freq_penalty, **settings)[0, -1] == best


def test_tokenization_methods(model: HookedTransformer) -> None:
    # String to tokens
    tokens = model.to_tokens("The world")  # [1, seq_len]
    assert tokens.shape == (1, 3)
    np.testing.assert_array_equal(model.to_tokens("The", prepend_bos=False), tokens[:, 1:2])

    # Tokens to string
    text = model.to_string(tokens)
    assert text == ["<|endoftext|>The world"]
    assert model.to_string(tokens[0]) == "<|endoftext|>The world"

    # Get string tokens (for debugging)
    str_tokens = model.to_str_tokens("The world")
    assert str_tokens == ["<|endoftext|>", "The", " world"]

    # Single token validation
    token_id = model.to_single_token(" Paris")  # Returns int or raises error
    assert type(token_id) is int
    assert model.to_string(jnp.array([token_id])) == " Paris"
    with pytest.raises(TokenizerError, match=r"'Hello world' is .* tokens, not one"):
        model.to_single_token("Hello world")


def test_hook_management(model: HookedTransformer, tokens: jax.Array) -> None:
    """As in the document, but for ``model =``: a model does not change, each method returns another."""
    before = model(tokens)

    # Clear all hooks
    model = model.reset_hooks()

    # Add permanent hook
    model = model.add_hook("blocks.0.hook_resid_post", my_hook)
    hooked = model(tokens)
    assert list(model.list_hooks()) == ["blocks.0.hook_resid_post"]

    # Remove specific hook
    model = model.remove_hook("blocks.0.hook_resid_post")
    np.testing.assert_array_equal(model(tokens), before)

    zeroed = model(tokens, stop_at_layer=1).at[:, :, 0].set(0)
    np.testing.assert_allclose(hooked, model(zeroed, start_at_layer=1), atol=1e-4)
    assert model.add_hook("blocks.0.hook_resid_post", my_hook).reset_hooks().list_hooks() == {}


# HookPoint


def test_hook_function_signature(model: HookedTransformer, tokens: jax.Array) -> None:
    from tljax import HookPoint

    seen = []

    def hook_fn(activation: jax.Array, hook: HookPoint) -> jax.Array:
        seen.append((type(hook), hook.name))
        # Modify activation
        return activation

    logits = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", hook_fn)])

    assert seen == [(HookPoint, "blocks.1.attn.hook_z")]
    np.testing.assert_allclose(logits, model(tokens), atol=1e-5)
    kept = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", lambda activation, hook: None)])
    np.testing.assert_allclose(kept, logits, atol=1e-5)
    with pytest.raises(HookError, match="must keep the shape"):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", lambda activation, hook: activation[0])])


@pytest.fixture(scope="module")
def clean_cache(model: HookedTransformer) -> ActivationCache:
    return model.run_with_cache(["The Louvre is in the city of", "Big Ben is in the city of"])[1]


@pytest.mark.parametrize("pattern", ["zero", "mean", "patch", "steer"])
def test_common_hook_patterns(model: HookedTransformer, clean_cache: ActivationCache, pattern: str) -> None:
    steering_vector = clean_cache["resid_post", 1][0, -1]

    # Zero ablation
    def zero_hook(act, hook):
        act = act.at[:, :, :].set(0)
        return act

    # Mean ablation
    def mean_hook(act, hook):
        act = act.at[:, :, :].set(act.mean(axis=0, keepdims=True))
        return act

    # Patch from cache
    def patch_hook(act, hook):
        act = act.at[:, 5, :].set(clean_cache[hook.name][:, 5, :])
        return act

    # Add steering vector
    def steer_hook(act, hook):
        act += 0.5 * steering_vector
        return act

    batch = model.to_tokens(["The Colosseum is in the city of", "The Prado is in the city of"])
    hook = {"zero": zero_hook, "mean": mean_hook, "patch": patch_hook, "steer": steer_hook}[pattern]
    logits = model.run_with_hooks(batch, fwd_hooks=[("blocks.1.hook_resid_post", hook)])

    resid = np.array(model(batch, stop_at_layer=2))
    if pattern == "zero":
        resid[:] = 0
    elif pattern == "mean":
        resid[:] = resid.mean(0)
    elif pattern == "patch":
        resid[:, 5] = clean_cache["resid_post", 1][:, 5]
    else:
        resid += 0.5 * np.asarray(steering_vector)
    np.testing.assert_allclose(logits, model(jnp.asarray(resid), start_at_layer=2), atol=1e-4)
    assert float(jnp.abs(logits - model(batch)).max()) > 1e-2


# Configuration


def test_hooked_transformer_config(model: HookedTransformer) -> None:
    attributes = {
        "n_layers": 4, "n_heads": 4, "d_model": 64, "d_head": 16, "d_mlp": 256, "d_vocab": 969, "n_ctx": 128,
        "act_fn": "gelu_new", "normalization_type": "LNPre",
    }  # fmt: skip
    assert isinstance(model.cfg, HookedTransformerConfig)
    assert {name: getattr(model.cfg, name) for name in attributes} == attributes
    unfolded = HookedTransformer.from_pretrained("tljax-tiny", fold_ln=False)
    assert unfolded.cfg.normalization_type == "LN"
