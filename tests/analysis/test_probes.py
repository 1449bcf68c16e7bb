"""Probes on a constructed concept: planted directions are found, scores are what they say, bad data is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import HookedTransformer
from tljax.analysis.probes import LinearProbe, logistic_probe, ridge_probe, sparse_probe
from tljax.errors import InputError

N, D, NEURONS = 600, 20, (3, 11)


@pytest.fixture(scope="module")
def concept() -> tuple[np.ndarray, np.ndarray]:
    """Activations in odd units, in which two neurons carry a label, and the label."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, N)
    features = rng.standard_normal((N, D))
    features[:, NEURONS[0]] += 3.0 * labels
    features[:, NEURONS[1]] -= 2.5 * labels
    return (features * rng.uniform(0.1, 20, D) + rng.normal(0, 5, D)).astype(np.float32), labels


def halves(concept: Any) -> Any:
    features, labels = concept
    return features[: N // 2], labels[: N // 2], features[N // 2 :], labels[N // 2 :]


def test_logistic_probe_finds_the_concept(concept: Any) -> None:
    train, train_labels, test, test_labels = halves(concept)
    probe = logistic_probe(train, train_labels)
    scores = probe.evaluate(test, test_labels)
    assert scores["accuracy"] > 0.95
    assert scores["auc"] > 0.99
    standardised = np.abs(np.asarray(probe.weights)) * train.std(axis=0)
    assert set(np.argsort(-standardised)[:2]) == set(NEURONS)


def test_logistic_probe_is_at_the_minimum(concept: Any) -> None:
    features, labels = concept
    probe = logistic_probe(features, labels, l2=0.05)
    scale = features.std(axis=0)

    def loss(weights: jax.Array, bias: jax.Array) -> jax.Array:
        odds = features @ weights + bias
        penalty = 0.05 / 2 * jnp.sum((weights * scale) ** 2)
        return jnp.mean(jax.nn.softplus(odds) - labels.astype(np.float32) * odds) + penalty

    by_weight, by_bias = jax.grad(loss, (0, 1))(probe.weights, probe.bias)
    assert float(jnp.abs(by_weight / scale).max()) < 1e-4
    assert abs(float(by_bias)) < 1e-4


@pytest.mark.parametrize("method", ["mean_difference", "l1"])
def test_sparse_probe_finds_the_neurons(concept: Any, method: str) -> None:
    train, train_labels, test, test_labels = halves(concept)
    probe = sparse_probe(train, train_labels, k=2, method=method)
    assert probe.neurons is not None
    assert tuple(np.asarray(probe.neurons)) == NEURONS
    assert set(np.flatnonzero(probe.weights)) == set(NEURONS)
    alone = sparse_probe(train, train_labels, k=1, method=method)
    assert probe.evaluate(test, test_labels)["accuracy"] > alone.evaluate(test, test_labels)["accuracy"] > 0.85


def test_l1_does_not_take_the_same_signal_twice() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 500)
    strong = labels * 2.0 + rng.standard_normal(500)
    copy = strong + 0.05 * rng.standard_normal(500)
    weak = labels * 1.2 + rng.standard_normal(500)
    features = np.stack([strong, copy, weak], axis=1)
    assert set(np.asarray(sparse_probe(features, labels, 2).neurons)) == {0, 1}
    assert 2 in np.asarray(sparse_probe(features, labels, 2, method="l1").neurons)


@pytest.mark.parametrize("n", [N, D // 2])
def test_ridge_is_the_closed_form(concept: Any, n: int) -> None:
    features = concept[0][:n]
    targets = np.random.default_rng(2).standard_normal((n, 3)).astype(np.float32)
    probe = ridge_probe(features, targets, l2=2.0)
    x, y = (a.astype(np.float64) - a.mean(axis=0, dtype=np.float64) for a in (features, targets))
    expected = np.linalg.solve(x.T @ x + 2.0 * np.eye(D), x.T @ y)
    np.testing.assert_allclose(probe.weights, expected, atol=2e-4)
    np.testing.assert_allclose(probe(features).mean(axis=0), targets.mean(axis=0), atol=1e-4)
    assert probe.evaluate(features, targets)["r2"] > 0
    one = ridge_probe(features, targets[:, 0], l2=2.0)
    np.testing.assert_allclose(one.weights, probe.weights[:, 0], atol=1e-5)


def test_ridge_without_penalty_is_exact_on_a_line() -> None:
    features = np.random.default_rng(3).standard_normal((50, 4)).astype(np.float32)
    targets = features @ np.array([1.0, -2.0, 0.5, 0.0], np.float32) + 7
    probe = ridge_probe(features, targets, l2=0.0)
    np.testing.assert_allclose(probe.weights, [1, -2, 0.5, 0], atol=1e-5)
    assert float(probe.bias) == pytest.approx(7, abs=1e-5)
    assert probe.evaluate(features, targets)["r2"] == pytest.approx(1)


def test_scores() -> None:
    probe = LinearProbe(weights=jnp.ones(1), bias=jnp.zeros(()))
    scores = probe.evaluate(np.array([[2.0], [1.0], [1.0], [-1.0], [-3.0]]), np.array([1, 1, 0, 1, 0]))
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores["f1"] == pytest.approx(4 / 6)
    assert scores["auc"] == pytest.approx((2 + 1.5 + 1) / 6)
    odds, labels = np.array([2, 1, 1, -1, -3.0]), np.array([1, 1, 0, 1, 0])
    assert scores["loss"] == pytest.approx(np.mean(np.log1p(np.exp(odds)) - labels * odds))


def test_a_probe_on_a_cache_reads_which_token_it_stands_on(tiny: HookedTransformer) -> None:
    tokens = np.random.default_rng(0).integers(300, 310, (64, 8))
    _, cache = tiny.run_with_cache(tokens)
    activations, labels = cache["resid_post", 0], (tokens >= 305).astype(np.int32)
    probe = logistic_probe(activations[:48], labels[:48])
    assert probe(activations).shape == tokens.shape
    assert probe.evaluate(activations[48:], labels[48:])["accuracy"] > 0.9


def test_probes_run_under_jit_and_vmap(concept: Any) -> None:
    features, labels = concept
    layers = np.stack([features, features[:, ::-1]])
    probes = jax.jit(jax.vmap(lambda x: logistic_probe(x, labels)))(layers)
    alone = logistic_probe(layers[1], labels)
    np.testing.assert_allclose(probes.weights[1], alone.weights, atol=2e-3)


def test_constant_features_are_ignored(concept: Any) -> None:
    features = np.concatenate([concept[0], np.full((N, 1), 7, np.float32)], axis=1)
    assert float(logistic_probe(features, concept[1]).weights[-1]) == 0


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda x, y: logistic_probe(x, y + 1), r"Labels must be 0 and 1, with examples of both; got \[1.0, 2.0\]"),
        (lambda x, y: logistic_probe(x, y * 0), r"examples of both; got \[0.0\]"),
        (lambda x, y: logistic_probe(x, y[:-1]), r"got shapes \(600, 20\) and \(599,\)"),
        (lambda x, y: logistic_probe(x[0], y[0]), "one label for each example"),
        (lambda x, y: logistic_probe(x, y, l2=-1.0), "l2=-1.0 must be 0 or more"),
        (lambda x, y: ridge_probe(np.where(x > 9, np.nan, x), y), "not finite"),
        (lambda x, y: sparse_probe(x, y, 21), "k=21 is out of range: there are 20 features"),
        (lambda x, y: sparse_probe(x, y, 2, method="best"), "'mean_difference', 'l1'; got 'best'"),
        (lambda x, y: logistic_probe(x, y)(x[:, :3]), "reads 20 features; got activations of shape"),
    ],
)
def test_refusals(concept: Any, act: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        act(*concept)
