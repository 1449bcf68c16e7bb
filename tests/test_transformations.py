"""jit, grad and vmap over the model, its hooks and its tokens equal the plain calls."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import close
from variants import TOKENS, build

import tljax
from tljax import Add, HookedTransformer, Replace, Scale, Zero

Z1 = "blocks.1.attn.hook_z"


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return build("gpt2")


def test_jit_over_model_and_tokens(model: HookedTransformer) -> None:
    hooked = model.add_hook(Z1, Scale(2.0, head=1))
    run = jax.jit(lambda m, t: m(t, return_type="both"))
    for one in (model, hooked):
        logits, loss = run(one, TOKENS)
        close(logits, one(TOKENS))
        close(loss, one(TOKENS, return_type="loss"))


def test_jit_over_a_cached_run(model: HookedTransformer) -> None:
    logits, cache = model.run_with_cache(TOKENS)
    jitted_logits, jitted = jax.jit(lambda m, t: m.run_with_cache(t))(model, TOKENS)
    close(jitted_logits, logits)
    assert list(jitted) == list(cache)
    for name in cache:
        close(jitted[name], cache[name])


def test_python_hooks_inside_jit_are_traced(model: HookedTransformer) -> None:
    calls = []

    def hook(x: Any, hook: tljax.HookPoint) -> Any:
        calls.append(isinstance(x, jax.core.Tracer))
        return x * 2

    run = jax.jit(lambda t: model.run_with_hooks(t, fwd_hooks=[(Z1, hook), (Z1, lambda x, hook: None)]))
    close(run(TOKENS), model.run_with_hooks(TOKENS, fwd_hooks=[(Z1, Scale(2.0))]))
    run(TOKENS)
    assert calls == [True]


def test_jit_over_a_model_with_python_hooks(model: HookedTransformer) -> None:
    hooked = model.add_hook(Z1, lambda x, hook: x * 2)
    close(jax.jit(lambda m: m(TOKENS))(hooked), hooked(TOKENS))


def test_grad_over_the_model(model: HookedTransformer) -> None:
    hooked = model.add_hook(Z1, Add(jnp.ones(8), head=1))
    value, gradient = jax.value_and_grad(lambda m: m(TOKENS, return_type="loss"))(hooked)
    close(value, hooked(TOKENS, return_type="loss"))
    assert jax.tree.structure(gradient) == jax.tree.structure(hooked)
    rng = np.random.default_rng(3)
    step = 1e-2
    for leaf_name in ("W_U", "W_pos"):
        part = {"W_U": "unembed", "W_pos": "pos_embed"}[leaf_name]
        direction = rng.standard_normal(model.params[part][leaf_name].shape).astype(np.float32)

        def loss(amount: float, part: str = part, leaf_name: str = leaf_name, direction: Any = direction) -> Any:
            moved = model.params[part][leaf_name] + np.float32(amount) * direction
            params = {**model.params, part: {**model.params[part], leaf_name: moved}}
            return hooked.replace(params=params)(TOKENS, return_type="loss")

        difference = (loss(step) - loss(-step)) / (2 * step)
        np.testing.assert_allclose(
            (gradient.params[part][leaf_name] * direction).sum(), difference, rtol=3e-2, atol=1e-3
        )


def test_vmap_over_tokens(model: HookedTransformer) -> None:
    close(jax.vmap(lambda t: model(t)[0])(jnp.asarray(TOKENS)), model(TOKENS))


def test_vmap_over_a_cached_run(model: HookedTransformer) -> None:
    names = ["resid_pre1", "pattern1"]
    _, cache = model.run_with_cache(TOKENS, names_filter=names)
    mapped = jax.vmap(lambda t: model.run_with_cache(t, names_filter=names)[1].remove_batch_dim())(jnp.asarray(TOKENS))
    assert isinstance(mapped, tljax.ActivationCache)
    for name in cache:
        close(mapped[name], cache[name])


def test_vmap_over_models(model: HookedTransformer) -> None:
    halved = model.replace(params=jax.tree.map(lambda x: x * 0.5, model.params))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), model, halved)
    both = jax.vmap(lambda m: m(TOKENS))(stacked)
    close(both[0], model(TOKENS))
    close(both[1], halved(TOKENS))


@pytest.mark.parametrize("jit", [False, True])
def test_vmap_over_interventions(model: HookedTransformer, jit: bool) -> None:
    values, positions, heads = jnp.arange(3.0), jnp.array([0, 3, -1]), jnp.array([1, 0, 3])
    stacked = jax.vmap(lambda v, p, h: Replace(v, pos=p, head=h))(values, positions, heads)
    run = jax.vmap(lambda i: model.run_with_hooks(TOKENS, fwd_hooks=[(Z1, i)]))
    together = (jax.jit(run) if jit else run)(stacked)
    for row, v, p, h in zip(together, values, positions, heads, strict=True):
        close(row, model.run_with_hooks(TOKENS, fwd_hooks=[(Z1, Replace(float(v), pos=int(p), head=int(h)))]))


def test_vmap_over_a_hooked_model(model: HookedTransformer) -> None:
    stacked = jax.vmap(lambda h: Zero(head=h))(jnp.arange(4))
    together = jax.vmap(lambda i: model.add_hook(Z1, i)(TOKENS, return_type="loss"))(stacked)
    for head in range(4):
        close(together[head], model.add_hook(Z1, Zero(head=head))(TOKENS, return_type="loss"))


def test_tree_map_keeps_the_model(model: HookedTransformer) -> None:
    hooked = model.add_hook(Z1, Scale(2.0)).add_perma_hook("z0", lambda x, hook: x)
    again = jax.tree.map(lambda x: x, hooked)
    assert again.cfg == hooked.cfg
    assert again.list_hooks().keys() == hooked.list_hooks().keys()
    close(again(TOKENS), hooked(TOKENS))
    doubled = jax.tree.map(lambda x: x * 2, hooked)
    assert doubled.list_hooks()[Z1][0].factor == 4


def test_shapes_without_running(model: HookedTransformer) -> None:
    logits, cache = jax.eval_shape(lambda t: model.run_with_cache(t), TOKENS)
    assert logits.shape == (2, 6, 13)
    assert {name: value.shape for name, value in cache.items()} == {
        point.name: point.shape(2, 6) for point in model.hook_points() if not point.optional
    }
