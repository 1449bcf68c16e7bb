"""Steps that go through active features alone: equal to the products, whichever of them a batch is given to."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax.dictionaries.training import Preparation, TrainingConfig, gradients, initial_parameters, pieces
from tljax.dictionaries.training import sparse_products as products
from tljax.dictionaries.training.coefficients import numbers_of, structure_of
from tljax.dictionaries.training.gradients import loss_and_gradients
from tljax.dictionaries.training.step import initial_state, train_step, train_step_of_stack

D, F, TOKENS = 12, 72, 24

CONFIGS = {
    "standard": {"l1_coefficient": 0.3},
    "standard p=0.5": {"l1_coefficient": 0.3, "lp_norm": 0.5},
    "gated": {"architecture": "gated", "l1_coefficient": 0.3},
    "jumprelu": {"architecture": "jumprelu", "jumprelu_bandwidth": 0.5, "l0_target": 4.0},
    "jumprelu tanh": {
        "architecture": "jumprelu", "jumprelu_sparsity_loss": "tanh", "jumprelu_ste_to_input": True,
        "l0_coefficient": 0.1,
    },
    "topk": {"architecture": "topk", "k": 3},
    "abstopk": {"architecture": "abstopk", "k": 3},
    "batchtopk": {"architecture": "batchtopk", "k": 3},
    "matryoshka": {"architecture": "batchtopk", "k": 3, "matryoshka_widths": (6, 40)},
    "transcoder": {"architecture": "topk", "k": 3, "transcoder": True, "skip": True, "d_out": 6},
    "crosscoder": {"n_sources": 2, "l1_coefficient": 0.3},
}  # fmt: skip


@pytest.fixture
def sparse(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets whether programs traced from now on look for active features, of so small a dictionary too."""
    monkeypatch.setattr(gradients, "_CHUNK_BYTES", 4 * F * 8)  # eight rows at once
    monkeypatch.setattr(pieces, "room", lambda tokens, features: 12)  # of which one may have all features
    if jax.default_backend() != "cpu":
        pytest.skip("features are gone through one by one on a CPU only")

    def choose(yes: bool) -> None:
        jax.clear_caches()
        monkeypatch.setattr(products, "_LEAST", 0 if yes else 2**60)

    yield choose
    monkeypatch.undo()
    jax.clear_caches()


def _case(name: str, bias: float) -> tuple[TrainingConfig, dict[str, jax.Array], jax.Array, jax.Array]:
    """A few features are active in most tokens, none in the first, most in the second."""
    cfg = TrainingConfig(**({"d_in": D, "d_sae": F, "adam_eps": 1e-3} | CONFIGS[name]))
    rng = np.random.default_rng(sum(map(ord, name)))
    shapes = jax.eval_shape(lambda: initial_parameters(cfg))
    params = {key: rng.normal(size=leaf.shape).astype(np.float32) * 0.3 for key, leaf in shapes.items()}
    for key in params.keys() & {"b_enc", "b_gate"}:
        params[key] = params[key] * 0.1 + np.float32(bias)
    if "threshold" in params:
        params["threshold"] = np.abs(params["threshold"])
    x = rng.normal(size=(TOKENS, cfg.width_in)).astype(np.float32)
    x[0] = params["b_dec"] if cfg.subtracts_b_dec else 0
    x[1] = 40 * params["W_enc"].sum(axis=1)
    y = rng.normal(size=(TOKENS, cfg.width_out)).astype(np.float32) if cfg.transcoder else x
    return cfg, {key: jnp.asarray(value) for key, value in params.items()}, jnp.asarray(x), jnp.asarray(y)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_the_products(name: str, sparse: Any) -> None:
    some, none = np.random.default_rng(1).random(F) < 0.3, np.zeros(F, bool)
    cases = [(*_case(name, bias), dead) for bias, dead in ((-1.5, none), (-1.5, some), (2.0, none))]
    found = []
    for yes in (True, False):
        sparse(yes)
        function = jax.jit(loss_and_gradients, static_argnums=5)
        found.append([
            function(params, x, y, numbers_of(cfg, 1), jnp.asarray(dead), structure_of(cfg, cfg.k), jnp.float32(0.7))
            for cfg, params, x, y, dead in cases
        ])  # fmt: skip
    for (grads, loss), (wanted, expected) in zip(*found, strict=True):
        np.testing.assert_array_equal(loss.outcome.fired, expected.outcome.fired)
        for term, value in expected.outcome.terms.items():
            np.testing.assert_allclose(loss.outcome.terms[term], value, rtol=2e-6, err_msg=term)
        np.testing.assert_allclose(loss.total, expected.total, rtol=2e-6)
        assert grads.keys() == wanted.keys() == cases[0][1].keys()
        for key, value in wanted.items():
            np.testing.assert_allclose(grads[key], value, atol=2e-6 * float(jnp.abs(value).max()), err_msg=key)


@pytest.mark.parametrize("name", ["batchtopk", "standard"])
def test_a_step_is_that_of_the_products_alone_and_in_a_stack(name: str, sparse: Any) -> None:
    cfg, params, x, _ = _case(name, -1.5)
    numbers, structure = numbers_of(cfg, 100), structure_of(cfg, cfg.k)
    states = []
    for yes in (True, False):
        sparse(yes)
        start = jax.tree.map(jnp.array, initial_state(params, cfg, None))
        states.append(train_step(start, x, None, numbers, Preparation(), structure, None))
    sparse(True)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (initial_state(params, cfg, None), numbers))
    stack = train_step_of_stack(stacked[0], x, None, stacked[1], Preparation(), structure, None, 1)
    for one in (states[0], jax.tree.map(lambda leaf: leaf[1], stack)):
        for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(states[1]), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=5e-6 * max(1.0, float(jnp.abs(theirs).max())))


@pytest.mark.parametrize("kind", ["few", "a full token", "too many", "none"])
def test_pieces_hold_what_is_active_and_nothing_else_is_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces.os, "cpu_count", lambda: 1)
    rng = np.random.default_rng(2)
    tokens, features = 70, 1000  # words of 32 features do not come out even
    active = rng.random((tokens, features)) < {"few": 0.01, "a full token": 0.005, "too many": 0.3, "none": 0}[kind]
    if kind == "a full token":
        active[3], active[20:60], active[69, -1] = True, False, True
    found = jax.jit(pieces.find_pieces)(jnp.asarray(active))
    f, W = rng.normal(size=active.shape).astype(np.float32), rng.normal(size=(features, 5)).astype(np.float32)
    g = rng.normal(size=(tokens, 5)).astype(np.float32)
    (output, pull) = jax.vjp(lambda f, W: products.decoded(f, W, found), jnp.asarray(f), jnp.asarray(W))
    to_f, to_W = pull(jnp.asarray(g))
    assert bool(found.fits) == (kind != "too many")
    kept = active if found.fits else np.ones_like(active)
    if found.fits:
        live = np.asarray(found.live)
        rows = np.broadcast_to(np.asarray(found.rows)[:, None], live.shape)[live]
        np.testing.assert_array_equal(np.stack([rows, np.asarray(found.columns)[live]]), np.nonzero(active))
    np.testing.assert_allclose(output, (f * kept) @ W, atol=1e-4)
    np.testing.assert_allclose(to_f, (g @ W.T) * kept, atol=1e-4)
    np.testing.assert_allclose(to_W, (f * kept).T @ g, atol=1e-4)
