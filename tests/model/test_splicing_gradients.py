"""Gradients through spliced dictionaries, by both conventions of the error term, against differences in float64."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from double_precision import double_precision
from spliced import dictionary
from variants import BASE, TOKENS, randomised_params

from tljax import Add, HookedTransformer, HookedTransformerConfig, Replace, Scale
from tljax.dictionaries import Dictionary
from tljax.patching import LogProb

T = TOKENS[:1, :5]
SITE = "blocks.1.hook_resid_pre"
BEFORE, AFTER = "blocks.0.hook_attn_out", f"{SITE}.hook_sae_acts_post"
TRANSCODER = {("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"): "transcoder"}
METRIC, STEP = LogProb(3), 1e-6


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with double_precision():
        yield


def plain() -> HookedTransformer:
    cfg = HookedTransformerConfig(**(BASE | {"dtype": "float64"}))
    return HookedTransformer(cfg, params=randomised_params(cfg))


def spliced(**options: Any) -> HookedTransformer:
    wide = {SITE: dictionary(seed=2, dtype=np.float64)}
    transcoder = dictionary(seed=3, dtype=np.float64, transcoder=True)
    return plain().with_dictionaries(wide | dict.fromkeys(TRANSCODER, transcoder), **options)


def directions(model: HookedTransformer, *names: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {point.name: point.shape(*T.shape) for point in model.hook_points()}
    return {name: rng.standard_normal(shapes[name]) for name in names}


def difference(model: HookedTransformer, along: dict[str, Any], fixed: list[tuple[str, Any]]) -> float:
    """The metric's derivative along a change at some points, with other points held."""

    def measured(step: float) -> float:
        hooks = [*fixed, *((name, Add(step * value)) for name, value in along.items())]
        return float(METRIC(model.run_with_hooks(T, fwd_hooks=hooks))[0])

    return (measured(STEP) - measured(-STEP)) / (2 * STEP)


@pytest.mark.parametrize("error", ["keep", "drop"])
@pytest.mark.parametrize("gradient", ["stop", "pass"])
def test_against_differences(error: str, gradient: str) -> None:
    """With the error as a constant ("stop") the difference holds it at its value; otherwise everything moves."""
    changed = [
        (AFTER, Scale(0.5, feature=slice(2, 3))),
        ("blocks.1.hook_mlp_out.hook_sae_acts_post", Scale(2.0, feature=slice(1, 2))),
    ]
    model = spliced(error=error, gradient=gradient).with_hooks(changed)
    along = directions(model, BEFORE, AFTER, "blocks.1.hook_mlp_out.hook_sae_acts_post")
    _, _, grads = model.run_with_grads(T, METRIC, [*along])
    _, cache = model.run_with_cache(T)
    held = [(name, Replace(value)) for name, value in cache.items() if name.endswith("hook_sae_error")]
    fixed = held if gradient == "stop" else []
    for name, direction in along.items():
        want = difference(model, {name: direction}, fixed)
        assert np.vdot(grads[name], direction) == pytest.approx(want, rel=1e-6, abs=1e-7), name


def test_conventions_agree_at_features_and_passing_is_the_model_itself() -> None:
    none, one = plain(), {SITE: dictionary(seed=2, dtype=np.float64)}
    stop, passing = none.with_dictionaries(one), none.with_dictionaries(one, gradient="pass")
    names = [AFTER, BEFORE]
    grads = [model.run_with_grads(T, METRIC, names)[2] for model in (stop, passing)]
    np.testing.assert_allclose(grads[0][AFTER], grads[1][AFTER], rtol=1e-9)
    own = none.run_with_grads(T, METRIC, [BEFORE])[2][BEFORE]
    np.testing.assert_allclose(grads[1][BEFORE], own, rtol=1e-9)
    assert np.abs(grads[0][BEFORE] - own).max() > 1e-3


def test_jvp_is_the_gradient_along_a_direction() -> None:
    model = spliced()
    along = directions(model, BEFORE, AFTER)
    _, change, _, _ = model.run_with_jvp(T, along, METRIC, AFTER)
    _, _, grads = model.run_with_grads(T, METRIC, [*along])
    assert float(change[0]) == pytest.approx(sum(np.vdot(grads[name], one) for name, one in along.items()), rel=1e-9)


def test_backward_hooks_at_features() -> None:
    model, seen = spliced(), []

    def see(gradient: Any, hook: Any) -> Any:
        seen.append(gradient)
        return jnp.zeros_like(gradient)

    def loss(scale: Any) -> Any:
        hooks = [(BEFORE, Scale(scale))]
        return METRIC(model.run_with_hooks(T, fwd_hooks=hooks, bwd_hooks=[(AFTER, see)]))[0]

    jax.grad(loss)(1.0)
    want = model.run_with_grads(T, METRIC, AFTER)[2][AFTER]
    np.testing.assert_allclose(seen[0], want, rtol=1e-9)


def test_end_to_end_gradients_reach_the_dictionary() -> None:
    """``jax.grad`` of a loss of the spliced model, with respect to the dictionary and through ``params``."""
    model, one = plain(), dictionary(seed=2, dtype=np.float64)

    def loss(given: Dictionary) -> Any:
        return METRIC(model.with_dictionaries({SITE: given}, error="drop")(T))[0]

    grads = jax.jit(jax.grad(loss))(one)
    rng = np.random.default_rng(1)
    along = {name: rng.standard_normal(array.shape) for name, array in one.params.items()}

    def moved(step: float) -> float:
        return float(loss(one.replace(params={name: a + step * along[name] for name, a in one.params.items()})))

    slope = sum(np.vdot(grads.params[name], along[name]) for name in along)
    assert slope == pytest.approx((moved(STEP) - moved(-STEP)) / (2 * STEP), rel=1e-6)

    through = model.with_dictionaries({SITE: one}, error="drop")
    by_params = jax.grad(lambda params: METRIC(through.replace(params=params)(T))[0])(through.params)
    found = by_params["blocks"][1]["dictionaries"]["hook_resid_pre"]
    np.testing.assert_allclose(found.W_dec, grads.W_dec, rtol=1e-9)


def test_a_stack_of_dictionaries_is_a_vmap() -> None:
    model = plain()
    several = [dictionary(seed=seed, dtype=np.float64) for seed in (1, 2, 3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    found = jax.vmap(lambda one: model.with_dictionaries({SITE: one}, error="drop")(T))(stack)
    for one, logits in zip(several, found, strict=True):
        np.testing.assert_allclose(logits, model.with_dictionaries({SITE: one}, error="drop")(T), rtol=1e-9)
