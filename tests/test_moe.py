"""Mixtures of experts: grouped products against every expert on every token, routing, hooks, processing."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import TOKENS, build, randomised_params

from tljax import HookedTransformer, HookedTransformerConfig, Replace, Scale, Zero
from tljax.config import LayerKind
from tljax.errors import ConfigError, HookError
from tljax.modules.grouped import Times, grouped, tile_height
from tljax.patching import LogitDiff, sweep
from tljax.weights.processing import process_weights

N_GROUPS, WIDTH, INNER = 5, 6, 7


@pytest.fixture(scope="module")
def matrices() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = ((N_GROUPS, WIDTH, INNER), (N_GROUPS, INNER, WIDTH))
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)  # type: ignore[return-value]


def rows_and_groups(n_rows: int, spread: str, batch: tuple[int, ...] = ()) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(n_rows)
    group = {"even": rng.integers(0, N_GROUPS, (*batch, n_rows)), "one": np.full((*batch, n_rows), 3)}[spread]
    return jnp.asarray(rng.standard_normal((*batch, n_rows, WIDTH)), jnp.float32), jnp.asarray(group, jnp.int32)


def inner(x: jax.Array, times: Times, matrices: tuple[jax.Array, jax.Array]) -> jax.Array:
    return times(jnp.tanh(times(x, matrices[0], None)), matrices[1], matrices[0][:, 0, :WIDTH])


def row_by_row(rows: jax.Array, group: jax.Array, matrices: tuple[jax.Array, jax.Array]) -> jax.Array:
    product = jnp.einsum("ni,nio->no", jnp.tanh(jnp.einsum("ni,nio->no", rows, matrices[0][group])), matrices[1][group])
    return product + matrices[0][group, 0, :WIDTH]


def by_group(rows: jax.Array, group: jax.Array, matrices: tuple[jax.Array, jax.Array]) -> jax.Array:
    return grouped(lambda x, times: inner(x, times, matrices), rows, group, N_GROUPS)


@pytest.mark.parametrize(("n_rows", "spread"), [(1, "even"), (3, "one"), (13, "even"), (40, "one"), (700, "even")])
def test_each_row_meets_the_matrices_of_its_group(n_rows: int, spread: str, matrices: Any) -> None:
    rows, group = rows_and_groups(n_rows, spread)
    np.testing.assert_allclose(by_group(rows, group, matrices), row_by_row(rows, group, matrices), atol=1e-5)


def test_grouped_products_differentiate_and_vmap(matrices: Any) -> None:
    rows, group = rows_and_groups(17, "even", batch=(3,))

    def total(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda rows, matrices: jnp.sin(jax.vmap(function, (0, 0, None))(rows, group, matrices)).sum()

    expected = jax.grad(total(row_by_row), argnums=(0, 1))(rows, matrices)
    found = jax.grad(total(by_group), argnums=(0, 1))(rows, matrices)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


def test_tiles_never_grow_past_a_bound_of_rows() -> None:
    for n_rows in (1, 4, 5, 64, 4096):
        height = tile_height(n_rows, N_GROUPS)
        assert 1 <= height <= 128
        assert min(n_rows, -(-n_rows // height) + N_GROUPS) * height <= 2 * n_rows + N_GROUPS * height


MOE = {
    "positional_embedding_type": "rotary", "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS",
    "num_experts": 5, "experts_per_token": 2, "d_expert": 9,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "softmax": {"norm_topk_prob": True},
    "unnormalised": {
        "n_layers": 3, "moe_layers": (True, False, True), "d_shared_expert": 6, "gate_shared_expert": True,
    },
    "chosen_softmax": {"router": "chosen_softmax", "gated_mlp": False},
    "sparsemixer": {"router": "sparsemixer", "normalization_type": "LN", "router_jitter": 0.3},
    "sigmoid": {
        "router": "sigmoid", "num_experts": 8, "experts_per_token": 3, "expert_groups": 4, "expert_groups_per_token": 2,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "d_shared_expert": 6,
    },
    "softmax groups": {"num_experts": 8, "expert_groups": 4, "expert_groups_per_token": 2},
}  # fmt: skip


def model_of(kind: str, **changes: Any) -> HookedTransformer:
    return build("gpt2", **(MOE | KINDS[kind] | changes))


def reference(model: HookedTransformer, x: np.ndarray, layer: int) -> np.ndarray:
    """The mixture of one layer, token by token and expert by expert, in numpy."""
    cfg, params = model.cfg, jax.tree.map(np.asarray, model.params["blocks"][layer]["mlp"])
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:2]):
        token = x[place]
        scores = token @ params["W_router"]
        for expert, weight in weigh(cfg, scores, params):
            out[place] += weight * mlp(cfg, token, {name: part[expert] for name, part in params["experts"].items()})
        if cfg.d_shared_expert:
            gate = 1 / (1 + np.exp(-token @ params["W_shared_gate"])) if cfg.gate_shared_expert else 1
            out[place] += gate * mlp(cfg, token, params["shared"])
    return out


def mlp(cfg: HookedTransformerConfig, token: np.ndarray, params: dict[str, np.ndarray]) -> np.ndarray:
    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    linear = token @ params["W_in"]
    post = silu(token @ params["W_gate"]) * linear if cfg.gated_mlp else silu(linear)
    return (post + params.get("b_in", 0)) @ params["W_out"] + params.get("b_out", 0)


def softmax(scores: np.ndarray) -> np.ndarray:
    return np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()


def weigh(cfg: HookedTransformerConfig, scores: np.ndarray, params: dict[str, Any]) -> list[tuple[int, float]]:
    """Chosen experts with their weights."""
    assert cfg.num_experts is not None
    if cfg.router == "sparsemixer":
        first = int(scores.argmax())
        rest = [e for e in range(cfg.num_experts) if e != first]
        second = max(rest, key=lambda e: scores[e])
        pairs = []
        for best, among in ((first, [first, *rest]), (second, rest)):
            close = [
                e for e in among
                if (scores[best] - scores[e]) / max(abs(scores[e]), scores[best]) <= 2 * cfg.router_jitter
            ]  # fmt: skip
            pairs.append((best, float(np.exp(scores[best]) / np.exp(scores[close]).sum())))
        return pairs
    weights = 1 / (1 + np.exp(-scores)) if cfg.router == "sigmoid" else softmax(scores)
    merit = weights + params.get("b_choice", 0)
    if cfg.expert_groups:
        groups = merit.reshape(cfg.expert_groups, -1)
        value = np.sort(groups)[:, -2:].sum(1) if cfg.router == "sigmoid" else groups.max(1)
        lost = np.argsort(-value)[cfg.expert_groups_per_token :]
        merit = np.where(np.isin(np.arange(cfg.num_experts) // groups.shape[1], lost), -np.inf, merit)
    chosen = np.argsort(-merit)[: cfg.experts_per_token]
    of_chosen = weights[chosen]
    if cfg.norm_topk_prob or cfg.router == "chosen_softmax":
        of_chosen = of_chosen / of_chosen.sum()
    return [(int(e), float(w) * cfg.routed_scaling_factor) for e, w in zip(chosen, of_chosen, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_token_by_token(kind: str) -> None:
    model = model_of(kind)
    names = [f"blocks.0.{name}" for name in ("mlp.hook_in", "hook_mlp_out")]
    _, cache = model.run_with_cache(TOKENS, names_filter=names)
    np.testing.assert_allclose(cache[names[1]], reference(model, np.asarray(cache[names[0]]), 0), atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_point_fires_as_the_table_says_and_changes_nothing(kind: str) -> None:
    model = model_of(kind)
    logits, cache = model.run_with_cache(TOKENS)
    np.testing.assert_allclose(logits, model(TOKENS), atol=1e-5)
    table = {point.name: point for point in model.hook_points()}
    assert list(cache) == [name for name, point in table.items() if not point.optional]
    assert {name: value.shape for name, value in cache.items()} == {n: table[n].shape(*TOKENS.shape) for n in cache}
    for layer in range(model.cfg.n_layers):
        assert ("mlp.hook_post" in str(list(cache))) or model.cfg.moe_layers is None
        assert (f"blocks.{layer}.mlp.hook_expert_indices" in cache) == model.cfg.layer_kind(layer).experts


@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_experts_are_in_the_order_of_the_choice(kind: str) -> None:
    model = model_of(kind)
    _, cache = model.run_with_cache(TOKENS)
    experts, x = (
        model.params["blocks"][0]["mlp"]["experts"],
        model.run_with_cache(TOKENS, names_filter="blocks.0.mlp.hook_in")[1]["blocks.0.mlp.hook_in"],
    )
    chosen = cache["blocks.0.mlp.hook_expert_indices"]
    assert chosen.dtype == jnp.int32
    pre = jnp.einsum("bpd,bpcdn->bpcn", x, experts["W_gate" if model.cfg.gated_mlp else "W_in"][chosen])
    np.testing.assert_allclose(cache["blocks.0.mlp.experts.hook_pre"], pre, atol=1e-5)
    post = jax.nn.silu(pre)
    if model.cfg.gated_mlp:
        linear = jnp.einsum("bpd,bpcdn->bpcn", x, experts["W_in"][chosen])
        np.testing.assert_allclose(cache["blocks.0.mlp.experts.hook_pre_linear"], linear, atol=1e-5)
        post = post * linear
    np.testing.assert_allclose(cache["blocks.0.mlp.experts.hook_post"], post, atol=1e-5)


INDICES, WEIGHTS, SCORES = (
    f"blocks.1.mlp.hook_{name}" for name in ("expert_indices", "expert_weights", "router_scores")
)
OUT = "blocks.1.hook_mlp_out"


def run(model: HookedTransformer, hooks: list[Any], *names: str) -> Any:
    with model.hooks(fwd_hooks=hooks) as hooked:
        return hooked.run_with_cache(TOKENS, names_filter=[*names])[1]


@pytest.mark.parametrize("compiled", [False, True], ids=["python", "compiled"])
@pytest.mark.parametrize("kind", ["softmax", "chosen_softmax", "sparsemixer", "sigmoid"])
def test_other_experts_can_be_chosen(kind: str, compiled: bool) -> None:
    model = model_of(kind, router_jitter=5.0)
    before = run(model, [], OUT, INDICES)
    fixed = jnp.broadcast_to(jnp.asarray([4, 0, 3], jnp.int32)[: before[INDICES].shape[-1]], before[INDICES].shape)
    hook = Replace(fixed) if compiled else (lambda value, hook: fixed)
    after = run(
        model, [(INDICES, hook)], OUT, INDICES, WEIGHTS, "blocks.1.mlp.experts.hook_post", "blocks.1.mlp.hook_in"
    )
    np.testing.assert_array_equal(after[INDICES], fixed)
    outputs = jnp.einsum(
        "bpcn,bpcnd->bpcd", after["blocks.1.mlp.experts.hook_post"],
        model.params["blocks"][1]["mlp"]["experts"]["W_out"][fixed],
    )  # fmt: skip
    weights = jnp.take_along_axis(after[WEIGHTS], fixed, -1)
    assert float(weights.min()) > 0
    if model.cfg.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdims=True)
    expected = (outputs * weights[..., None]).sum(2) * model.cfg.routed_scaling_factor
    if model.cfg.d_shared_expert:
        expected += model.blocks[1].mlp.shared(after["blocks.1.mlp.hook_in"])
    np.testing.assert_allclose(after[OUT], expected, atol=1e-5)
    assert float(jnp.abs(after[OUT] - before[OUT]).max()) > 1e-2


def test_edited_weights_choose_and_weigh() -> None:
    model = model_of("softmax")
    after = run(model, [(WEIGHTS, Zero(expert=2)), (WEIGHTS, Scale(9.0, expert=1))], WEIGHTS, INDICES)
    assert not bool((after[INDICES] == 2).any())
    assert bool((after[WEIGHTS][..., 2] == 0).all())
    scores = run(model, [(SCORES, Replace(jnp.float32(50.0), expert=3))], INDICES)
    assert bool((scores[INDICES][..., 0] == 3).all())


def test_edited_neurons_take_effect() -> None:
    model = model_of("softmax")
    name = "blocks.1.mlp.experts.hook_post"
    silent = run(model, [(name, Zero())], OUT)
    assert not silent[OUT].any()
    halves = [run(model, [(name, Zero(choice=n))], OUT)[OUT] for n in (0, 1)]
    np.testing.assert_allclose(halves[0] + halves[1], run(model, [], OUT)[OUT], atol=1e-5)


@pytest.mark.parametrize("number", [-1, 5])
def test_a_number_that_is_no_expert(number: int) -> None:
    model = model_of("softmax")
    with pytest.raises(HookError, match=rf"blocks\.1\.mlp\.hook_expert_indices.*{number}.*0 to 4"):
        model.run_with_hooks(TOKENS, fwd_hooks=[(INDICES, lambda value, hook: value.at[0, 0, 0].set(number))])
    with pytest.raises(HookError, match=rf"{number}.*0 to 4"):
        model.run_with_hooks(TOKENS, fwd_hooks=[(INDICES, Replace(jnp.int32(number), pos=3))])
    poisoned = jax.jit(lambda n: model.run_with_hooks(TOKENS, fwd_hooks=[(INDICES, Replace(n, pos=3))]))(number)
    assert bool(jnp.isnan(poisoned[:, 3]).all())
    assert bool(jnp.isfinite(poisoned[:, [0, 1, 2, 4, 5]]).all())


@pytest.mark.parametrize("kind", KINDS)
def test_processing_leaves_the_function_alone(kind: str) -> None:
    model = model_of(kind)
    params, cfg = process_weights(model.params, model.cfg)
    assert cfg.normalization_type == ("RMSPre" if model.cfg.normalization_type == "RMS" else "LN")
    processed = HookedTransformer(cfg, params=params)
    expected = jax.nn.log_softmax(model(TOKENS))
    np.testing.assert_allclose(jax.nn.log_softmax(processed(TOKENS)), expected, atol=1e-5)


def test_gradients_reach_router_and_experts() -> None:
    model = model_of("softmax")

    def loss(params: Any) -> jax.Array:
        return model.replace(params=params)(TOKENS, return_type="loss")

    gradient = jax.grad(loss)(model.params)["blocks"][0]["mlp"]
    assert all(bool(jnp.abs(leaf).max() > 0) for leaf in jax.tree.leaves(gradient))
    direction = jax.tree.map(jnp.ones_like, model.params)
    step = 1e-3
    ahead, behind = (jax.tree.map(lambda p, s=signed: p + s, model.params) for signed in (step, -step))
    slope = (loss(ahead) - loss(behind)) / (2 * step)
    _, exact = jax.jvp(loss, (model.params,), (direction,))
    np.testing.assert_allclose(slope, exact, rtol=2e-2)


def test_layers_of_a_kind_share_one_program(compilations: Any) -> None:
    cfg = HookedTransformerConfig(**(
        {"d_model": 16, "n_heads": 4, "d_head": 8, "n_ctx": 12, "d_vocab": 13, "n_layers": 6} | MOE
        | {"moe_layers": (False, True, True, False, True, True)}
    ))  # fmt: skip
    model = HookedTransformer(cfg, params=randomised_params(cfg))
    assert set(cfg.layer_kinds) == {LayerKind(experts=True), LayerKind()}
    tokens = jnp.asarray(TOKENS[:, :5])
    before = compilations.count
    model(tokens)
    assert compilations.count - before <= 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 6}, r"experts_per_token=6 is more than num_experts=5"),
        ({"experts_per_token": None}, r"go together, got 5 and None"),
        ({"num_experts": 0}, r"num_experts must be an integer of at least 1"),
        ({"router": "topk"}, r"router='topk' is not one of"),
        ({"router": "sparsemixer", "experts_per_token": 3}, r"chooses 2 experts"),
        ({"expert_groups": 2, "expert_groups_per_token": 1}, r"must fall into equal groups"),
        ({"moe_layers": (True,)}, r"moe_layers has 1 entries"),
        ({"attn_only": True}, r"num_experts=5 needs an activation"),
        ({"num_experts": None, "experts_per_token": None, "d_shared_expert": 4}, r"need num_experts"),
    ],
)
def test_configs_that_describe_no_mixture(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HookedTransformerConfig(**({"d_model": 16, "n_heads": 4, "n_ctx": 12, "n_layers": 2} | MOE | changes))


def test_weights_of_experts_are_not_those_of_an_mlp() -> None:
    model = model_of("softmax")
    with pytest.raises(ConfigError, match=r"has experts, so no W_in .*model\.blocks\[layer\]\.mlp\.experts\.W_in"):
        _ = model.W_in
    assert model.blocks[1].mlp.experts.W_in.shape == (5, 16, 9)
    assert model.blocks[1].mlp.W_router.shape == (16, 5)


def test_parameters_are_counted_as_transformerlens_counts_them() -> None:
    cfg = model_of("softmax", d_expert=None, d_mlp=12).cfg
    assert cfg.d_expert == 12
    assert cfg.n_params == 2 * (16 * 8 * 4 * 4 + (16 * 12 * 3 + 16) * 5)


@pytest.mark.filterwarnings("ignore::tljax.patching.sweep.NoEffectWarning")
@pytest.mark.parametrize(
    ("activation", "axes"),
    [
        ("blocks.0.mlp.experts.hook_post", ("pos",)),
        ("blocks.2.mlp.experts.hook_pre", ("choice",)),
        ("blocks.0.mlp.hook_expert_weights", ("pos", "expert")),
        ("blocks.2.mlp.hook_expert_indices", ("pos",)),
        ("blocks.1.mlp.hook_post", ("pos",)),
        ("mlp_out", ("pos",)),
    ],
)
def test_sweeps_where_only_some_layers_have_the_point(activation: str, axes: tuple[str, ...]) -> None:
    model = model_of("unnormalised")
    clean, corrupted = jnp.asarray(TOKENS[:, :5]), jnp.asarray(TOKENS[:, :5]).at[:, 2].set(jnp.asarray([11, 7]))
    metric = LogitDiff(answer=1, wrong=2)
    names = [activation] if "." in activation else [f"blocks.{layer}.hook_{activation}" for layer in range(3)]
    _, cache = model.run_with_cache(clean, names_filter=names)
    sizes = dict(
        zip(next(p for p in model.hook_points() if p.name == names[0]).axes, cache[names[0]].shape, strict=True)
    )
    expected = [
        metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, Replace(cache[name], **at))]))
        for name in names
        for at in [dict(zip(axes, index, strict=True)) for index in np.ndindex(*(sizes[axis] for axis in axes))]
    ]
    found = sweep(model, corrupted, cache, metric, activation, axes, reduce="none").values
    np.testing.assert_allclose(np.asarray(found).reshape(len(expected), -1), expected, atol=1e-5)
