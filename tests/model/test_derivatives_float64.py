"""Derivatives at every hook point at once against finite differences in double precision, for every kind of model."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from double_precision import double_precision
from variants import BASE, TOKENS, VARIANTS, randomised_params

from tljax import Add, HookedTransformer, HookedTransformerConfig
from tljax.patching import LogProb

STEP, TOLERANCE = 1e-6, 1e-6
METRIC = LogProb(3)


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with double_precision():
        yield


def directions(model: HookedTransformer, seed: int) -> dict[str, np.ndarray]:
    """A random direction at every point that has a gradient."""
    rng = np.random.default_rng(seed)
    points = [point for point in model.hook_points() if not point.optional and not point.holds_numbers]
    return {point.name: rng.standard_normal(point.shape(*TOKENS.shape)) for point in points}


def dot(a: Any, b: Any) -> float:
    return float(sum(np.vdot(np.asarray(a[name]), np.asarray(b[name])) for name in b))


@pytest.mark.parametrize("kind", VARIANTS)
def test_directional_derivative(kind: str) -> None:
    """All points move at once: forward mode, reverse mode and a central difference agree."""
    cfg = HookedTransformerConfig(**(BASE | VARIANTS[kind] | {"dtype": "float64"}))
    model = HookedTransformer(cfg, params=randomised_params(cfg))
    along = directions(model, 0)

    def run(step: float) -> tuple[jax.Array, jax.Array]:
        logits = model.run_with_hooks(TOKENS, fwd_hooks=[(name, Add(step * one)) for name, one in along.items()])
        return METRIC(logits), logits[:, -1]

    (up, logits_up), (down, logits_down) = run(STEP), run(-STEP)
    moved = model.run_with_jvp(TOKENS, along, METRIC, "unembed.hook_out")
    np.testing.assert_allclose(moved.tangent, (up - down) / (2 * STEP), rtol=TOLERANCE, atol=TOLERANCE)
    if cfg.output_logits_soft_cap <= 0 and cfg.logits_multiplier == 1:
        change = (logits_up - logits_down) / (2 * STEP)
        np.testing.assert_allclose(moved.tangents["unembed.hook_out"][:, -1], change, rtol=TOLERANCE, atol=TOLERANCE)
    found = model.run_with_grads(TOKENS, METRIC, list(along))
    assert {str(value.dtype) for value in found.grads.values()} == {"float64"}
    assert abs(dot(found.grads, along) - float(moved.tangent.sum())) < 1e-9 * (1 + abs(float(moved.tangent.sum())))


@pytest.mark.parametrize("kind", ["gpt2", "sandwich"])
def test_products_with_the_hessian(kind: str) -> None:
    """They are the finite difference of the gradient, and the Hessian is symmetric."""
    cfg = HookedTransformerConfig(**(BASE | VARIANTS[kind] | {"dtype": "float64"}))
    model = HookedTransformer(cfg, params=randomised_params(cfg))
    names = ["blocks.0.hook_resid_pre", "blocks.0.attn.hook_z", "blocks.1.mlp.hook_pre"]
    u, v = ({name: one for name, one in directions(model, seed).items() if name in names} for seed in (1, 2))
    value, grads, products = model.run_with_hvp(TOKENS, {"one": METRIC, "two": lambda x: x.mean() ** 2}, u, names)

    def gradients(step: float) -> Any:
        hooked = model.with_hooks([(name, Add(step * one)) for name, one in u.items()])
        return hooked.run_with_grads(TOKENS, {"one": METRIC, "two": lambda x: x.mean() ** 2}, names)

    up, at, down = gradients(STEP), gradients(0.0), gradients(-STEP)
    for metric in value:
        np.testing.assert_allclose(value[metric], at.value[metric], rtol=1e-12)
        assert list(grads[metric]) == list(products[metric]) == names[::-1]
        for name in names:
            change = (up.grads[metric][name] - down.grads[metric][name]) / (2 * STEP)
            largest = np.abs(change).max()
            np.testing.assert_allclose(products[metric][name], change, rtol=0, atol=TOLERANCE * largest)
            np.testing.assert_allclose(grads[metric][name], at.grads[metric][name], rtol=1e-9, atol=1e-12)
    other = model.run_with_hvp(TOKENS, METRIC, v, names, remat=True).products
    assert abs(dot(products["one"], v) - dot(other, u)) < 1e-9
