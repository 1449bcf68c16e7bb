"""The patching loops that tutorials teach, as one call each and as the loop in JAX spelling: the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import HookedTransformer
from tljax.errors import InputError
from tljax.patching import PatchingResult, sweep

CLEAN_PROMPT = "The Louvre is in the city of"
CORRUPTED_PROMPT = "The Colosseum is in the city of"


def assert_same(result: PatchingResult, loop: object) -> None:
    """Within 1e-5 of the size of the metric, and measured the fast way: two dot products for each site."""
    assert result.report is not None
    np.testing.assert_allclose(result.values, loop, rtol=1e-5, atol=1e-5)
    assert result.report.metric == "replayed"
    assert "one position unembedded" in result.report.reductions
    assert float(np.ptp(np.asarray(loop))) > 10  # the sweep found something


def test_workflow_1(tiny: HookedTransformer) -> None:
    model = tiny
    clean_tokens = model.to_tokens(CLEAN_PROMPT)
    corrupted_tokens = model.to_tokens(CORRUPTED_PROMPT)
    _, clean_cache = model.run_with_cache(clean_tokens)
    paris = model.to_single_token(" Paris")
    rome = model.to_single_token(" Rome")

    def metric(logits: jax.Array) -> jax.Array:
        return logits[0, -1, paris] - logits[0, -1, rome]

    results = jnp.zeros((model.cfg.n_layers, clean_tokens.shape[1]))
    for layer in range(model.cfg.n_layers):
        for pos in range(clean_tokens.shape[1]):

            def patch_hook(activation: jax.Array, hook: object, pos: int = pos) -> jax.Array:
                return activation.at[0, pos].set(clean_cache[hook.name][0, pos])  # type: ignore[attr-defined]

            patched_logits = model.run_with_hooks(
                corrupted_tokens, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", patch_hook)]
            )
            results = results.at[layer, pos].set(metric(patched_logits))

    swept = sweep(model, corrupted_tokens, clean_cache, metric, "resid_post", axes=("pos",))
    assert swept.axis_names == ("layer", "pos")
    assert_same(swept, results)


def test_tutorial_2(tiny: HookedTransformer) -> None:
    model = tiny
    clean_tokens = model.to_tokens(CLEAN_PROMPT)
    corrupted_tokens = model.to_tokens(CORRUPTED_PROMPT)
    clean_logits, clean_cache = model.run_with_cache(clean_tokens)
    paris_token = model.to_single_token(" Paris")
    rome_token = model.to_single_token(" Rome")

    def logit_diff(logits: jax.Array) -> float:
        return (logits[0, -1, paris_token] - logits[0, -1, rome_token]).item()

    by_layer = []
    for layer in range(model.cfg.n_layers):

        def patch_layer(activation: jax.Array, hook: object, layer: int = layer) -> jax.Array:
            return activation.at[:].set(clean_cache["resid_post", layer])

        patched_logits = model.run_with_hooks(
            corrupted_tokens, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", patch_layer)]
        )
        by_layer.append(logit_diff(patched_logits))

    seq_len = clean_tokens.shape[1]
    by_position = np.zeros((model.cfg.n_layers, seq_len))
    for layer in range(model.cfg.n_layers):
        for pos in range(seq_len):

            def patch_position(activation: jax.Array, hook: object, layer: int = layer, pos: int = pos) -> jax.Array:
                return activation.at[:, pos, :].set(clean_cache["resid_post", layer][:, pos, :])

            patched_logits = model.run_with_hooks(
                corrupted_tokens, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", patch_position)]
            )
            by_position[layer, pos] = logit_diff(patched_logits)

    layers = sweep(model, corrupted_tokens, clean_cache, logit_diff, "resid_post", axes=())
    assert layers.axis_names == ("layer",)
    np.testing.assert_allclose(layers.values, by_layer, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layers.values, [logit_diff(clean_logits)] * model.cfg.n_layers, rtol=1e-5, atol=1e-5)
    assert layers.report is not None
    assert layers.report.metric == "replayed"
    assert "one position unembedded" in layers.report.reductions

    positions = sweep(model, corrupted_tokens, clean_cache, logit_diff, "resid_post", axes=("pos",))
    assert_same(positions, by_position)
    np.testing.assert_allclose(positions.baseline, logit_diff(model(corrupted_tokens)), rtol=1e-5)


def test_prompts_of_different_lengths_are_refused(tiny: HookedTransformer) -> None:
    """The seeds' own pair, which this tokenizer splits into 9 and 8 tokens: an assignment would clamp in silence."""
    _, clean_cache = tiny.run_with_cache("The Eiffel Tower is in the city of")
    with pytest.raises(InputError, match="equally many tokens"):
        sweep(tiny, CORRUPTED_PROMPT, clean_cache, lambda logits: logits[0, -1, 0], "resid_post")
