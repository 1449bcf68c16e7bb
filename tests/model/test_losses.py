"""Loss and accuracy against sums written out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from tljax import lm_accuracy, lm_cross_entropy_loss

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.standard_normal((2, 4, 5)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(0, 5, (2, 4)), jnp.int32)


def each_loss() -> np.ndarray:
    logits = np.asarray(LOGITS, np.float64)
    return np.array(
        [[np.log(np.exp(logits[b, p]).sum()) - logits[b, p, TOKENS[b, p + 1]] for p in range(3)] for b in range(2)]
    )


def test_loss_is_the_mean_over_next_tokens() -> None:
    np.testing.assert_allclose(lm_cross_entropy_loss(LOGITS, TOKENS, per_token=True), each_loss(), atol=1e-6)
    assert float(lm_cross_entropy_loss(LOGITS, TOKENS)) == pytest.approx(each_loss().mean(), abs=1e-6)


def test_pairs_that_touch_padding_do_not_count() -> None:
    mask = jnp.asarray([[0, 1, 1, 1], [1, 1, 1, 0]])
    expected = each_loss()
    expected[0, 0] = expected[1, 2] = 0
    np.testing.assert_allclose(lm_cross_entropy_loss(LOGITS, TOKENS, mask, per_token=True), expected, atol=1e-6)
    assert float(lm_cross_entropy_loss(LOGITS, TOKENS, mask)) == pytest.approx(expected.sum() / 4, abs=1e-6)


def test_accuracy_counts_hits() -> None:
    guesses = np.asarray(LOGITS)[:, :-1].argmax(-1)
    hits = guesses == np.asarray(TOKENS)[:, 1:]
    np.testing.assert_array_equal(lm_accuracy(LOGITS, TOKENS, per_token=True), hits)
    assert float(lm_accuracy(LOGITS, TOKENS)) == pytest.approx(hits.mean())
