"""Hooks in a run: order, Python functions, backward hooks, errors, return types, gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import close
from variants import TOKENS, build

import tljax
from tljax import Add, HookedTransformer, Output, Replace, Scale, UnusedHooksWarning, Zero
from tljax.errors import HookError, InputError, InterventionError, UnknownHookError
from tljax.forward import stages

LAYERS = 3
Z1 = "blocks.1.attn.hook_z"


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return build("gpt2", n_layers=LAYERS)


@pytest.fixture
def stage_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the compiled stages that run, in order."""
    runs: list[str] = []
    real = stages._apply_compiled

    def counted(module: Any, *args: Any) -> Any:
        runs.append(type(module).__name__)
        return real(module, *args)

    monkeypatch.setattr(stages, "_apply_compiled", counted)
    return runs


# order


def test_hooks_first_then_the_cache(model: HookedTransformer) -> None:
    for hook in (Replace(3.0), lambda x, hook: jnp.full_like(x, 3.0)):
        _, cache = model.add_hook(Z1, hook).run_with_cache(TOKENS)
        assert (np.asarray(cache[Z1]) == 3).all()
        W_O, b_O = np.asarray(model.W_O[1]), np.asarray(model.b_O[1])
        close(cache["attn_out", 1], np.einsum("bphe,hed->bpd", cache[Z1], W_O) + b_O)


EDGES = ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_post", "hook_embed", "unembed.hook_out")
ORDERS = [(Z1, order) for order in ("cccc", "pppp", "cpcp", "pcpc", "ccpp", "ppcc")]
ORDERS += [(name, order) for name in EDGES for order in ("cpcp", "pcpc")]


@pytest.mark.parametrize(("name", "order"), ORDERS)
def test_several_hooks_at_a_point_run_in_order(model: HookedTransformer, name: str, order: str) -> None:
    """``c`` is an intervention (compiled), ``p`` a Python function."""
    steps = [
        (Scale(2.0), lambda x, hook: x * 2),
        (Add(1.0), lambda x, hook: x + 1),
        (Scale(3.0), lambda x, hook: x * 3),
        (Add(5.0), lambda x, hook: x + 5),
    ]
    hooks = [(name, step[kind == "p"]) for step, kind in zip(steps, order, strict=True)]
    _, base = model.run_with_cache(TOKENS, names_filter=name)
    logits, cache = model.with_hooks(hooks).run_with_cache(TOKENS, names_filter=name)
    close(cache[name], (np.asarray(base[name]) * 2 + 1) * 3 + 5, atol=1e-4)
    close(logits, model.run_with_hooks(TOKENS, fwd_hooks=[(name, Replace(cache[name]))]))


def test_prepend_runs_before(model: HookedTransformer) -> None:
    hooked = model.add_hook(Z1, Scale(2.0)).add_hook(Z1, Add(1.0), prepend=True)
    _, cache = hooked.run_with_cache(TOKENS, names_filter=Z1)
    close(cache[Z1], 2 * (np.asarray(model.run_with_cache(TOKENS, names_filter=Z1)[1][Z1]) + 1))


# Python functions


def test_python_hooks_are_called_once_each_in_firing_order(model: HookedTransformer) -> None:
    names = [point.name for point in model.hook_points() if not point.optional]
    calls: list[str] = []
    model.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: True, lambda x, hook: calls.append(hook.name))])
    assert calls == names
    calls.clear()

    def change(x: Any, hook: tljax.HookPoint) -> Any:
        calls.append(hook.name)
        return x * 1

    few = [n for n in names if n.startswith("blocks.1.")] + [
        "hook_embed",
        "ln_final.hook_normalized",
        "unembed.hook_out",
    ]
    logits = model.run_with_hooks(TOKENS, fwd_hooks=[(name, change) for name in reversed(few)])
    assert calls == [n for n in names if n in few]
    close(logits, model(TOKENS))


def test_python_hooks_get_concrete_arrays_and_the_point(model: HookedTransformer) -> None:
    seen: dict[str, Any] = {}

    def look(x: jax.Array, hook: tljax.HookPoint) -> None:
        assert not isinstance(x, jax.core.Tracer)
        seen["mean"] = float(x.mean())
        seen["point"] = (hook.name, hook.layer, hook.layer(), hook.axes)

    model.run_with_hooks(
        TOKENS, fwd_hooks=[(Z1, look), ("hook_embed", lambda x, hook: seen.setdefault("layer", hook.layer))]
    )
    _, cache = model.run_with_cache(TOKENS, names_filter=Z1)
    close(seen["mean"], cache[Z1].mean())
    assert seen["point"] == (Z1, 1, 1, ("batch", "pos", "head", "d_head"))
    assert seen["layer"] is None


def test_python_hooks_see_changes_made_upstream(model: HookedTransformer) -> None:
    seen: dict[str, Any] = {}
    v, resid = "blocks.1.attn.hook_v", "blocks.1.hook_resid_post"
    hooks = [
        (resid, lambda x, hook: seen.setdefault(resid, x)),
        (Z1, lambda x, hook: seen.setdefault(Z1, x) * 2),
        (v, lambda x, hook: x + 1),
    ]
    logits, cache = model.with_hooks(hooks).run_with_cache(TOKENS)
    interventions = [(v, Add(1.0)), (Z1, Scale(2.0))]
    expected_logits, expected = model.with_hooks(interventions).run_with_cache(TOKENS)
    close(logits, expected_logits)
    for name in expected:
        close(cache[name], expected[name])
    close(seen[Z1] * 2, expected[Z1])
    close(seen[resid], expected[resid])


def test_numpy_returns_and_upcasts_are_taken(model: HookedTransformer) -> None:
    expected = model.run_with_hooks(TOKENS, fwd_hooks=[(Z1, Scale(2.0))])
    close(model.run_with_hooks(TOKENS, fwd_hooks=[(Z1, lambda x, hook: np.asarray(x, np.float64) * 2)]), expected)


def test_reading_costs_no_second_run_and_writing_one(model: HookedTransformer, stage_runs: list[str]) -> None:
    plain = ["EmbeddingStage", *["TransformerBlock"] * LAYERS, "HeadStage"]
    model.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: "blocks.1" in name, lambda x, hook: None)])
    assert stage_runs == plain
    stage_runs.clear()
    model.run_with_hooks(TOKENS, fwd_hooks=[(Z1, lambda x, hook: x * 2)])
    assert len(stage_runs) == len(plain) + 1
    for name in ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_post", "unembed.hook_out"):
        stage_runs.clear()
        model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda x, hook: x * 2)])
        assert stage_runs == plain, name


def test_python_hook_intervention_and_transformerlens_style_agree(model: HookedTransformer) -> None:
    def ablate(value: Any, hook: Any) -> Any:
        value = value.at[:, :, 2, :].set(0.0)
        return value

    partial = jax.tree_util.Partial(lambda factor, x, hook: x * factor, jnp.ones((4, 1)).at[2].set(0)[None, None])
    results = [model.run_with_hooks(TOKENS, fwd_hooks=[(Z1, hook)]) for hook in (ablate, Zero(head=2), partial)]
    close(results[0], results[1])
    close(results[2], results[1])
    assert np.abs(np.asarray(results[1] - model(TOKENS))).max() > 1e-3


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_python_hooks_beside_split_inputs(kind: str) -> None:
    """With split inputs ln1 runs for q, k and v apart: a Python hook there must not mix them up."""
    model = build(kind)
    split = [("blocks.0.hook_q_input", Scale(-3.0, head=0))]
    expected = model.run_with_hooks(TOKENS, fwd_hooks=split)
    hooked = model.run_with_hooks(TOKENS, fwd_hooks=[*split, ("blocks.0.ln1.hook_normalized", lambda x, hook: x * 1)])
    close(hooked, expected)


def test_hooking_tokens(model: HookedTransformer) -> None:
    swapped = np.array(TOKENS)
    swapped[:, 2] = 5
    for hook in (Replace(5, pos=2), lambda x, hook: x.at[:, 2].set(5)):
        close(model.run_with_hooks(TOKENS, fwd_hooks=[("hook_tokens", hook)]), model(swapped))


# return types


def test_return_types(model: HookedTransformer) -> None:
    logits, loss = model(TOKENS), model(TOKENS, return_type="loss")
    both = model(TOKENS, return_type="both")
    assert isinstance(both, Output)
    close(both.logits, logits)
    log_probs = np.asarray(jax.nn.log_softmax(logits))[:, :-1]
    expected = -np.take_along_axis(log_probs, TOKENS[:, 1:, None], axis=-1)[..., 0]
    close(model(TOKENS, return_type="loss", loss_per_token=True), expected)
    close(loss, expected.mean())
    close(both.loss, loss)
    close(model.loss_fn(logits, TOKENS), loss)
    close(model.loss_fn(logits, TOKENS, per_token=True), expected)
    assert model(TOKENS, return_type=None) is None
    assert (
        tljax.lm_accuracy(logits, jnp.asarray(TOKENS))
        == (np.asarray(logits)[:, :-1].argmax(-1) == TOKENS[:, 1:]).mean()
    )


def test_no_output_runs_only_as_far_as_needed(model: HookedTransformer, stage_runs: list[str]) -> None:
    model(TOKENS, return_type=None)
    assert stage_runs == ["EmbeddingStage"]
    stage_runs.clear()
    _, cache = model.run_with_cache(TOKENS, return_type=None, names_filter=["resid_post0", "hook_embed"])
    assert stage_runs == ["EmbeddingStage", "TransformerBlock"]
    assert list(cache) == ["hook_embed", "blocks.0.hook_resid_post"]
    stage_runs.clear()
    seen = []
    model.run_with_hooks(TOKENS, return_type=None, fwd_hooks=[(Z1, lambda x, hook: seen.append(1))])
    assert stage_runs == ["EmbeddingStage", "TransformerBlock", "TransformerBlock"]
    assert seen == [1]
    stage_runs.clear()
    model.run_with_cache(TOKENS, return_type=None, names_filter="unembed.hook_in")
    assert stage_runs[-1] == "HeadStage"


# gradients


def loss_with(model: HookedTransformer, name: str) -> Any:
    return lambda hook: model.run_with_hooks(TOKENS, return_type="loss", fwd_hooks=[(name, hook)])


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_mid", "blocks.0.attn.hook_pattern"])
def test_gradient_of_add_is_a_finite_difference(model: HookedTransformer, name: str) -> None:
    shape = next(point.shape(2, 6) for point in model.hook_points() if point.name == name)
    direction = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    loss = loss_with(model, name)
    gradient = jax.grad(loss)(Add(jnp.zeros(shape))).value
    step = 1e-2
    difference = (loss(Add(step * direction)) - loss(Add(-step * direction))) / (2 * step)
    np.testing.assert_allclose((gradient * direction).sum(), difference, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_backward_cache_is_the_gradient_of_add(kind: str) -> None:
    model = build(kind)
    names = [
        "hook_embed",
        "blocks.0.attn.hook_v",
        "blocks.1.attn.hook_pattern",
        "blocks.1.mlp.hook_post",
        "unembed.hook_out",
    ]
    loss, cache = model.run_with_cache(TOKENS, return_type="loss", names_filter=names, incl_bwd=True)
    plain, forward = model.run_with_cache(TOKENS, return_type="loss", names_filter=names)
    close(loss, plain)
    assert list(cache) == [*names, *(name + "_grad" for name in reversed(names))]
    for name in names:
        close(cache[name], forward[name])
        assert cache[name + "_grad"].shape == cache[name].shape
    gradient = jax.grad(loss_with(model, names[1]))(Add(jnp.zeros(cache[names[1]].shape))).value
    close(cache["v_grad", 0], gradient, atol=1e-6)
    _, last = model.run_with_cache(TOKENS, return_type="loss", names_filter=names[1], incl_bwd=True, pos_slice=-1)
    close(last[names[1] + "_grad"], gradient[:, -1:], atol=1e-6)


def test_backward_cache_is_of_the_hooked_run(model: HookedTransformer) -> None:
    hooked = model.add_hook(Z1, Scale(0.5))
    _, cache = hooked.run_with_cache(TOKENS, return_type="loss", names_filter=["resid_pre1", Z1], incl_bwd=True)
    gradient = jax.grad(loss_with(hooked, Z1))(Add(jnp.zeros(cache[Z1].shape))).value
    close(cache[Z1 + "_grad"], gradient, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "flag"),
    [("gpt2", "use_attn_in"), ("llama", "use_split_qkv_input"), ("gpt2", "use_hook_tokens")],
)
def test_full_backward_cache_with_optional_points(kind: str, flag: str) -> None:
    model = build(kind)
    flagged = model.replace(cfg=model.cfg.replace(**{flag: True}))
    _, cache = flagged.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    _, plain = model.run_with_cache(TOKENS, return_type="loss", names_filter="resid_pre0", incl_bwd=True)
    close(cache["resid_pre_grad", 0], plain["resid_pre_grad", 0], atol=1e-6)


def embed_gradient(model: HookedTransformer, bwd_hooks: list, jit: bool = False) -> np.ndarray:
    def loss(offset: jax.Array) -> Any:
        hooks = [("hook_embed", Add(offset))]
        return model.run_with_hooks(TOKENS, return_type="loss", fwd_hooks=hooks, bwd_hooks=bwd_hooks)

    gradient = jax.grad(loss)
    return np.asarray((jax.jit(gradient) if jit else gradient)(jnp.zeros((2, 6, 16))))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_backward_hooks_change_the_gradient(model: HookedTransformer, jit: bool, scale: float) -> None:
    """Everything flows through resid_pre of block 1, so scaling the gradient there scales all of it upstream."""
    plain = embed_gradient(model, [])
    name = "blocks.1.hook_resid_pre"
    for hook in (Scale(scale), lambda gradient, hook: gradient * scale):
        close(embed_gradient(model, [(name, hook)], jit), scale * plain, atol=1e-6)


def test_backward_hooks_see_the_gradient(model: HookedTransformer) -> None:
    seen: list[Any] = []
    names = [Z1, "blocks.1.hook_resid_post"]
    plain = embed_gradient(model, [])
    hooked = embed_gradient(
        model, [(name, lambda gradient, hook: seen.append((hook.name, gradient))) for name in names]
    )
    close(hooked, plain, atol=1e-6)
    assert [name for name, _ in seen] == names[::-1]
    for name, gradient in seen:
        expected = jax.grad(loss_with(model, name))(Add(jnp.zeros(gradient.shape))).value
        close(gradient, expected, atol=1e-6)


def test_backward_hooks_leave_the_forward_pass_alone(model: HookedTransformer) -> None:
    for hook in (Zero(), lambda gradient, hook: gradient * 0):

        def run(offset: float, hook: Any = hook) -> Any:
            hooks: Any = [("hook_embed", Add(offset))]
            logits = model.run_with_hooks(TOKENS, fwd_hooks=hooks, bwd_hooks=[(Z1, hook)])
            return logits.sum(), logits

        close(jax.grad(run, has_aux=True)(0.0)[1], model(TOKENS))


def test_backward_hooks_that_nothing_calls(model: HookedTransformer) -> None:
    with pytest.raises(HookError, match=r"nothing differentiates this run.*jax.grad.*incl_bwd=True"):
        model.run_with_hooks(TOKENS, bwd_hooks=[(Z1, Zero())])
    with pytest.warns(UnusedHooksWarning, match=f"backward hook at {Z1} was not called"):
        model.add_hook(Z1, Zero(), dir="bwd")(TOKENS)


def test_gradients_through_a_closure(model: HookedTransformer) -> None:
    def loss(v: jax.Array) -> Any:
        return model.run_with_hooks(TOKENS, return_type="loss", fwd_hooks=[(Z1, lambda x, hook: x * v)])

    expected = jax.grad(lambda v: model.run_with_hooks(TOKENS, return_type="loss", fwd_hooks=[(Z1, Scale(v))]))(1.0)
    close(jax.grad(loss)(1.0), expected, atol=1e-6)
    close(jax.jit(jax.grad(loss))(1.0), expected, atol=1e-6)


# errors


def bad_hook(kind: str) -> Any:
    def assign(x: Any, hook: Any) -> Any:
        x[:, 3] = 0
        return x

    return {
        "shape": lambda x, hook: x[:, :2],
        "type": lambda x, hook: "oops",
        "dtype": lambda x, hook: x.astype(jnp.int32),
        "assign": assign,
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "shape",
            r"The hook at blocks.1.attn.hook_z returned shape \(2, 2, 4, 8\); the activation has shape \(2, 6, 4, 8\)",
        ),
        ("type", "The hook at blocks.1.attn.hook_z returned str"),
        ("dtype", "The hook at blocks.1.attn.hook_z returned dtype int32; the activation is float32"),
        ("assign", r"assigned into the activation.*act.at\[:, 3\].set\(0\).*Zero\(pos=3\)"),
    ],
)
@pytest.mark.parametrize("jit", [False, True])
def test_hooks_that_return_nonsense(model: HookedTransformer, kind: str, message: str, jit: bool) -> None:
    run = lambda tokens: model.run_with_hooks(tokens, fwd_hooks=[(Z1, bad_hook(kind))])  # noqa: E731
    with pytest.raises(HookError, match=message):
        (jax.jit(run) if jit else run)(TOKENS)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("latent", "blocks.1.attn.hook_q_latent"),
        ("latent", "blocks.1.attn.hook_kv_latent"),
        ("latent", "blocks.1.attn.kv_latent_norm.hook_normalized"),
        ("moe", "blocks.1.mlp.hook_shared_gate"),
        ("moe", "blocks.1.mlp.shared.hook_post"),
    ],
)
def test_plain_functions_at_points_of_rarer_parts(kind: str, name: str) -> None:
    model = build(kind)
    seen = []
    by_function = model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda act, hook: seen.append(act) or 0 * act)])
    assert not isinstance(seen[0], jax.core.Tracer)
    np.testing.assert_allclose(by_function, model.run_with_hooks(TOKENS, fwd_hooks=[(name, tljax.Zero())]), atol=1e-5)
    assert np.abs(by_function - model(TOKENS)).max() > 1e-4


def test_an_exception_in_a_hook_keeps_its_type_and_names_the_point(model: HookedTransformer) -> None:
    def fail(x: Any, hook: Any) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        model.run_with_hooks(TOKENS, fwd_hooks=[(Z1, fail)])
    assert any(Z1 in note for note in caught.value.__notes__)


def test_spellings_of_torch_name_the_jax_one(model: HookedTransformer) -> None:
    with pytest.raises(AttributeError) as caught:
        model.run_with_hooks(TOKENS, fwd_hooks=[(Z1, lambda act, hook: act.detach())])
    notes = " ".join(caught.value.__notes__)
    assert f"raised in the hook at {Z1}, on an activation of shape {(*TOKENS.shape, 4, 8)}" in notes
    assert "leave .detach() out" in notes


@pytest.mark.parametrize("use", ["return", "add"])
def test_leaked_tracers_are_explained(model: HookedTransformer, use: str) -> None:
    kept: list[Any] = []

    def function(x: Any, hook: Any) -> Any:
        kept.append(x)
        return kept[0] if use == "return" else x + kept[0]

    partial = jax.tree_util.Partial(function)
    model.run_with_hooks(TOKENS, fwd_hooks=[(Z1, partial)])
    mask = np.array([[0, 1, 1, 1, 1, 1], [1] * 6])  # another structure, so that the block is traced again
    with pytest.raises(HookError, match="leaked tracer"):
        model.run_with_hooks(TOKENS, attention_mask=mask, fwd_hooks=[(Z1, partial)])
    kept.clear()
    jax.jit(lambda t: model.run_with_hooks(t, fwd_hooks=[(Z1, function)]))(TOKENS)
    with pytest.raises(HookError, match="leaked tracer"):
        model.run_with_hooks(TOKENS, fwd_hooks=[(Z1, function)])


@pytest.mark.parametrize(
    ("hooks", "error", "message"),
    [
        (
            [("blocks.1.attn.hook_zz", Zero())],
            UnknownHookError,
            "'blocks.1.attn.hook_zz' is not a hook point.*'blocks.1.attn.hook_z'",
        ),
        ([("blocks.7.attn.hook_z", Zero())], UnknownHookError, "The model has 3 layers, numbered 0 to 2"),
        ([(("z", 7), Zero())], UnknownHookError, "The model has 3 layers"),
        ([("z7", Zero())], UnknownHookError, "The model has 3 layers"),
        ([("blocks.-4.attn.hook_z", Zero())], UnknownHookError, "The model has 3 layers"),
        ([("blocks.1.attn.W_Q", Zero())], UnknownHookError, "W_Q is a weight, not an activation: read model.W_Q"),
        ([(lambda name: "hook_zz" in name, Zero())], UnknownHookError, "The filter matches no hook point"),
        ([([], Zero())], UnknownHookError, "matches no hook point"),
        ([(None, Zero())], UnknownHookError, "hook"),
        ([(3, Zero())], UnknownHookError, "A hook name is a string"),
        ([Z1], HookError, r"Each hook is a \(name, callable\) pair, got str"),
        ([(Z1, np.zeros(3))], HookError, "not callable, got ndarray.*Replace"),
        ([(Z1, Zero, 3)], HookError, "pair, got tuple"),
        ([(Z1, Zero(neuron=3))], InterventionError, "cannot apply at blocks.1.attn.hook_z, which has axes"),
        ([(Z1, Zero(head=4))], InterventionError, "head=4 is out of range at blocks.1.attn.hook_z: the axis has 4"),
        ([(Z1, Zero(pos=6))], InterventionError, "pos=6 is out of range at blocks.1.attn.hook_z: the axis has 6"),
        ([(Z1, Replace(np.ones(3)))], InterventionError, "does not fit"),
    ],
)
def test_hook_mistakes(model: HookedTransformer, hooks: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        model.run_with_hooks(TOKENS, fwd_hooks=hooks)


def test_a_single_pair_instead_of_a_list(model: HookedTransformer) -> None:
    with pytest.raises(HookError, match="list of tuples"):
        model.run_with_hooks(TOKENS, fwd_hooks=(Z1, Zero()))  # type: ignore[arg-type]


def test_hooks_that_a_partial_run_never_reaches(model: HookedTransformer) -> None:
    with pytest.raises(InputError, match=r"blocks.1.attn.hook_z never fires: this run covers blocks 0 to 0 only"):
        model.run_with_hooks(TOKENS, stop_at_layer=1, fwd_hooks=[(Z1, Zero())])
    with pytest.raises(InputError, match="hook_embed never fires"):
        model.run_with_hooks(jnp.zeros((1, 2, 16)), start_at_layer=1, fwd_hooks=[("hook_embed", Zero())])
    with pytest.raises(InputError, match=r"unembed.hook_in never fires"):
        model.run_with_hooks(TOKENS, stop_at_layer=1, bwd_hooks=[("unembed.hook_in", Zero())])
    with pytest.raises(InputError, match="never fires"):
        model.run_with_cache(TOKENS, stop_at_layer=1, names_filter=["resid_post1"])
    with pytest.raises((InputError, UnknownHookError)):
        model.run_with_cache(TOKENS, stop_at_layer=1, names_filter=lambda name: "ln_final" in name)


def test_a_predicate_hooks_what_a_partial_run_reaches(model: HookedTransformer) -> None:
    seen = []
    hooks = [(lambda name: name.endswith("hook_z"), lambda x, hook: seen.append(hook.layer))]
    model.run_with_hooks(TOKENS, stop_at_layer=2, fwd_hooks=hooks)
    assert seen == [0, 1]


def test_hooks_do_not_outlive_a_call(model: HookedTransformer) -> None:
    for run in (model.run_with_hooks, model.run_with_cache):
        with pytest.raises(InputError, match=r"reset_hooks_end=False cannot work.*with_hooks"):
            run(TOKENS, reset_hooks_end=False)
    before = np.asarray(model(TOKENS))
    model.run_with_hooks(TOKENS, fwd_hooks=[(Z1, Zero())])
    np.testing.assert_array_equal(model(TOKENS), before)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_type": "both"},
        {"return_type": "loss", "loss_per_token": True},
        {"return_type": "loss", "stop_at_layer": 1},
    ],
)
def test_backward_caches_need_a_scalar(model: HookedTransformer, options: dict) -> None:
    with pytest.raises(InputError, match="incl_bwd=True differentiates a scalar"):
        model.run_with_cache(TOKENS, incl_bwd=True, **options)


def test_wrong_options(model: HookedTransformer) -> None:
    with pytest.raises(InputError, match="return_type='logit' is not one of"):
        model(TOKENS, return_type="logit")
    with pytest.raises(InputError, match=r"run_with_cache has no option 'name_filter'. Did you mean 'names_filter'"):
        model.run_with_cache(TOKENS, name_filter="hook_embed")
    with pytest.raises(InputError, match="pos_slice=9 is out of range for 6 positions"):
        model.run_with_cache(TOKENS, pos_slice=9)
    with pytest.raises(InputError, match="device='tpuu' is not one of"):
        model.run_with_cache(TOKENS, device="tpuu")
