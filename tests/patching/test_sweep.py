"""Every sweep equals the loop it replaces: one full forward pass for each site."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from variants import build

from tljax import Add, HookedTransformer, Mean, Replace, Zero
from tljax.errors import InputError, InterventionError, UnknownHookError
from tljax.hooks.names import get_act_name, resolve
from tljax.hooks.points import point_table
from tljax.patching import KL, LogitDiff, LogProb, Loss, NoEffectWarning, sweep
from tljax.patching.engine import packing

# position embeddings, and prompts that hypothesis draws alike, leave nothing to patch
pytestmark = pytest.mark.filterwarnings("ignore::tljax.patching.sweep.NoEffectWarning")

CLEAN = jnp.asarray(np.random.default_rng(3).integers(0, 13, (2, 5)), jnp.int32)
CORRUPTED = CLEAN.at[:, 2].set(jnp.asarray([11, 7])).at[1, 1].set(3)
METRIC = LogitDiff(answer=jnp.asarray([1, 2]), wrong=jnp.asarray([3, 4]))
SITES = [
    ("resid_pre", ("pos",)),
    ("resid_mid", ("pos",)),
    ("resid_post", ("pos",)),
    ("resid_post", ()),
    ("attn_out", ("pos",)),
    ("mlp_out", ("pos",)),
    ("mlp_out", ("d_model",)),
    ("q", ("pos", "head")),
    ("k", ("pos", "head")),
    ("v", ("head",)),
    ("rot_k", ("pos",)),
    ("rot_q", ("head",)),
    ("z", ("head",)),
    ("z", ("pos", "head")),
    ("result", ("pos", "head")),
    ("pattern", ("head",)),
    ("pattern", ("head", "query_pos")),
    ("pattern", ("head", "query_pos", "key_pos")),
    ("attn_scores", ("head", "query_pos")),
    ("post", ("pos",)),
    ("post", ("neuron",)),
    ("mlp_in", ("pos",)),
    ("embed", ("pos",)),
    ("pos_embed", ("pos",)),
]


def full_names(model: HookedTransformer, activation: str) -> list[str]:
    """Full names of an activation at every layer."""
    table, n_layers = point_table(model.cfg), model.cfg.n_layers
    if activation in ("embed", "pos_embed"):
        return [f"hook_{activation}"] if f"hook_{activation}" in table else []
    if activation in table:
        return [activation]
    if get_act_name(activation, 0) not in table:
        return []
    return [resolve((activation, layer), table, n_layers) for layer in range(n_layers)]


def check(
    model: HookedTransformer,
    clean: jax.Array,
    corrupted: jax.Array,
    metric: Any,
    activation: str,
    axes: tuple[str, ...],
    most: int = 5,
    **options: Any,
) -> Any:
    """Compares a sweep with ``run_with_hooks`` at up to ``most`` of its sites, prompt by prompt; returns it."""
    names = full_names(model, activation)
    if not names:
        pytest.skip(f"no {activation} in this model")
    _, cache = model.run_with_cache(clean, names_filter=names)
    got = sweep(model, corrupted, cache, metric, activation, axes, reduce="none", **options)
    spec = point_table(model.cfg)[names[0]]
    sizes = dict(zip(spec.axes, spec.shape(*clean.shape), strict=True))
    by_layer = names[0].startswith("blocks.")
    layered = [(layer,) for layer in range(len(names))] if by_layer else [()]
    sites = list(itertools.product(layered, itertools.product(*(range(sizes[axis]) for axis in axes))))
    assert got.shape == (*((len(names),) if by_layer else ()), *(sizes[axis] for axis in axes), len(clean))
    for number in np.random.default_rng(0).permutation(len(sites))[:most]:
        layer, entry = sites[number]
        name = names[layer[0] if layer else 0]
        patch = Replace(cache[name], **dict(zip(axes, entry, strict=True)))
        expected = metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, patch)]))
        np.testing.assert_allclose(got.values[(*layer, *entry)], expected, atol=1e-5, err_msg=f"{name} {entry}")
    np.testing.assert_allclose(got.baseline, metric(model(corrupted)), atol=1e-5)
    return got


@pytest.mark.parametrize(("activation", "axes"), SITES)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox"])
def test_sweep_equals_the_loop(kind: str, activation: str, axes: tuple[str, ...]) -> None:
    if kind == "neox" and activation not in ("resid_pre", "attn_out", "mlp_out", "z", "k", "rot_k", "pattern"):
        pytest.skip("as in the others: a parallel block differs in what follows attention")
    check(build(kind, n_layers=3), CLEAN, CORRUPTED, METRIC, activation, axes)


@pytest.mark.parametrize(("activation", "axes"), [("attn_out", ("pos",)), ("z", ("head",))])
@pytest.mark.parametrize(
    "kind",
    ["bidirectional", "local", "soft_caps", "attn_only", "inverse_scale", "adjacent", "qk_norm", "layer_kinds",
     "unrotated", "multipliers", "sandwich", "alibi", "alibi_rounded", "residual_norm",
     "post_norm_only", "clipped", "qk_after_rotary", "latent", "latent_keys"],
)  # fmt: skip
def test_other_kinds_of_models(kind: str, activation: str, axes: tuple[str, ...]) -> None:
    check(build(kind), CLEAN, CORRUPTED, METRIC, activation, axes)


@pytest.mark.parametrize(
    "activation", ["mlp_out", "resid_mid", "blocks.1.ln1.hook_normalized", "blocks.1.ln2.hook_scale"]
)
def test_norms_of_the_residual_stream_itself(activation: str) -> None:
    check(build("residual_norm"), CLEAN, CORRUPTED, METRIC, activation, ("pos",), most=8)


@pytest.mark.parametrize("activation", ["k", "k_norm.hook_normalized", "q_norm.hook_scale", "rot_k"])
@pytest.mark.parametrize("kind", ["qk_norm", "qk_after_rotary"])
def test_normalised_queries_and_keys(kind: str, activation: str) -> None:
    name = f"blocks.1.attn.{activation}" if "norm" in activation else activation
    check(build(kind), CLEAN, CORRUPTED, METRIC, name, ("pos", "head"))


@pytest.mark.parametrize(("activation", "axes"), [("q", ("head",)), ("k_norm.hook_normalized", ("pos",))])
def test_queries_and_keys_normalised_together(activation: str, axes: tuple[str, ...]) -> None:
    name = f"blocks.1.attn.{activation}" if "norm" in activation else activation
    check(build("post_norm_only"), CLEAN, CORRUPTED, METRIC, name, axes)


LATENT = ["q", "k", "v", "rot_k", "q_latent", "kv_latent", "blocks.1.attn.kv_latent_norm.hook_normalized"]


@pytest.mark.parametrize("activation", LATENT)
def test_latent_attention(activation: str) -> None:
    axes = ("pos",) if "latent" in activation else ("pos", "head")
    check(build("latent"), CLEAN, CORRUPTED, METRIC, activation, axes)


@pytest.mark.parametrize("activation", ["q", "v", "rot_k"])
def test_clipped_queries_keys_and_values(activation: str) -> None:
    check(build("clipped"), CLEAN, CORRUPTED, METRIC, activation, ("pos", "head"))


METRICS = {
    "last": METRIC,
    "early": LogProb(2, pos=2),
    "per prompt": LogitDiff(1, 3, pos=jnp.asarray([4, 3])),
    "all": Loss(CORRUPTED),
    "rows": lambda logits: jax.nn.log_softmax(logits[:, -1])[:, 3],
    "several": lambda logits: logits[:, 1:4, 2].sum(axis=1) - logits[:, 0, 3],
}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("kind", ["gpt2", "bidirectional"])
def test_any_metric(kind: str, metric: Any) -> None:
    check(build(kind, n_layers=3), CLEAN, CORRUPTED, metric, "resid_mid", ("pos",), most=6)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_sweeps(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["gpt2", "llama", "neox"]))
    activation, axes = data.draw(
        st.sampled_from([site for site in SITES if site[0] not in ("resid_mid", "rot_k", "rot_q")])
    )
    length, batch = data.draw(st.integers(2, 12)), data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    clean, corrupted = rng.integers(0, 13, (2, batch, length)).astype(np.int32)
    for prompt in range(batch):
        shared = data.draw(st.integers(0, length))
        corrupted[prompt, :shared] = clean[prompt, :shared]
    model = build(kind, n_layers=3)
    if full_names(model, activation):
        metric = data.draw(st.sampled_from([LogitDiff(1, 3), LogProb(2, pos=length // 2), METRICS["rows"]]))
        limit = data.draw(st.sampled_from(["auto", 1, 3]))
        check(model, jnp.asarray(clean), jnp.asarray(corrupted), metric, activation, axes, most=3, max_batch=limit)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(tiny: HookedTransformer, side: str) -> None:
    clean = [
        "Then, John and Mary went to the store. John gave a drink to",
        "John and Mary went to the park. Mary gave a ring to",
    ]
    corrupted = [clean[0].replace("John gave", "Mary gave"), clean[1].replace("Mary gave", "John gave")]
    padded = tiny.set_tokenizer(tiny.tokenizer, default_padding_side=side)
    lengths = [tiny.to_tokens(prompt).shape[1] for prompt in clean]
    ends = jnp.asarray([length - 1 for length in lengths]) if side == "right" else -1
    answer, wrong = tiny.to_single_token(" Mary"), tiny.to_single_token(" John")
    together = sweep(padded, corrupted, clean, LogitDiff(answer, wrong, pos=ends), "z", ("head",), reduce="none")
    for n, (one, other) in enumerate(zip(clean, corrupted, strict=True)):
        alone = sweep(tiny, other, one, LogitDiff(answer, wrong), "z", ("head",))
        np.testing.assert_allclose(together.values[..., n], alone.values, atol=1e-4)
        np.testing.assert_allclose(together.clean[n], alone.clean, atol=1e-4)


def test_the_source_may_be_a_prompt_a_dict_an_array_or_a_hook(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(CLEAN)
    run = functools.partial(sweep, model, CORRUPTED, metric=METRIC, activation_name="resid_post")
    expected = run(cache).values
    values = jnp.stack([cache["resid_post", layer] for layer in range(3)])
    for source in (CLEAN, CLEAN.tolist(), dict(cache.items()), values):
        np.testing.assert_allclose(run(source).values, expected, atol=1e-5)
    vector = jnp.arange(16.0)

    def add(activation: jax.Array, hook: Any) -> jax.Array:
        assert activation.shape == (2, 5, 16)
        assert hook.axes == ("batch", "pos", "d_model")
        return activation + vector[None, None]

    for source, hook in ((Zero(), lambda pos: Zero(pos=pos)), (Add(vector), lambda pos: Add(vector, pos=pos)),
                         (add, lambda pos: Add(vector, pos=pos))):  # fmt: skip
        swept = run(source)
        for layer, pos in ((0, 4), (2, 1)):
            logits = model.run_with_hooks(CORRUPTED, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", hook(pos))])
            np.testing.assert_allclose(swept.values[layer, pos], METRIC(logits).mean(), atol=1e-5)


def test_mean_ablation_over_a_reference_set(model: HookedTransformer) -> None:
    reference = jnp.asarray(np.random.default_rng(9).integers(0, 13, (7, 5)), jnp.int32)
    _, cache = model.run_with_cache(reference)
    swept = sweep(
        model, CLEAN, lambda z, hook: jnp.broadcast_to(cache[hook.name].mean(0), z.shape), METRIC, "z", ("head",)
    )
    mean = Mean(cache["z", 1], over="batch", head=2)
    expected = METRIC(model.run_with_hooks(CLEAN, fwd_hooks=[("blocks.1.attn.hook_z", mean)])).mean()
    np.testing.assert_allclose(swept.values[1, 2], expected, atol=1e-5)


def test_part_of_the_sites(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(CLEAN)
    whole = sweep(model, CORRUPTED, cache, METRIC, "z", ("pos", "head"))
    part = sweep(model, CORRUPTED, cache, METRIC, "z", ("pos", "head"), layers=[2, 0], at={"pos": [-1, 2], "head": 3})
    np.testing.assert_allclose(part.values, whole.values[np.ix_([2, 0], [4, 2], [3])], atol=1e-5)
    one_layer = sweep(model, CORRUPTED, cache, METRIC, "blocks.1.attn.hook_z", ("pos", "head"))
    np.testing.assert_allclose(one_layer.values, whole.values[1:2], atol=1e-5)
    by_text = sweep(model, CORRUPTED, cache, METRIC, "hook_resid_pre", "pos")
    assert by_text.axis_names == ("layer", "pos")
    last_two = sweep(model, CORRUPTED, cache, METRIC, "z", ("head",), at={"pos": slice(3, None)})
    patch = Replace(cache["z", 1], head=2, pos=[3, 4])
    expected = METRIC(model.run_with_hooks(CORRUPTED, fwd_hooks=[("blocks.1.attn.hook_z", patch)])).mean()
    np.testing.assert_allclose(last_two.values[1, 2], expected, atol=1e-5)


def test_several_metrics_in_one_sweep(model: HookedTransformer) -> None:
    base = model(CORRUPTED)
    metrics = {"difference": METRIC, "kl": KL(base), "python": lambda logits: logits[:, -1, 2]}
    together = sweep(model, CORRUPTED, CLEAN, metrics, "resid_pre")
    assert together.axis_names == ("metric", "layer", "pos")
    for name, metric in metrics.items():
        np.testing.assert_allclose(
            together[name].values, sweep(model, CORRUPTED, CLEAN, metric, "resid_pre").values, atol=1e-5
        )
    np.testing.assert_allclose(together["kl"].baseline, 0.0, atol=1e-6)


def test_chunks_change_nothing(model: HookedTransformer) -> None:
    whole = sweep(model, CORRUPTED, CLEAN, METRIC, "z", ("pos", "head"))
    for most in (1, 2, 7):
        in_parts = sweep(model, CORRUPTED, CLEAN, METRIC, "z", ("pos", "head"), max_batch=most)
        np.testing.assert_allclose(in_parts.values, whole.values, atol=1e-5)


def test_nothing_is_run_for_a_shared_prefix(model: HookedTransformer) -> None:
    result = check(model, CLEAN, CLEAN.at[:, 4].set(12), METRIC, "resid_pre", ("pos",))
    assert result.report.skipped == 12
    np.testing.assert_array_equal(result.effect()[:, :4], 0)
    with pytest.warns(NoEffectWarning, match="Are both prompts the same"):
        same = sweep(model, CLEAN, CLEAN, METRIC, "resid_pre")
    assert same.report.skipped == 15
    assert same.report.floor_flops == 0
    np.testing.assert_array_equal(same.effect(), 0)
    with pytest.raises(InputError, match="nothing to normalise by"):
        same.normalized()


def test_positions_after_the_metric_are_not_run(model: HookedTransformer) -> None:
    result = sweep(model, CORRUPTED, CLEAN, LogitDiff(1, 3, pos=2), "resid_pre")
    np.testing.assert_array_equal(result.effect()[:, 3:], 0)
    assert result.effect()[0, 2] != 0


def test_a_metric_that_reads_elsewhere_on_patched_runs(model: HookedTransformer) -> None:
    base = float(model(CORRUPTED)[0, -1, 1])

    def metric(logits: Any) -> float:
        value = float(logits[0, -1, 1])
        return value if value == pytest.approx(base, abs=1e-6) else float(logits[0, 0, 1])

    swept = sweep(model, CORRUPTED, CLEAN, metric, "resid_post")
    name = "blocks.1.hook_resid_post"
    _, cache = model.run_with_cache(CLEAN)
    logits = model.run_with_hooks(CORRUPTED, fwd_hooks=[(name, Replace(cache[name], pos=3))])
    np.testing.assert_allclose(swept.values[1, 3], logits[0, 0, 1], atol=1e-5)


def test_the_number_of_programs_does_not_grow_with_layers_or_repeats(compilations: Any) -> None:
    def programs(n_layers: int) -> int:
        start = compilations.count
        model = build("gpt2", n_layers=n_layers, d_model=20)
        sweep(model, CORRUPTED, CLEAN, METRIC, "resid_pre")
        first = compilations.count
        sweep(model, CLEAN, CORRUPTED, LogitDiff(METRIC.wrong, METRIC.answer), "resid_pre")
        sweep(model, CORRUPTED, CLEAN, METRIC, "resid_pre")
        assert compilations.count == first
        return first - start

    few = programs(8)
    assert programs(16) <= few + 4  # packed batches have at most five sizes, which shallow models do not all need


def test_prompts_of_different_lengths_share_programs(compilations: Any) -> None:
    model = build("gpt2", n_layers=3, d_model=20, n_ctx=32)
    rng = np.random.default_rng(0)

    def compiled(length: int) -> int:
        before = compilations.count
        pair = rng.integers(0, 13, (2, 1, length))
        sweep(model, pair[0], pair[1], lambda logits: logits[0, -1, 1] - logits[0, -1, 3], "resid_pre")
        return compilations.count - before

    compiled(32), compiled(16)
    lengths = [9, 28, 11, 17, 13, 31, 16, 20, 15, 24, 10, 30]
    counts = [compiled(length) for length in lengths]
    assert sum(counts) <= 4
    assert [compiled(length) for length in lengths] == [0] * len(lengths)


def test_flops_stay_near_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    share, _ = packing._WORTH_COMPILING
    monkeypatch.setattr(packing, "_WORTH_COMPILING", (share, 0.0))
    model = build("gpt2", n_layers=8, n_ctx=32, d_model=128, n_heads=2)
    clean = np.random.default_rng(0).integers(0, 13, (1, 16))
    pair = (clean + 1) % 13, clean
    report = sweep(model, pair[0], pair[1], LogitDiff(1, 3), "resid_pre").report
    assert report.floor_flops < report.flops
    assert report.flops < 1.6 * report.floor_flops
    assert report.naive_flops > 3 * report.flops
    per_token = 4 * 2 * 128 * 16 + 2 * 2 * 128 * 512
    assert report.floor_flops == per_token * (8 * 7 / 2) * (16 * 17 / 2)


def test_patching_everything_clean_gives_the_clean_metric(model: HookedTransformer) -> None:
    swept = sweep(model, CORRUPTED, CLEAN, METRIC, "resid_pre", axes=())
    np.testing.assert_allclose(swept.clean, METRIC(model(CLEAN)).mean(), atol=1e-5)
    np.testing.assert_allclose(swept.normalized(), np.ones(3), atol=1e-4)


@pytest.mark.parametrize(("activation", "axes"), [("resid_post", ("pos",)), ("z", ("head",)), ("embed", ("pos",))])
def test_a_model_that_carries_hooks(model: HookedTransformer, activation: str, axes: tuple[str, ...]) -> None:
    def last_doubled(resid: jax.Array, hook: Any) -> jax.Array:
        return resid.at[:, -1].multiply(2)

    hooked = model.add_hook("blocks.1.attn.hook_z", Zero(head=0)).add_hook("blocks.1.hook_resid_post", last_doubled)
    result = check(hooked, CLEAN, CORRUPTED, METRIC, activation, axes)
    assert float(abs(result.baseline - METRIC(model(CORRUPTED))).max()) > 1e-3


def test_labels_and_plot(tiny: HookedTransformer) -> None:
    clean, corrupted = (f"When John and Mary went to the store, {name} gave a drink to" for name in ("John", "Mary"))
    result = sweep(tiny, corrupted, clean, lambda logits: logits[0, -1, 5], "resid_pre")
    assert result.labels["pos"][2] == " John"
    assert result.labels["layer"][3] == "L3"
    result.plot()


def test_mistakes(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(CLEAN)
    run = functools.partial(sweep, model, CORRUPTED)
    with pytest.raises(InputError, match=r"hook_resid_pre has axes .* cannot go along 'head'"):
        run(cache, METRIC, "resid_pre", ("head",))
    with pytest.raises(UnknownHookError, match="resid_pre"):
        run(cache, METRIC, "resid_pree")
    with pytest.raises(InputError, match="the cache that values are taken from second"):
        sweep(model, model.run_with_cache(CLEAN)[1], CORRUPTED, METRIC, "resid_pre")
    with pytest.raises(InputError, match="must have equally many tokens"):
        sweep(model, CORRUPTED[:, :4], cache, METRIC, "resid_pre")
    with pytest.raises(InputError, match="must have equally many"):
        sweep(model, CORRUPTED[:, :4], CLEAN, METRIC, "resid_pre")
    with pytest.raises(InputError, match=r"does not hold blocks.0.hook_resid_pre.*names_filter"):
        run(model.run_with_cache(CLEAN, names_filter="resid_post1")[1], METRIC, "resid_pre")
    with pytest.raises(InputError, match="position"):
        run(cache, LogitDiff(1, 3, pos=5), "resid_pre")
    with pytest.raises(InputError, match="no token 300"):
        run(cache, LogitDiff(1, 300), "resid_pre")
    with pytest.raises(InputError, match="no token 13"):
        run(cache, lambda logits: logits[0, -1, 13], "resid_pre")
    with pytest.raises(InputError, match=r"layers\[0\]=3 is out of range: there are 3 layers, 0 to 2"):
        run(cache, METRIC, "resid_pre", layers=[3])
    with pytest.raises(InputError, match=r"at=.*out of range: .* 5 entries"):
        run(cache, METRIC, "resid_pre", at={"pos": [5]})
    with pytest.raises(InputError, match="max_batch=0 must be a positive number"):
        run(cache, METRIC, "resid_pre", max_batch=0)
    with pytest.raises(InputError, match="keeps a number for each prompt"):
        run(cache, lambda logits: logits[0, -1, 1], "resid_pre", reduce="none")
    with pytest.raises(InputError, match="came as set"):
        run({1, 2}, METRIC, "resid_pre")
    with pytest.raises(InputError, match="does not fit"):
        run(jnp.ones((2, 4)), METRIC, "resid_pre")
    with pytest.raises(InputError, match="names an axis twice"):
        run(cache, METRIC, "z", ("pos", "pos"))
    with pytest.raises(InputError, match="mapping of metrics is empty"):
        run(cache, {}, "resid_pre")
    with pytest.raises(InterventionError, match="head"):
        run(Zero(head=1), METRIC, "resid_pre")
    with pytest.raises(InputError, match="carries a hook at ln_final"):
        sweep(model.add_hook("ln_final.hook_scale", Zero()), CORRUPTED, CLEAN, METRIC, "resid_pre")
    with pytest.raises(InputError, match=r"outside jax.jit"):
        jax.jit(lambda tokens: sweep(model, tokens, cache, METRIC, "resid_pre").values)(CORRUPTED)
    result = run(cache, METRIC, "resid_pre")
    with pytest.raises(InputError, match="nothing to normalise by"):
        result.normalized(result.baseline)


def test_top_lists_the_largest_effects_first(model: HookedTransformer) -> None:
    result = sweep(model, CORRUPTED, CLEAN, METRIC, "resid_pre")
    top = result.top(4)
    assert [effect for _, effect in top] == sorted((effect for _, effect in top), reverse=True)
    (layer, pos), effect = top[0]
    assert effect == pytest.approx(float(result.effect()[layer, pos]))
    assert effect == pytest.approx(float(result.effect().max()))
    assert result.top(1, by="lowest")[0][1] == pytest.approx(float(result.effect().min()))
    assert abs(result.top(1, by="size")[0][1]) == pytest.approx(float(abs(result.effect()).max()))
