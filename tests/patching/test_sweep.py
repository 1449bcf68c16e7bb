"""The sweep equals the loop it replaces: one full forward pass for each site."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import build

from tljax import HookedTransformer, Replace
from tljax.errors import InputError
from tljax.patching import LogitDiff, sweep

CLEAN = jnp.asarray(np.random.default_rng(3).integers(0, 13, (2, 5)), jnp.int32)
CORRUPTED = CLEAN.at[:, 2].set(jnp.asarray([11, 7]))
METRIC = LogitDiff(answer=jnp.asarray([1, 2]), wrong=jnp.asarray([3, 4]))


def naive(model: HookedTransformer, metric: LogitDiff, name: str, axes: tuple[str, ...]) -> np.ndarray:
    """Every site by ``run_with_hooks``."""
    _, cache = model.run_with_cache(CLEAN)
    sizes = [dict(zip(spec.axes, spec.shape(2, 5), strict=True)) for spec in model.hook_points() if spec.name == name]
    results = []
    for layer in range(model.cfg.n_layers):
        full = name.replace("blocks.0", f"blocks.{layer}")
        for index in itertools.product(*(range(sizes[0][axis]) for axis in axes)):
            patch = Replace(cache[full], **dict(zip(axes, index, strict=True)))
            results.append(metric(model.run_with_hooks(CORRUPTED, fwd_hooks=[(full, patch)])).mean())
    return np.asarray(results).reshape(model.cfg.n_layers, *(sizes[0][axis] for axis in axes))


@pytest.mark.parametrize(
    ("activation", "name", "axes"),
    [
        ("resid_pre", "blocks.0.hook_resid_pre", ("pos",)),
        ("mlp_out", "blocks.0.hook_mlp_out", ("pos",)),
        ("z", "blocks.0.attn.hook_z", ("head",)),
        ("z", "blocks.0.attn.hook_z", ("pos", "head")),
        ("k", "blocks.0.attn.hook_k", ("head",)),
        ("pattern", "blocks.0.attn.hook_pattern", ("head", "query_pos")),
    ],
)
def test_sweep_equals_the_loop(any_model: HookedTransformer, activation: str, name: str, axes: tuple[str, ...]) -> None:
    _, cache = any_model.run_with_cache(CLEAN)
    swept = sweep(any_model, CORRUPTED, cache, METRIC, activation, axes)
    assert swept.axes == ("layer", *axes)
    np.testing.assert_allclose(swept.values, naive(any_model, METRIC, name, axes), atol=1e-5)
    assert swept.baseline == pytest.approx(float(METRIC(any_model(CORRUPTED)).mean()), abs=1e-5)


def test_chunks_and_python_metrics_change_nothing(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(CLEAN[:1])
    metric = LogitDiff(1, 3)
    whole = sweep(model, CORRUPTED[:1], cache, metric, "resid_pre")
    in_parts = sweep(model, CORRUPTED[:1], cache, metric, "resid_pre", max_batch=2)
    by_function = sweep(model, CORRUPTED[:1], cache, lambda logits: logits[0, -1, 1] - logits[0, -1, 3], "resid_pre")
    np.testing.assert_allclose(in_parts.values, whole.values, atol=1e-5)
    np.testing.assert_allclose(by_function.values, whole.values, atol=1e-5)


def test_the_number_of_programs_does_not_grow_with_layers_or_repeats(compilations: Any) -> None:
    def programs(n_layers: int) -> int:
        model = build("gpt2", n_layers=n_layers, d_model=20)
        _, cache = model.run_with_cache(CLEAN)
        sweep(model, CORRUPTED, cache, METRIC, "resid_pre")
        start = compilations.count
        sweep(model, CLEAN, cache, METRIC, "resid_pre")
        assert compilations.count == start
        return start

    few = programs(2)
    assert programs(6) - few <= few + 4


def test_patching_everything_clean_gives_the_clean_metric(model: HookedTransformer) -> None:
    logits, cache = model.run_with_cache(CLEAN)
    swept = sweep(model, CORRUPTED, cache, METRIC, "resid_pre", axes=())
    np.testing.assert_allclose(swept.normalized(float(METRIC(logits).mean())), np.ones(3), atol=1e-4)


def test_left_padding_changes_nothing(tiny: HookedTransformer) -> None:
    pair = [
        "Then, John and Mary went to the store. John gave a drink to",
        "John and Mary went to the park. Mary gave a ring to",
    ]
    metric = LogitDiff(tiny.to_single_token(" Mary"), tiny.to_single_token(" John"))
    _, cache = tiny.run_with_cache(pair, padding_side="left")
    corrupted = [pair[0].replace("John gave", "Mary gave"), pair[1].replace("Mary gave", "John gave")]
    together = sweep(
        tiny.set_tokenizer(tiny.tokenizer, default_padding_side="left"), corrupted, cache, metric, "z", ("head",)
    )
    singles = []
    for clean, other in zip(pair, corrupted, strict=True):
        _, one = tiny.run_with_cache(clean)
        singles.append(sweep(tiny, other, one, metric, "z", ("head",)).values)
    np.testing.assert_allclose(together.values, np.mean(singles, axis=0), atol=1e-4)


def test_mistakes(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(CLEAN)
    with pytest.raises(InputError, match=r"'resid_pre' has axes .* cannot go along \['head'\]"):
        sweep(model, CORRUPTED, cache, METRIC, "resid_pre", ("head",))
    with pytest.raises(InputError, match="must have equally many tokens"):
        sweep(model, CORRUPTED[:, :4], cache, METRIC, "resid_pre")
    result = sweep(model, CORRUPTED, cache, METRIC, "resid_pre")
    with pytest.raises(InputError, match="nothing to normalise by"):
        result.normalized(result.baseline)


def test_top_lists_the_largest_effects_first(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(CLEAN)
    result = sweep(model, CORRUPTED, cache, METRIC, "resid_pre")
    top = result.top(4)
    assert [effect for _, effect in top] == sorted((effect for _, effect in top), reverse=True)
    (layer, pos), effect = top[0]
    assert effect == pytest.approx(float(result.effect[layer, pos]))
    assert effect == pytest.approx(float(result.effect.max()))


def test_metric_goes_through_jit() -> None:
    logits = jnp.arange(24.0).reshape(2, 3, 4)
    assert jax.jit(lambda m, x: m(x))(LogitDiff(3, 1), logits).tolist() == [2.0, 2.0]
