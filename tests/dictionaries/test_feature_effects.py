"""Effects of features equal a loop of full passes; gradients equal JAX's own; sweeps know the axis of features."""

import jax.numpy as jnp
import numpy as np
import pytest
from feature_models import LENGTH, METRIC, OTHERS, TOKENS, plain_model, smooth_model, spliced_model, with_value

from tljax import ActivationCache, HookedTransformer, Zero
from tljax.dictionaries.attribution import FeatureEffects, feature_effects
from tljax.patching import ablation_sweep, sweep
from tljax.text.batch import Batch

POINTS = (
    "blocks.0.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_pre",
    "blocks.2.hook_resid_post",
)  # fmt: skip


def held(tokens: np.ndarray) -> dict[str, np.ndarray]:
    cache = spliced_model().run_with_cache(tokens)[1]
    return {name: np.array(cache[name]) for name in cache if "hook_sae_" in name}


def caches(model: HookedTransformer) -> tuple[ActivationCache, ActivationCache]:
    return model.run_with_cache(TOKENS)[1], model.run_with_cache(OTHERS)[1]


def brute_force(row, cache: dict[str, np.ndarray], values: dict[str, np.ndarray] | None) -> float:
    name = f"{row.point}.hook_sae_acts_post"
    changed = cache[name].copy()
    changed[row.prompt, row.pos, row.feature] = 0 if values is None else values[name][row.prompt, row.pos, row.feature]
    model = spliced_model()
    return float((with_value(model, TOKENS, {name: changed}) - np.asarray(METRIC(model(TOKENS))))[row.prompt])


@pytest.mark.parametrize("patched", [False, True])
def test_exact_effects_equal_a_loop_of_full_passes(patched: bool) -> None:
    source = OTHERS if patched else None
    effects = feature_effects(spliced_model(), TOKENS, METRIC, source=source, points=[POINTS[4], POINTS[1]])
    cache, values = held(TOKENS), held(OTHERS) if patched else None
    assert effects.points == (POINTS[1], POINTS[4])  # in firing order
    for number, point in enumerate(effects.points):
        name = f"{point}.hook_sae_acts_post"
        differs = (cache[name] != 0) if values is None else cache[name] != values[name]
        assert (effects.point == number).sum() == differs.sum() > 0
    rng = np.random.default_rng(0)
    for number in rng.permutation(len(effects))[:25]:
        row = effects[int(number)]
        value = cache[f"{row.point}.hook_sae_acts_post"][row.prompt, row.pos, row.feature]
        assert row.activation == pytest.approx(value, rel=1e-4)
        assert row.effect == pytest.approx(brute_force(row, cache, values), abs=1e-5)


def test_error_terms_have_one_effect_a_position() -> None:
    model = spliced_model()
    effects = feature_effects(model, TOKENS, METRIC, points=[POINTS[1], POINTS[3]], k=1)
    assert effects.error_effect.shape == (2, 2, LENGTH)
    cache, baseline = held(TOKENS), np.asarray(METRIC(model(TOKENS)))
    for number, pos in ((0, 1), (0, 3), (1, 5)):
        name = f"{effects.points[number]}.hook_sae_error"
        changed = cache[name].copy()
        changed[:, pos] = 0
        right = with_value(model, TOKENS, {name: changed}) - baseline
        np.testing.assert_allclose(effects.error_effect[number, :, pos], right, atol=1e-5)
    dropped = feature_effects(spliced_model("drop"), TOKENS, METRIC, points=POINTS[0], k=1, method="gradient")
    assert np.isnan(dropped.error_effect).all()
    assert len(dropped) == 2 * LENGTH


def test_padded_prompts_equal_their_singles() -> None:
    rows = [TOKENS[0, :4], TOKENS[1]]
    batch = Batch.from_rows(rows, "left")
    together = feature_effects(spliced_model(), batch, METRIC, points=POINTS[3])
    for number, row in enumerate(rows):
        alone = feature_effects(spliced_model(), row[None], METRIC, points=POINTS[3])
        own = together.prompt == number
        assert (together.pos[own] == alone.pos).all()
        assert (together.feature[own] == alone.feature).all()
        np.testing.assert_allclose(together.effect[own], alone.effect, atol=2e-5)
        np.testing.assert_allclose(together.error_effect[:, number, : len(row)], alone.error_effect[:, 0], atol=2e-5)


def gradients(names: list[str], changes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """JAX's own gradients at some points, by a run with other activations."""
    hooks = [(name, lambda act, hook, value=value: jnp.asarray(value)) for name, value in changes.items()]
    with spliced_model().hooks(fwd_hooks=hooks) as hooked:
        return {name: np.asarray(grad) for name, grad in hooked.run_with_grads(TOKENS, METRIC, names).grads.items()}


def test_gradient_estimates_equal_jaxs_own_gradient() -> None:
    effects = feature_effects(spliced_model(), TOKENS, METRIC, method="gradient", source=OTHERS)
    cache, values = held(TOKENS), held(OTHERS)
    grads = gradients([f"{point}.{end}" for point in POINTS for end in ("hook_sae_acts_post", "hook_sae_error")], {})
    for number, point in enumerate(POINTS):
        name, error = f"{point}.hook_sae_acts_post", f"{point}.hook_sae_error"
        own = effects.point == number
        right = grads[name] * (values[name] - cache[name])
        np.testing.assert_allclose(
            effects.effect[own], right[effects.prompt[own], effects.pos[own], effects.feature[own]], atol=1e-5
        )
        right = (grads[error] * (values[error] - cache[error])).reshape(2, LENGTH, -1).sum(-1)
        np.testing.assert_allclose(effects.error_effect[number], right, atol=1e-5)
    assert "gradient at the base run" in str(effects.convention)


def test_integrated_gradients_follow_the_published_grid_and_add_up() -> None:
    steps, point = 2, POINTS[3]
    effects = feature_effects(spliced_model(), TOKENS, METRIC, method="ig", steps=steps, source=OTHERS, points=[point])
    cache, values = held(TOKENS), held(OTHERS)
    name, error = f"{point}.hook_sae_acts_post", f"{point}.hook_sae_error"
    total = 0.0
    for step in range(steps):
        moved = {one: cache[one] + (values[one] - cache[one]) * step / steps for one in (name, error)}
        total = total + gradients([name], moved)[name] / steps
    right = (total * (values[name] - cache[name]))[effects.prompt, effects.pos, effects.feature]
    np.testing.assert_allclose(effects.effect, right, atol=1e-5)
    fine = feature_effects(smooth_model(), TOKENS, METRIC, method="ig", steps=12, grid="gauss", source=OTHERS)
    assert fine.completeness is not None
    assert fine.completeness.error < 0.02
    cache, values = ({one: run[one] for one in run if "hook_sae" in one} for run in caches(smooth_model()))
    both = {one: values[one] for one in values if one.startswith(point) and one.endswith(("post", "error"))}
    right = (with_value(smooth_model(), TOKENS, both) - fine.baseline).sum()
    whole = fine.effect[fine.point == 1].sum() + fine.error_effect[1].sum()
    assert whole == pytest.approx(right, rel=0.02)


def test_estimates_are_verified_and_shown() -> None:
    effects = feature_effects(smooth_model(), TOKENS, METRIC, source=OTHERS, method="ig", verify=12)
    cache, patched = caches(smooth_model())
    assert effects.verified is not None
    assert len(effects.verified.exact) == 12
    for row, value in zip(effects.top(12)[:4], effects.verified.exact[:4], strict=True):
        name = f"{row.point}.hook_sae_acts_post"
        changed = np.array(cache[name])
        changed[row.prompt, row.pos, row.feature] = patched[name][row.prompt, row.pos, row.feature]
        right = (with_value(smooth_model(), TOKENS, {name: changed}) - effects.baseline)[row.prompt]
        assert value == pytest.approx(right, abs=1e-5)
    assert effects.verified.r_squared > 0.5
    assert effects.verified.rank_correlation > 0.5
    best = effects.top(3)
    assert [abs(row.effect) for row in best] == sorted((abs(row.effect) for row in best), reverse=True)
    assert all(row.point == POINTS[1] for row in effects.top(4, point=POINTS[1]))
    table = effects.to_dict()
    assert len(table["effect"]) == len(table["point"]) == len(effects)
    sums = effects.by_feature(POINTS[1])
    feature, value = next(iter(sums.items()))
    own = (effects.point == 0) & (effects.feature == feature)
    assert value == pytest.approx(effects.effect[own].sum() / 2)
    assert "estimate by ig" in str(effects)
    assert str(best[0].feature) in str(effects)


def test_min_activation_and_k_keep_the_strongest() -> None:
    every = feature_effects(spliced_model(), TOKENS, METRIC, points=POINTS[1], method="gradient")
    strongest = feature_effects(spliced_model(), TOKENS, METRIC, points=POINTS[1], method="gradient", k=2)
    large = feature_effects(spliced_model(), TOKENS, METRIC, points=POINTS[1], method="gradient", min_activation=0.5)
    assert len(strongest) == 2 * 2 * LENGTH < len(every)
    here = (every.prompt == 1) & (every.pos == 3)
    kept = (strongest.prompt == 1) & (strongest.pos == 3)
    assert set(strongest.feature[kept]) == set(every.feature[here][np.argsort(-every.activation[here])[:2]])
    assert len(large) == (every.activation > 0.5).sum() > 0


def test_sweeps_go_along_the_axis_of_features() -> None:
    point = POINTS[2]
    model, name = spliced_model(), f"{point}.hook_sae_acts_post"
    result = sweep(model, TOKENS, OTHERS, METRIC, name, axes=("pos", "feature"), reduce="none")
    width = model.dictionaries[point].cfg.d_sae
    assert result.shape == (1, LENGTH, width, 2)
    effects = feature_effects(model, TOKENS, METRIC, points=point, source=OTHERS)
    grid = np.asarray(result.effect())[0]
    np.testing.assert_allclose(effects.effect, grid[effects.pos, effects.feature, effects.prompt], atol=1e-5)
    zeroed = ablation_sweep(model, TOKENS, METRIC, name, axes=("pos", "feature"), at={"feature": [0, 3]}, reduce="none")
    assert zeroed.shape == (1, LENGTH, 2, 2)
    cache, values = held(TOKENS)[name], held(OTHERS)[name]
    for pos in (1, 3):
        changed, patched = cache.copy(), cache.copy()
        changed[:, pos, 3], patched[:, pos, 3] = 0, values[:, pos, 3]
        np.testing.assert_allclose(zeroed.values[0, pos, 1], with_value(model, TOKENS, {name: changed}), atol=1e-5)
        np.testing.assert_allclose(result.values[0, pos, 3], with_value(model, TOKENS, {name: patched}), atol=1e-5)
    assert zeroed.picture() is not None


def test_sweeps_of_features_estimate_too() -> None:
    model, name = spliced_model(), f"{POINTS[2]}.hook_sae_acts_post"
    first = sweep(model, TOKENS, Zero(), METRIC, name, axes=("pos", "feature"), method="attribution", reduce="none")
    effects = feature_effects(model, TOKENS, METRIC, points=POINTS[2], method="gradient")
    grid = np.asarray(first.effect())[0]
    np.testing.assert_allclose(effects.effect, grid[effects.pos, effects.feature, effects.prompt], atol=1e-5)
    name = f"{POINTS[3]}.hook_sae_acts_post"
    fine = sweep(smooth_model(), TOKENS, Zero(), METRIC, name, axes=("feature",), method="ig", steps=12, verify=3)
    assert fine.verified is not None
    assert fine.verified.r_squared > 0.5
    assert fine.completeness is not None
    assert fine.completeness.error < 0.05


def test_one_metric_in_a_sweep_of_several_layers_with_dictionaries_of_different_widths() -> None:
    model = spliced_model()
    result = sweep(model, TOKENS, OTHERS, METRIC, "hook_resid_pre.hook_sae_output", axes=("pos",), layers=[0, 2])
    name = "blocks.2.hook_resid_pre.hook_sae_output"
    value = np.array(model.run_with_cache(TOKENS)[1][name])
    value[:, 1] = np.asarray(model.run_with_cache(OTHERS)[1][name])[:, 1]
    assert float(result.values[1, 1]) == pytest.approx(with_value(model, TOKENS, {name: value}).mean(), abs=1e-5)


def test_a_model_with_hooks_runs_them() -> None:
    hooked = spliced_model().add_hook("blocks.1.hook_resid_pre", Zero(pos=2))
    effects = feature_effects(hooked, TOKENS, METRIC, points=POINTS[3], k=1)
    row = effects[3]
    name = f"{row.point}.hook_sae_acts_post"
    changed = np.array(hooked.run_with_cache(TOKENS)[1][name])
    changed[row.prompt, row.pos, row.feature] = 0
    right = with_value(hooked, TOKENS, {name: changed}) - np.asarray(METRIC(hooked(TOKENS)))
    assert isinstance(effects, FeatureEffects)
    assert row.effect == pytest.approx(right[row.prompt], abs=1e-5)
    assert plain_model().cfg.splices == ()
