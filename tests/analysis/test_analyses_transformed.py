"""Lenses, attributions and detectors under ``jit`` with the cache as an argument, and under ``vmap`` over prompts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import TOKENS, build

from tljax import ActivationCache, HookedTransformer
from tljax.analysis.direct_logit_attribution import direct_logit_attribution
from tljax.analysis.head_detector import HEAD_NAMES, compute_head_attention_similarity_score, detect_head
from tljax.analysis.head_scores import head_scores
from tljax.analysis.jacobian_lens import JacobianLens
from tljax.analysis.logit_lens import LensReadout, logit_lens
from tljax.analysis.patchscopes import patchscope
from tljax.analysis.tuned_lens import TunedLens

Lens = TunedLens | JacobianLens | None


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return build("gpt2", n_layers=3)


@pytest.fixture(scope="module")
def cache(model: HookedTransformer) -> ActivationCache:
    return model.run_with_cache(TOKENS)[1]


@pytest.fixture(scope="module", params=["logit", "tuned", "jacobian"])
def lens(request: pytest.FixtureRequest, model: HookedTransformer) -> Lens:
    if request.param == "tuned":
        return TunedLens.fit(model, TOKENS, steps=3, batch_size=2)
    return JacobianLens.fit(model, TOKENS, skip_first_positions=1) if request.param == "jacobian" else None


def similarity(model: HookedTransformer, cache: ActivationCache) -> jax.Array:
    """Scores ``[head, ...]``."""
    size = TOKENS.shape[1]
    score = compute_head_attention_similarity_score(
        cache["pattern", 1], np.tri(size, k=-1), exclude_bos=True, exclude_current_token=False, error_measure="mul"
    )
    return jnp.moveaxis(score, -1, 0)


ANALYSES: dict[str, Callable[[HookedTransformer, ActivationCache], jax.Array]] = {
    **{
        unit: (lambda model, cache, unit=unit: direct_logit_attribution(
            model, answer_tokens=3, incorrect_tokens=5, unit=unit, pos=None, cache=cache
        ).attribution)
        for unit in ("component", "head", "neuron", "layer")
    },
    "similarity": similarity,
}  # fmt: skip
"""Each returns ``[part, batch, ...]``, or ``[part, ...]`` of a cache without a batch axis."""


@pytest.mark.parametrize("name", ANALYSES)
def test_analyses_of_a_cache(name: str, model: HookedTransformer, cache: ActivationCache) -> None:
    analyse = ANALYSES[name]
    expected = analyse(model, cache)
    jitted = jax.jit(lambda model, cache: analyse(model, cache.with_model(model)))(model, cache)
    np.testing.assert_allclose(jitted, expected, atol=2e-5)
    mapped = jax.vmap(lambda one: analyse(model, one.with_model(model)))(cache)
    np.testing.assert_allclose(jnp.moveaxis(mapped, 0, 1), expected, atol=2e-5)


def same(found: LensReadout, expected: LensReadout, shift: Callable[[jax.Array], jax.Array] = lambda x: x) -> None:
    for name in ("top_ids", "top_log_probs", "entropy", "target_ranks", "target_log_probs"):
        value: Any = getattr(found, name)
        np.testing.assert_allclose(shift(value), getattr(expected, name), atol=2e-5, err_msg=name)


def test_lenses_of_a_cache(lens: Lens, model: HookedTransformer, cache: ActivationCache) -> None:
    def read(model: HookedTransformer, lens: Lens, cache: ActivationCache) -> LensReadout:
        return logit_lens(model, cache=cache.with_model(model), lens=lens, targets=[3, 7])

    expected = read(model, lens, cache)
    same(jax.jit(read)(model, lens, cache), expected)
    same(jax.vmap(lambda one: read(model, lens, one))(cache), expected, lambda value: jnp.moveaxis(value, 0, 1))


def test_lenses_of_prompts(lens: Lens, model: HookedTransformer) -> None:
    expected = logit_lens(model, TOKENS, lens=lens, targets=[3, 7])
    mapped = jax.jit(jax.vmap(lambda prompt: logit_lens(model, prompt[None], lens=lens, targets=[3, 7])))(TOKENS)
    same(mapped, expected, lambda value: jnp.moveaxis(value[:, :, 0], 0, 1))


def test_attribution_of_prompts(model: HookedTransformer) -> None:
    expected = direct_logit_attribution(model, TOKENS, 3).attribution
    mapped = jax.vmap(lambda prompt: direct_logit_attribution(model, prompt[None], 3).attribution[:, 0])(TOKENS)
    np.testing.assert_allclose(mapped.T, expected, atol=2e-5)


def test_patchscopes_of_prompts(model: HookedTransformer) -> None:
    target = TOKENS[1]
    expected = [patchscope(model, prompt, target, top_k=3).top_log_probs for prompt in TOKENS]
    mapped = jax.jit(jax.vmap(lambda prompt: patchscope(model, prompt, target, top_k=3).top_log_probs))(TOKENS)
    np.testing.assert_allclose(mapped, jnp.stack(expected), atol=2e-5)


@pytest.mark.parametrize("pattern", [*HEAD_NAMES, np.tri(TOKENS.shape[1], k=-1)], ids=[*HEAD_NAMES, "matrix"])
def test_detected_heads_of_prompts(pattern: Any, model: HookedTransformer) -> None:
    tokens = jnp.asarray(TOKENS).at[:, -3:].set(TOKENS[:, :3])
    alone = [detect_head(model, prompt, pattern) for prompt in tokens]
    mapped = jax.jit(jax.vmap(lambda prompt: detect_head(model, prompt, pattern)))(tokens)
    np.testing.assert_allclose(mapped, jnp.stack(alone), atol=1e-6)
    _, own = model.run_with_cache(tokens[:1])
    jitted = jax.jit(lambda model, cache: detect_head(model, tokens[0], pattern, cache=cache))(model, own)
    np.testing.assert_allclose(jitted, alone[0], atol=1e-6)


def test_scores_of_heads(model: HookedTransformer) -> None:
    jitted = jax.jit(lambda model: head_scores(model, length=4, batch_size=2))(model)
    for found, expected in zip(
        jax.tree.leaves(jitted), jax.tree.leaves(head_scores(model, length=4, batch_size=2)), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-6)
