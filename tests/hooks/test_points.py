"""Hook points: the listing, the point object, and the helper for other Flax modules."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import build

import tljax
from tljax import HookPoint, Scale, Zero, hook, run_module_with_hooks
from tljax.errors import HookError
from tljax.hooks.point import is_compiled


def test_layer_reads_both_ways() -> None:
    point = HookPoint("blocks.12.attn.hook_z")
    assert point.layer == 12
    assert point.layer() == 12
    assert ["a"] * (point.layer + 1) == ["a"] * 13
    assert HookPoint("hook_embed").layer is None
    assert HookPoint("attn.hook_z").layer is None


def test_what_is_compiled_in() -> None:
    assert all(map(is_compiled, (Zero(), Scale(2.0), jax.tree_util.Partial(lambda x, hook: x))))
    assert not any(map(is_compiled, (lambda x, hook: x, print, jnp.tanh, [].append, jax.jit(lambda x: x))))


def test_listing() -> None:
    points = build("gpt2").hook_points(batch=2, pos=6)
    lines = str(points).splitlines()
    assert lines[0].split() == ["name", "axes", "shape", "meaning"]
    assert len(lines) == len(points) + 1
    row = next(line for line in lines if line.startswith("blocks.1.attn.hook_pattern "))
    assert "batch head query_pos key_pos" in row
    assert "[2, 4, 6, 6]" in row
    assert "attention pattern" in row
    assert "(only when named)" in next(line for line in lines if "hook_result" in line)
    assert repr(points) == str(points)
    words = next(line for line in str(build("gpt2").hook_points()).splitlines() if "blocks.0.attn.hook_pattern" in line)
    assert "[batch, 4, query_pos, key_pos]" in words
    html = points._repr_html_()
    assert html.count("<tr>") == len(points) + 1


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return hook(self, "hook_out", nn.Dense(3)(hook(self, "hook_in", x)))


class Outer(nn.Module):
    def setup(self) -> None:
        self.first, self.second = Inner(), Inner()

    def __call__(self, x: jax.Array) -> jax.Array:
        return hook(self, "hook_end", self.second(self.first(x)))


@pytest.fixture(scope="module")
def variables() -> Any:
    return Outer().init(jax.random.key(0), jnp.ones((2, 3)))


def test_any_module_can_be_opened(variables: Any) -> None:
    assert set(variables) == {"params"}
    x = jnp.ones((2, 3))
    plain = Outer().apply(variables, x)
    names = ["first.hook_out", "second.hook_in", "hook_end"]
    output, captured = run_module_with_hooks(Outer(), variables, x, names=names)
    np.testing.assert_allclose(output, plain)
    assert list(captured) == names
    np.testing.assert_allclose(captured["first.hook_out"], captured["second.hook_in"])
    np.testing.assert_allclose(captured["hook_end"], plain)
    output, captured = run_module_with_hooks(
        Outer(),
        variables,
        x,
        fwd_hooks=[("hook_end", Scale(2.0)), ("hook_end", lambda x, hook: x + 1)],
        names=["hook_end"],
    )
    np.testing.assert_allclose(output, np.asarray(plain) * 2 + 1, rtol=1e-6)
    np.testing.assert_allclose(captured["hook_end"], output)


def test_axes_of_other_modules(variables: Any) -> None:
    x = jnp.ones((2, 3))
    plain = np.asarray(Outer().apply(variables, x))
    output, _ = run_module_with_hooks(
        Outer(), variables, x, fwd_hooks=[("hook_end", Zero(pos=1))], axes={"hook_end": ("batch", "pos")}
    )
    np.testing.assert_allclose(output, plain * [1, 0, 1])
    with pytest.raises(tljax.errors.InterventionError, match="no axis names here"):
        run_module_with_hooks(Outer(), variables, x, fwd_hooks=[("hook_end", Zero(pos=1))])


def test_opened_modules_jit_and_differentiate(variables: Any) -> None:
    x = jnp.ones((2, 3))

    def loss(intervention: tljax.Intervention) -> jax.Array:
        return run_module_with_hooks(Outer(), variables, x, fwd_hooks=[("hook_end", intervention)])[0].sum()

    gradient = jax.jit(jax.grad(loss))(tljax.Add(jnp.zeros((2, 3))))
    np.testing.assert_allclose(gradient.value, np.ones((2, 3)))


def test_points_that_never_fire(variables: Any) -> None:
    with pytest.raises(HookError, match=r"No hook point named \['first.hook_ouch'\] fired in Outer"):
        run_module_with_hooks(Outer(), variables, jnp.ones((2, 3)), names=["first.hook_ouch", "hook_end"])
