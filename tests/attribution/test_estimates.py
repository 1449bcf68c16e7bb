"""Estimates agree with what they approximate: identities that hold exactly, and brute force by hooks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import build

from tljax import Add, Batch, HookedTransformer, Replace, Scale, Zero
from tljax.attribution import AtPStar, RelP, Verify
from tljax.patching import KL, Logit, LogitDiff, NoEffectWarning, sweep

CLEAN = jnp.asarray(np.random.default_rng(3).integers(0, 13, (2, 5)), jnp.int32)
CORRUPTED = CLEAN.at[:, 2].set(jnp.asarray([11, 7])).at[1, 1].set(3)
METRIC = LogitDiff(answer=jnp.asarray([1, 2]), wrong=jnp.asarray([3, 4]))
KINDS = ("gpt2", "neox", "llama", "sandwich", "moe")


def effects(model: HookedTransformer, name: str, axes: tuple[str, ...], source: Any = CORRUPTED, **options: Any) -> Any:
    base, metric = options.pop("base", CLEAN), options.pop("metric", METRIC)
    return np.asarray(sweep(model, base, source, metric, name, axes, reduce="none", **options).effect())


def close(found: Any, right: Any, tolerance: float = 2e-5) -> None:
    found, right = np.asarray(found), np.asarray(right)
    np.testing.assert_allclose(found, right, rtol=0, atol=tolerance * np.abs(right).max())


def gradients(model: HookedTransformer, names: list[str], hooks: list[Any] = [], tokens: Any = CLEAN) -> Any:  # noqa: B006
    """Gradients at points by ``jax.grad`` of a run with zeros added there, ``{name: [batch, ...]}``."""
    shapes = {name: model.run_with_cache(tokens, names_filter=name)[1][name].shape for name in names}

    def loss(offsets: Any) -> jax.Array:
        added = [(name, Add(offset)) for name, offset in offsets.items()]
        return METRIC(model.run_with_hooks(tokens, fwd_hooks=[*hooks, *added])).sum()

    return jax.grad(loss)({name: jnp.zeros(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_integrated_gradients_are_complete(kind: str) -> None:
    """All positions of a layer's stream together have the exact effect of patching the layer: every term is right."""
    model, options = build(kind), {"layers": 1, "method": "ig", "steps": 24}
    for name, axes in (("resid_pre", ("pos",)), ("v", ("pos", "head"))):
        result = sweep(model, CLEAN, CORRUPTED, METRIC, name, axes, reduce="none", **options)
        found = np.asarray(result.effect()).sum(axis=tuple(range(1, 1 + len(axes))))
        close(found, effects(model, name, (), layers=1), 1e-4)
        assert result.completeness is not None
        assert result.completeness.error < 1e-4


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_attribution_is_delta_times_gradient(kind: str) -> None:
    model = build(kind)
    names = ["blocks.0.attn.hook_z", "blocks.1.attn.hook_k", "hook_embed"]
    right = gradients(model, names)
    caches = [model.run_with_cache(tokens, names_filter=names)[1] for tokens in (CLEAN, CORRUPTED)]
    for name in names:
        product = np.asarray((caches[1][name] - caches[0][name]) * right[name])  # [batch, pos, ...]
        per_position = np.moveaxis(product.reshape(2, 5, -1).sum(-1), 0, 1)
        found = effects(model, name, ("pos",), method="attribution")
        close(found[0] if name.startswith("blocks") else found, per_position)
        whole = effects(model, name, (), at={"pos": [1, 2, 4]}, method="attribution")
        close(
            whole,
            per_position[[1, 2, 4]].sum(axis=0)[None] if name.startswith("blocks") else per_position[[1, 2, 4]].sum(0),
        )
    z = np.asarray((caches[1][names[0]] - caches[0][names[0]]) * right[names[0]])
    close(effects(model, names[0], ("d_head", "head"), method="attribution")[0], z.sum(1).transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("side", "kind", "rule"), [("left", "gpt2", "atp*"), ("right", "llama", None), ("left", "llama", "relp")]
)
def test_padding_changes_nothing(side: Any, kind: str, rule: Any) -> None:
    model, options = build(kind), {"method": "attribution", "rule": rule}
    rows, others = ([row[:4], row] for row in (CLEAN[0].tolist(), CORRUPTED[0].tolist()))
    base, source = (padded(each, side) for each in (rows, others))
    for name, axes in (("z", ("head", "pos")), ("k", ("pos",))):
        found = effects(model, name, axes, base=base, source=source, metric=LogitDiff(1, 3), **options)
        for number, (row, other) in enumerate(zip(rows, others, strict=True)):
            alone = effects(
                model,
                name,
                axes,
                base=jnp.asarray([row]),
                source=jnp.asarray([other]),
                metric=LogitDiff(1, 3),
                **options,
            )[..., 0]
            pos = axes.index("pos") + 1
            close(np.take(found[..., number], range(len(row)), axis=pos), alone)
            assert not np.take(found[..., number], range(len(row), 5), axis=pos).any()


def padded(rows: list[list[int]], side: Any) -> Batch:
    length = max(map(len, rows))
    pads = [[0] * (length - len(row)) for row in rows]
    tokens = [pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [pad + one if side == "left" else one + pad for one, pad in zip(ones, pads, strict=True)]
    return Batch.from_mask(jnp.asarray(tokens, jnp.int32), np.asarray(mask), side)


@functools.cache
def linear() -> HookedTransformer:
    """A model whose logits are linear in the residual stream: no norms, no MLP, every key attended to alike."""
    model = build("attn_only", normalization_type=None)
    params = model.params

    def without_queries(path: Any, leaf: jax.Array) -> jax.Array:
        return jnp.zeros_like(leaf) if path[-1].key in ("W_Q", "b_Q") else leaf

    return model.replace(params=jax.tree_util.tree_map_with_path(without_queries, params))


@pytest.mark.parametrize("options", [
    {"method": "attribution"}, {"method": "attribution", "rule": "relp"},
    {"method": "attribution", "gradient_at": "source"},
    {"method": "ig", "steps": 1}, {"method": "ig", "steps": 2, "along": "inputs", "grid": "left"},
])  # fmt: skip
def test_a_linear_model_is_estimated_exactly(options: Any) -> None:
    for name, axes in (("resid_pre", ("pos",)), ("z", ("head", "pos")), ("embed", ("pos",))):
        close(effects(linear(), name, axes, **options), effects(linear(), name, axes))


@pytest.mark.parametrize(("kind", "letter"), [("llama", "q"), ("llama", "k"), ("soft_caps", "k")])
def test_the_pattern_changes_truly_under_the_q_and_k_fix(kind: str, letter: str) -> None:
    model, layer = build(kind), 1
    point, pattern = f"blocks.{layer}.attn.hook_{letter}", f"blocks.{layer}.attn.hook_pattern"
    slope = gradients(model, [pattern])[pattern]
    source = model.run_with_cache(CORRUPTED, names_filter=point)[1][point]

    def pattern_with(**at: int) -> jax.Array:
        patch = (point, Replace(source, **at))
        return model.add_hook(*patch).run_with_cache(CLEAN, names_filter=pattern)[1][pattern]

    old = model.run_with_cache(CLEAN, names_filter=pattern)[1][pattern]
    right = [[((pattern_with(pos=pos, head=head) - old) * slope).sum((1, 2, 3)) for pos in (2, 4)]
             for head in range(source.shape[2])]  # fmt: skip
    rule = AtPStar(grad_drop=False)
    found = effects(model, letter, ("head", "pos"), layers=layer, at={"pos": [2, 4]}, method="attribution", rule=rule)
    close(found[0], np.asarray(right))
    together = ((pattern_with() - old) * slope).sum((1, 2, 3))
    close(effects(model, letter, (), layers=layer, method="attribution", rule=rule)[0], together)


def test_the_k_fix_survives_saturated_attention() -> None:
    """Scores far apart: the effect is that of recomputing the softmax, in double precision."""
    from tljax.attribution.atp_star import key_effects

    rng = np.random.default_rng(0)
    old, new = (rng.normal(0, 40, (1, 2, 6, 6)) for _ in range(2))
    masked = np.tril(np.ones((6, 6), bool))
    slope = rng.normal(size=(1, 1, 2, 6, 6))

    def softmax(scores: np.ndarray) -> np.ndarray:
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    old, new = (np.where(masked, scores, -np.inf) for scores in (old, new))
    pattern = softmax(old)
    right = np.stack([
        ((softmax(np.where(np.arange(6) == t, new, old)) - pattern)[None] * slope).sum((-1, -2)) for t in range(6)
    ], axis=-1)  # fmt: skip
    single = [jnp.asarray(array, jnp.float32) for array in (old, new, pattern, slope)]
    close(key_effects(*single), right, 1e-5)


def test_grad_drop_cuts_one_layer_at_a_time() -> None:
    model, names = build("gpt2", n_layers=3), [f"blocks.{layer}.attn.hook_z" for layer in range(3)]
    caches = [model.run_with_cache(tokens, names_filter=names)[1] for tokens in (CLEAN, CORRUPTED)]

    def stop(value: jax.Array, hook: Any) -> jax.Array:
        return jax.lax.stop_gradient(value)

    total = 0.0
    for dropped in range(3):
        cut = [(f"blocks.{dropped}.{out}", stop) for out in ("hook_attn_out", "hook_mlp_out")]
        slopes = gradients(model, names, cut)
        products = [(caches[1][name] - caches[0][name]) * slopes[name] for name in names]
        total = total + np.abs(np.stack([product.sum(-1).transpose(2, 1, 0) for product in products]))
    found = sweep(
        model, CLEAN, CORRUPTED, METRIC, "z", ("head", "pos"), reduce="none", method="attribution", rule="atp*"
    )
    close(found.effect(), total / 2)
    assert "no sign" in repr(found)
    mean = sweep(model, CLEAN, CORRUPTED, METRIC, "z", ("head", "pos"), method="attribution", rule="atp*")
    close(mean.effect(), total.mean(-1) / 2)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "sandwich", "moe"])
def test_relevance_is_conserved(kind: str) -> None:
    """Without biases the stream's parts sum to the logit at every layer: patching by zero takes all of it away."""
    model = build(kind)

    def unbiased(path: Any, leaf: jax.Array) -> jax.Array:
        return jnp.zeros_like(leaf) if path[-1].key.startswith("b") and leaf.ndim < 3 else leaf

    model = model.replace(params=jax.tree_util.tree_map_with_path(unbiased, model.params))
    options = {"source": Zero(), "metric": Logit(2), "method": "attribution", "rule": RelP(freeze_pattern=True)}
    found = effects(model, "resid_pre", ("pos",), **options).sum(axis=1)
    close(found, np.broadcast_to(-np.asarray(Logit(2)(model(CLEAN))), found.shape), 1e-4)


def test_verification_is_exact_patching() -> None:
    model = build("gpt2", n_layers=3)
    exact = sweep(model, CLEAN, CORRUPTED, METRIC, "z", ("head", "pos"))
    how = Verify(k=6, subsets=3, seed=1)
    found = sweep(model, CLEAN, CORRUPTED, METRIC, "z", ("head", "pos"), method="attribution", verify=how)
    checked = found.verified
    assert checked is not None
    assert len(checked.sites) == 6
    assert checked.n_others == exact.values.size - 6
    close(checked.exact, [exact.effect()[site] for site in checked.sites])
    close(checked.estimate, [found.effect()[site] for site in checked.sites])
    assert checked.sites[0] == found.top(1, by="size")[0][0]
    others = set(np.ndindex(exact.shape)) - set(checked.sites)
    assert checked.bound is not None
    assert checked.bound >= max(abs(float(exact.effect()[site])) for site in others)
    assert checked.rank_correlation == pytest.approx(np.corrcoef(*(np.argsort(np.argsort(effects)) for effects in (
        checked.estimate, checked.exact)))[0, 1])  # fmt: skip
    # all others patched at once: one half that is everything
    everything = sweep(linear(), CLEAN, CORRUPTED, METRIC, "embed", ("pos",), method="attribution", verify=Verify(k=1))
    assert everything.verified is not None
    close(everything.verified.joint_exact, everything.verified.joint_estimate, 1e-4)
    assert "R²" in repr(found)
    assert checked.plot() is not None


def test_a_result_says_what_it_estimates() -> None:
    model = build("gpt2")
    metrics = {"diff": METRIC, "logit": Logit(2)}
    found = sweep(model, CLEAN, CORRUPTED, metrics, "z", ("head",), method="attribution")
    assert found.convention is not None
    assert "gradient at the base run" in repr(found["diff"])
    close(found.values, found.effect() + found.baseline[:, None, None])
    close(found.select(layer=1)["diff"].effect(), np.asarray(found.effect())[0, 1])
    back = jax.tree.map(lambda leaf: leaf, found)
    assert back.convention == found.convention
    assert (back.effect() == found.effect()).all()
    alone = sweep(model, CLEAN, CORRUPTED, metrics["logit"], "z", ("head",), method="attribution")
    close(found["logit"].effect(), alone.effect())
    at_source = sweep(model, CLEAN, CORRUPTED, METRIC, "z", ("head",), method="attribution", gradient_at="source")
    swapped = sweep(model, CORRUPTED, CLEAN, METRIC, "z", ("head",), method="attribution")
    close(at_source.effect(), -swapped.effect())
    distance = KL(model(CLEAN))
    assert np.isfinite(sweep(model, CLEAN, CORRUPTED, distance, "z", ("head",), method="ig").values).all()
    with pytest.warns(NoEffectWarning):
        sweep(model, CLEAN, CLEAN, METRIC, "z", ("head",), method="attribution")


def test_hooks_that_the_model_carries_apply() -> None:
    model = build("gpt2").add_hook("blocks.1.hook_resid_pre", Scale(0.5))
    names = ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
    slopes = gradients(model, names)
    caches = [model.run_with_cache(tokens, names_filter=names)[1] for tokens in (CLEAN, CORRUPTED)]
    right = np.stack([((caches[1][name] - caches[0][name]) * slopes[name]).sum((1, 3)).T for name in names])
    close(effects(model, "z", ("head",), method="attribution"), right)


def test_layers_share_programs(compilations: Any) -> None:
    model = build("gpt2", n_layers=20, d_model=24)
    sweep(model, CLEAN, CORRUPTED, METRIC, "z", ("head",), method="attribution")
    first = compilations.count
    assert first < 20 + 40  # not one a layer, besides small ones that other tests share
    sweep(model, CORRUPTED, CLEAN, LogitDiff(answer=[5, 6], wrong=[7, 8]), "z", ("head",), method="attribution")
    assert compilations.count == first
