"""The document "TransformerLens API Reference": ActivationCache, patching and FactoredMatrix, in JAX spelling."""

import functools

import compare
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import ActivationCache, HookedTransformer
from tljax.errors import InputError

pytestmark = pytest.mark.xdist_group("documents")


@pytest.fixture(scope="module")
def tokens(model: HookedTransformer) -> jax.Array:
    return model.to_tokens("The Colosseum is in the city of")


@pytest.fixture(scope="module")
def cache(model: HookedTransformer, tokens: jax.Array) -> ActivationCache:
    return model.run_with_cache(tokens)[1]


# ActivationCache


def test_accessing_activations(model: HookedTransformer, tokens: jax.Array) -> None:
    logits, cache = model.run_with_cache(tokens)  # noqa: RUF059

    # By name and layer
    residual = cache["resid_post", 2]
    attention = cache["pattern", 1]
    mlp_out = cache["mlp_out", 3]

    assert attention is cache["blocks.1.attn.hook_pattern"]
    assert mlp_out is cache["blocks.3.hook_mlp_out"]
    # Full name string
    assert residual is cache["blocks.2.hook_resid_post"]
    np.testing.assert_allclose(residual, model(tokens, stop_at_layer=3), atol=1e-5)
    np.testing.assert_allclose(attention.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(cache["resid_mid", 3] + mlp_out, cache["resid_post", 3], atol=1e-4)


def test_cache_keys(model: HookedTransformer, cache: ActivationCache) -> None:
    batch, pos, d_model, head, d_head = 1, 8, 64, 4, 16
    q_pos = k_pos = pos
    for layer in range(model.cfg.n_layers):
        assert cache["hook_embed"].shape == (batch, pos, d_model)
        assert cache["hook_pos_embed"].shape == (batch, pos, d_model)
        assert cache["resid_pre", layer].shape == (batch, pos, d_model)
        assert cache["resid_mid", layer].shape == (batch, pos, d_model)
        assert cache["resid_post", layer].shape == (batch, pos, d_model)
        assert cache["attn_out", layer].shape == (batch, pos, d_model)
        assert cache["mlp_out", layer].shape == (batch, pos, d_model)
        assert cache["pattern", layer].shape == (batch, head, q_pos, k_pos)
        assert cache["attn_scores", layer].shape == (batch, head, q_pos, k_pos)
        assert cache["q", layer].shape == (batch, pos, head, d_head)
        assert cache["k", layer].shape == (batch, pos, head, d_head)
        assert cache["v", layer].shape == (batch, pos, head, d_head)
        assert cache["z", layer].shape == (batch, pos, head, d_head)


def test_cache_keys_mean_what_the_document_says(cache: ActivationCache) -> None:
    close = functools.partial(compare.close, atol=1e-4, rtol=1e-7)
    close(cache["hook_embed"] + cache["hook_pos_embed"], cache["resid_pre", 0])
    close(cache["resid_pre", 1] + cache["attn_out", 1], cache["resid_mid", 1])  # after attention
    close(cache["resid_mid", 1] + cache["mlp_out", 1], cache["resid_post", 1])  # after MLP
    scores = np.einsum("bqhd,bkhd->bhqk", cache["q", 1], cache["k", 1]) / 4
    causal = np.tril(np.ones(scores.shape[-2:], bool))
    close(cache["attn_scores", 1], np.where(causal, scores, -jnp.inf))  # pre-softmax
    close(cache["pattern", 1], jax.nn.softmax(cache["attn_scores", 1], axis=-1))  # post-softmax
    close(cache["z", 1], np.einsum("bhqk,bkhd->bqhd", cache["pattern", 1], cache["v", 1]))


@pytest.mark.parametrize("mode", ["attn", "mlp", "full"])
def test_decompose_resid(model: HookedTransformer, cache: ActivationCache, mode: str) -> None:
    components, labels = cache.decompose_resid(
        layer=2,
        return_labels=True,
        mode=mode,  # or "mlp" or "full"
    )

    assert components.shape == (len(labels), 1, 8, model.cfg.d_model)
    kinds = {"attn": ["attn"], "mlp": ["mlp"], "full": ["attn", "mlp"]}[mode]
    assert labels == ["embed", "pos_embed", *(f"{layer}_{kind}_out" for layer in range(2) for kind in kinds)]
    others = sum(cache[f"{kind}_out", layer] for kind in {"attn", "mlp"} - set(kinds) for layer in range(2))
    np.testing.assert_allclose(components.sum(0) + others, cache["resid_pre", 2], atol=1e-4)


def test_accumulated_resid(model: HookedTransformer, cache: ActivationCache) -> None:
    accumulated = cache.accumulated_resid(
        layer=None,  # All layers
        incl_mid=False,
        apply_ln=True,  # Apply final LayerNorm
    )

    stream = [cache["resid_pre", 0], *(cache["resid_post", layer] for layer in range(4))]
    raw = cache.accumulated_resid(layer=None, incl_mid=False)
    np.testing.assert_allclose(raw, jnp.stack(stream), atol=1e-5)
    centred = np.asarray(raw - raw.mean(-1, keepdims=True))
    normalised = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + model.cfg.eps)
    np.testing.assert_allclose(accumulated, normalised, atol=1e-4)
    np.testing.assert_allclose(accumulated[-1], model.ln_final(cache["resid_post", 3]), atol=1e-4)


def test_logit_attrs(model: HookedTransformer, tokens: jax.Array, cache: ActivationCache) -> None:
    residual_stack = cache.decompose_resid(layer=None, mode="full")
    target_tokens = jnp.array([model.to_single_token(" Rome")])
    incorrect_tokens = jnp.array([model.to_single_token(" Paris")])

    attrs = cache.logit_attrs(residual_stack, tokens=target_tokens, incorrect_tokens=incorrect_tokens)

    assert attrs.shape == residual_stack.shape[:-1]
    logits, bias = np.asarray(model(tokens)), np.asarray(model.b_U)
    difference = logits[..., target_tokens[0]] - logits[..., incorrect_tokens[0]]
    bias = bias[target_tokens] - bias[incorrect_tokens]
    biases = cache.decompose_resid(layer=None).sum(0)  # the parts leave out nothing but the unembedding's bias
    np.testing.assert_allclose(biases, cache["resid_post", 3], atol=1e-4)
    np.testing.assert_allclose(attrs.sum(0) + bias, difference, atol=1e-3)
    assert float(difference[0, -1]) > 5


def test_stack_head_results(model: HookedTransformer, cache: ActivationCache) -> None:
    """The document's shape has layers and heads on two axes; TransformerLens and tljax have them on one."""
    head_results = cache.stack_head_results(
        layer=-1,  # All layers
        pos_slice=None,  # All positions
    )
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    assert head_results.shape == (n_layers * n_heads, 1, 8, model.cfg.d_model)
    head_results = head_results.reshape(n_layers, n_heads, *head_results.shape[1:])
    # Shape: [n_layers, n_heads, batch, pos, d_model]
    for layer in range(n_layers):
        expected = np.einsum("bphd,hdm->hbpm", cache["z", layer], model.W_O[layer])
        np.testing.assert_allclose(head_results[layer], expected, atol=1e-4)
        out = head_results[layer].sum(0) + model.b_O[layer]
        np.testing.assert_allclose(out, cache["attn_out", layer], atol=1e-4)


def test_utility_methods(model: HookedTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    _, cache = model.run_with_cache(model.to_tokens("The Colosseum is in the city of"))

    # Move cache to device
    cache = cache.to("cpu")
    assert all(value.devices() == {jax.devices("cpu")[0]} for value in cache.values())

    # Remove batch dimension (for batch_size=1)
    batched = cache
    cache = cache.remove_batch_dim()
    np.testing.assert_array_equal(cache["pattern", 1], batched["pattern", 1][0])

    # Get all keys
    keys = cache.keys()
    assert len(keys) == len([point for point in model.hook_points() if not point.optional])

    # Iterate
    for name, activation in cache.items():
        print(name, activation.shape)
    assert f"blocks.3.hook_resid_post {(8, model.cfg.d_model)}" in capsys.readouterr().out.split("\n")


# Utility Functions


def test_patching_module(model: HookedTransformer) -> None:
    from tljax import patching

    corrupted = model.to_tokens("The Colosseum is in the city of")
    _, clean_cache = model.run_with_cache(model.to_tokens("The Louvre is in the city of"))
    paris, rome = model.to_single_token(" Paris"), model.to_single_token(" Rome")

    def metric_fn(logits):
        return logits[0, -1, paris] - logits[0, -1, rome]

    def patch_fn(corrupted_activation, index, clean_activation):
        layer, pos = index  # noqa: RUF059
        corrupted_activation = corrupted_activation.at[:, pos].set(clean_activation[:, pos])
        return corrupted_activation

    # Generic activation patching
    results = patching.generic_activation_patch(
        model=model,
        corrupted_tokens=corrupted,
        clean_cache=clean_cache,
        patching_metric=metric_fn,
        patch_setter=patch_fn,
        activation_name="resid_post",
        index_axis_names=("layer", "pos"),
    )

    assert results.shape == (model.cfg.n_layers, corrupted.shape[1])
    loop = np.zeros(results.shape)
    for layer in range(model.cfg.n_layers):
        for pos in (0, 2, 7):
            patch = clean_cache["resid_post", layer][:, pos]
            resid = model(corrupted, stop_at_layer=layer + 1).at[:, pos].set(patch)
            loop[layer, pos] = metric_fn(model(resid, start_at_layer=layer + 1))
    np.testing.assert_allclose(results[:, [0, 2, 7]], loop[:, [0, 2, 7]], atol=1e-3)
    assert float(results[-1, -1]) > 0 > float(metric_fn(model(corrupted)))


def test_patching_module_in_place_says_what_to_write(model: HookedTransformer) -> None:
    from tljax import patching

    corrupted = model.to_tokens("The Colosseum is in the city of")

    def patch_fn(corrupted_activation, index, clean_activation):
        corrupted_activation[:, index[1]] = clean_activation[:, index[1]]
        return corrupted_activation

    with pytest.raises(InputError, match=r"return corrupted_act.at\[:, pos\].set\(clean_act\[:, pos\]\)"):
        patching.generic_activation_patch(
            model=model,
            corrupted_tokens=corrupted,
            clean_cache=model.run_with_cache(corrupted)[1],
            patching_metric=lambda logits: logits[0, -1, 0],
            patch_setter=patch_fn,
            activation_name="resid_post",
            index_axis_names=("layer", "pos"),
        )


def test_factored_matrix(model: HookedTransformer) -> None:
    from tljax import FactoredMatrix

    layer = 1

    # QK circuit
    QK = FactoredMatrix(model.W_Q[layer], model.W_K[layer].mT)

    # OV circuit
    OV = FactoredMatrix(model.W_V[layer], model.W_O[layer])

    # Get full matrix
    full = QK.AB

    # SVD decomposition
    U, S, V = QK.svd()

    assert OV.shape == full.shape == (model.cfg.n_heads, model.cfg.d_model, model.cfg.d_model)
    np.testing.assert_allclose(full, np.einsum("hmd,hnd->hmn", model.W_Q[layer], model.W_K[layer]), atol=1e-4)
    np.testing.assert_allclose(OV.AB, np.einsum("hmd,hdn->hmn", model.W_V[layer], model.W_O[layer]), atol=1e-4)
    np.testing.assert_allclose((U * S[:, None]) @ V.mT, full, atol=1e-3)
    np.testing.assert_allclose(S, np.linalg.svd(full, compute_uv=False)[:, : model.cfg.d_head], rtol=1e-3, atol=1e-3)


def test_factored_matrix_as_the_document_has_it(model: HookedTransformer) -> None:
    """``.T`` of all heads at once reverses three axes, here as in PyTorch; the line is right for one head."""
    from tljax import FactoredMatrix

    with pytest.raises(InputError, match=r"\.T reverses all of them: write .mT, or use model.QK"):
        FactoredMatrix(model.W_Q[1], model.W_K[1].T)
    QK = FactoredMatrix(model.W_Q[1, 2], model.W_K[1, 2].T)
    np.testing.assert_allclose(QK.AB, model.W_Q[1, 2] @ model.W_K[1, 2].T, atol=1e-4)
