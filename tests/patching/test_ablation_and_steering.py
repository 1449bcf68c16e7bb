"""Ablation and steering sweeps equal one hooked run for each site."""

import inspect
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from variants import build

from tljax import Add, HookedTransformer, Replace, Zero
from tljax.errors import InputError, InterventionError
from tljax.patching import LogitDiff, ablation_sweep, mean_source, path_patch, resample_source, steering_sweep, sweep

RNG = np.random.default_rng(4)
PROMPT = jnp.asarray(RNG.integers(0, 13, (2, 5)), jnp.int32)
REFERENCE = jnp.asarray(RNG.integers(0, 13, (7, 5)), jnp.int32)
METRIC = LogitDiff(answer=jnp.asarray([1, 2]), wrong=jnp.asarray([3, 4]))
VECTOR = jnp.asarray(RNG.standard_normal(16), jnp.float32)


def hooked(model: HookedTransformer, name: str, hook: Any) -> Any:
    return METRIC(model.run_with_hooks(PROMPT, fwd_hooks=[(name, hook)]))


def assert_same(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_zero_ablation(any_model: HookedTransformer) -> None:
    got = ablation_sweep(any_model, PROMPT, METRIC, reduce="none")
    assert got.shape == (3, 4, 2)
    for layer, head in ((0, 3), (2, 1)):
        assert_same(got.values[layer, head], hooked(any_model, f"blocks.{layer}.attn.hook_z", Zero(head=head)))
    mlps = ablation_sweep(any_model, PROMPT, METRIC, "mlp_out", (), at={"pos": [1, 3]}, layers=[-1])
    assert_same(mlps.values, hooked(any_model, "blocks.2.hook_mlp_out", Zero(pos=[1, 3])).mean()[None])


def test_mean_ablation(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(REFERENCE)
    name = "blocks.1.attn.hook_z"
    for over, axes in (("batch", 0), (("batch", "pos"), (0, 1))):
        mean = cache[name].mean(axes, keepdims=True)
        patch = Replace(jnp.broadcast_to(mean, (2, 5, 4, 8)), head=2)
        for reference in (cache, REFERENCE):
            got = ablation_sweep(model, PROMPT, METRIC, kind="mean", reference=reference, over=over, reduce="none")
            assert_same(got.values[1, 2], hooked(model, name, patch))
    again = sweep(model, PROMPT, mean_source(cache), METRIC, "z", ("head",), reduce="none")
    assert_same(again.values, got.values)


def test_means_of_other_activations(model: HookedTransformer) -> None:
    longer = jnp.asarray(RNG.integers(0, 13, (3, 9)), jnp.int32)
    names: Any = ["blocks.1.hook_mlp_out", "blocks.1.attn.hook_pattern", "hook_embed"]
    _, cache = model.run_with_cache(longer, names_filter=names)
    _, short = model.run_with_cache(REFERENCE, names_filter=names)
    mean = jnp.broadcast_to(cache[names[0]].mean((0, 1), keepdims=True), (2, 5, 16))
    got = ablation_sweep(model, PROMPT, METRIC, "mlp_out", (), kind="mean", reference=longer, reduce="none")
    assert_same(got.values[1], hooked(model, names[0], Replace(mean)))
    one_layer = ablation_sweep(model, PROMPT, METRIC, names[0], (), kind="mean", reference=longer, reduce="none")
    assert_same(one_layer.values, got.values[1:2])
    embed = ablation_sweep(model, PROMPT, METRIC, "embed", ("pos",), kind="mean", reference=longer, reduce="none")
    mean = jnp.broadcast_to(cache["hook_embed"].mean((0, 1), keepdims=True), (2, 5, 16))
    assert_same(embed.values[3], hooked(model, "hook_embed", Replace(mean, pos=3)))
    pattern = ablation_sweep(
        model, PROMPT, METRIC, "pattern", kind="mean", reference=REFERENCE, over="batch", reduce="none"
    )
    mean = jnp.broadcast_to(short[names[1]].mean(0, keepdims=True), (2, 4, 5, 5))
    assert_same(pattern.values[1, 3], hooked(model, names[1], Replace(mean, head=3)))


def test_padding_is_not_averaged(tiny: HookedTransformer) -> None:
    texts = ["John and Mary went to the store", "Mary", "The park"]
    caches = [tiny.run_with_cache(text, names_filter="blocks.1.hook_mlp_out")[1] for text in texts]
    tokens = jnp.concatenate([cache["mlp_out", 1][0] for cache in caches])
    metric = LogitDiff(5, 7)
    got = ablation_sweep(
        tiny, "Then Mary", metric, "mlp_out", (), kind="mean", reference=texts, layers=[1], at={"pos": -1}
    )
    logits = tiny.run_with_hooks("Then Mary", fwd_hooks=[("blocks.1.hook_mlp_out", Replace(tokens.mean(0), pos=-1))])
    assert_same(got.values[0], metric(logits)[0])


def test_resample_ablation(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(REFERENCE)
    run = lambda seed, reference=REFERENCE: ablation_sweep(  # noqa: E731
        model, PROMPT, METRIC, kind="resample", reference=reference, seed=seed, reduce="none"
    )
    for seed in (0, 5):
        drawn = np.random.default_rng(seed).choice(7, 2, replace=False)
        expected = hooked(model, "blocks.1.attn.hook_z", Replace(cache["z", 1][drawn], head=2))
        assert_same(run(seed).values[1, 2], expected)
    again = sweep(model, PROMPT, resample_source(cache, 5), METRIC, "z", ("head",), reduce="none")
    assert_same(again.values, run(5).values)
    one = run(0, REFERENCE[:1])
    both = Replace(jnp.broadcast_to(cache["z", 1][:1], (2, 5, 4, 8)), head=2)
    assert_same(one.values[1, 2], hooked(model, "blocks.1.attn.hook_z", both))


def test_ablation_mistakes(model: HookedTransformer) -> None:
    def run(name: str = "z", axes: Any = (), **options: Any) -> None:
        ablation_sweep(model, PROMPT, METRIC, name, axes, **options)

    with pytest.raises(InputError, match=r"Mean ablation needs reference=: a cache, or prompts to run"):
        run(kind="mean")
    with pytest.raises(InputError, match=r"Resample ablation needs reference="):
        run(kind="resample")
    with pytest.raises(InputError, match="Zero ablation takes no reference="):
        run(reference=REFERENCE)
    with pytest.raises(InputError, match="give prompts of the same length, with a batch axis"):
        run(kind="resample", reference=REFERENCE[:, :4])
    with pytest.raises(InputError, match="give prompts of the same length"):
        run(kind="mean", reference=REFERENCE[:, :4], over="batch")
    with pytest.raises(InputError, match="give activations of the same model, with a batch axis"):
        run(kind="mean", reference={"blocks.0.attn.hook_z": jnp.ones((3, 4, 8, 2))})
    with pytest.raises(InputError, match=r"The reference does not hold blocks.1.attn.hook_z: record it with"):
        run(kind="mean", reference={"blocks.0.attn.hook_z": jnp.ones((3, 4, 4, 8))})
    with pytest.raises(InputError, match=r'average attention over="batch" alone'):
        run("pattern", kind="mean", reference=REFERENCE[:, :4])
    with pytest.raises(InputError, match=r'kind=.median. is not one of "zero", "mean" and "resample"'):
        inspect.unwrap(ablation_sweep)(model, PROMPT, METRIC, kind="median")
    for over in ("pos", "head", ()):
        with pytest.raises(InputError, match=r'a mean is over "batch", or over \("batch", "pos"\)'):
            run(kind="mean", reference=REFERENCE, over=over)


def test_steering(any_model: HookedTransformer) -> None:
    scales = np.asarray([-2.0, 0.0, 0.5])
    got = steering_sweep(any_model, PROMPT, VECTOR, METRIC, scales, reduce="none")
    assert (got.axis_names, got.shape) == (("layer", "scale", "batch"), (3, 3, 2))
    assert got.labels["scale"] == ("-2", "0", "0.5")
    np.testing.assert_array_equal(got.effect()[:, 1], 0)
    for layer, number in ((0, 0), (2, 2)):
        expected = hooked(any_model, f"blocks.{layer}.hook_resid_pre", Add(float(scales[number]) * VECTOR))
        assert_same(got.values[layer, number], expected)


def test_steering_at_positions_and_in_other_places(model: HookedTransformer) -> None:
    name = "blocks.1.hook_resid_post"
    last = steering_sweep(model, PROMPT, VECTOR, METRIC, [3.0], "resid_post", at={"pos": -1}, reduce="none")
    assert_same(last.values[1, 0], hooked(model, name, Add(3.0 * VECTOR, pos=-1)))
    each = steering_sweep(model, PROMPT, VECTOR, METRIC, [3, -1], "resid_post", ("pos",), layers=[2, 1], reduce="none")
    assert (each.axis_names, each.shape) == (("layer", "scale", "pos", "batch"), (2, 2, 5, 2))
    assert_same(each.values[1, 1, 2], hooked(model, name, Add(-VECTOR, pos=2)))
    vectors = jnp.asarray(RNG.standard_normal((3, 16)), jnp.float32)
    by_layer = steering_sweep(model, PROMPT, vectors, METRIC, [2.0], "resid_post", reduce="none")
    assert_same(by_layer.values[1, 0], hooked(model, name, Add(2.0 * vectors[1])))
    by_position = jnp.asarray(RNG.standard_normal((5, 16)), jnp.float32)
    along = steering_sweep(model, PROMPT, by_position, METRIC, [2.0], "resid_post", reduce="none")
    assert_same(along.values[1, 0], hooked(model, name, Add(2.0 * by_position)))
    embed = steering_sweep(model, PROMPT, np.arange(16), METRIC, [0.1], "embed", reduce="none")
    assert (embed.axis_names, embed.shape) == (("scale", "batch"), (1, 2))
    assert_same(embed.values[0], hooked(model, "hook_embed", Add(0.1 * jnp.arange(16.0))))


def test_steering_of_heads_is_not_taken_for_layers() -> None:
    model = build("gpt2", n_layers=4)
    per_head = jnp.asarray(RNG.standard_normal((4, 8)), jnp.float32)
    got = steering_sweep(model, PROMPT, per_head, METRIC, [1.0], "z", reduce="none", layers=[2])
    assert_same(got.values[0, 0], hooked(model, "blocks.2.attn.hook_z", Add(per_head)))


def test_steering_mistakes(model: HookedTransformer) -> None:
    with pytest.raises(InputError, match="scales= is empty: give at least one number"):
        steering_sweep(model, PROMPT, VECTOR, METRIC, [])
    with pytest.raises(InterventionError, match=r"value of shape \(15,\) does not fit"):
        steering_sweep(model, PROMPT, VECTOR[:15], METRIC, [1.0])
    with pytest.raises(InterventionError, match=r"value of shape \(2, 16\) does not fit"):
        steering_sweep(model, PROMPT, jnp.ones((2, 16)), METRIC, [1.0])


def test_progress_shows_when_asked_for(model: HookedTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    def bars(progress: bool) -> list[str]:
        ablation_sweep(model, PROMPT, METRIC, layers=[2], progress=progress)
        ablated = capsys.readouterr().err
        steering_sweep(model, PROMPT, VECTOR, METRIC, [1.0], layers=[2], progress=progress)
        steered = capsys.readouterr().err
        path_patch(model, PROMPT, REFERENCE[:2], METRIC, "logits", layers=[1], progress=progress)
        return [ablated, steered, capsys.readouterr().err]

    shown = bars(True)
    assert all("sweep: 100%" in each for each in shown)
    assert "senders: 100%" in shown[2]
    assert bars(False) == ["", "", ""]
