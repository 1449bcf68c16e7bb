"""The table is the only list of hook points: a row more, and the point is everywhere; its columns against real runs."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_listing import HookPointList
from variants import TOKENS, VARIANTS, build

from tljax import HookedTransformer, Replace, Scale, hook
from tljax.cache.memory import cache_bytes
from tljax.errors import AmbiguousHookError, UnknownHookError
from tljax.hooks import points
from tljax.hooks.names import resolve
from tljax.hooks.points import HookPointSpec, point_table
from tljax.modules.mlp import MLP
from tljax.patching import LogitDiff, ablation_sweep, sweep

NAMES = ["blocks.0.mlp.hook_dummy", "blocks.1.mlp.hook_dummy"]
OTHERS = (TOKENS + 1) % 13
METRIC = LogitDiff(1, 2)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> HookedTransformer:
    """A model whose MLPs have one point more: one line in the module and one row in the table."""
    call, rows = MLP.__call__, points._mlp_points

    def with_dummy(self: MLP, x: jax.Array) -> jax.Array:
        return hook(self, "hook_dummy", call(self, x))

    def and_dummy(cfg: object) -> Iterator[HookPointSpec]:
        *others, last = rows(cfg)
        yield from (*others, last)
        yield dataclasses.replace(
            last, name="mlp.hook_dummy", axes=("batch", "pos", "d_model"), meaning="a dummy", aliases=("dumb",)
        )

    monkeypatch.setattr(MLP, "__call__", with_dummy)
    monkeypatch.setattr(points, "_mlp_points", and_dummy)
    return build("gpt2", d_mlp=23)  # no other test has such a model: neither its table nor its programs are known yet


def test_a_row_more_is_a_point_everywhere(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(TOKENS)
    assert [name for name in cache if "dummy" in name] == NAMES
    assert cache["dummy", 1] is cache["dummy1"] is cache["mlp.hook_dummy", -1] is cache["dumb", 1] is cache[NAMES[1]]
    for layer, name in enumerate(NAMES):
        np.testing.assert_array_equal(cache[name], cache["mlp_out", layer])
        for spelling in (name, f"dummy{layer}", ("dummy", layer, "mlp"), lambda one, name=name: one == name):
            assert list(model.run_with_cache(TOKENS, names_filter=spelling)[1]) == [name]
    for change in (Scale(0.5), lambda activation, hook: activation / 2):
        np.testing.assert_allclose(
            model.run_with_hooks(TOKENS, fwd_hooks=[("dummy0", change)]),
            model.run_with_hooks(TOKENS, fwd_hooks=[("mlp_out0", Scale(0.5))]),
            atol=1e-5,
        )
    assert [point.name for point in model.hook_points() if "dummy" in point.name] == NAMES
    assert f"| `{NAMES[0]}` | [batch, pos, 16] | a dummy |" in HookPointList(model.hook_points()).to_markdown()
    _, gradients = model.run_with_cache(TOKENS, names_filter=NAMES, return_type="loss", incl_bwd=True)
    assert gradients["dummy0_grad"].shape == (2, 6, 16)
    hooked = model.add_hook("dummy0", Scale(0.5))
    assert hooked.generate(TOKENS[:1], max_new_tokens=1, stop_at_eos=False, verbose=False).shape == (1, 7)


def test_a_row_more_can_be_swept(model: HookedTransformer) -> None:
    _, clean = model.run_with_cache(OTHERS)
    got = sweep(model, TOKENS, clean, METRIC, "dummy", ("pos",))
    by_hand = [
        [
            METRIC(model.run_with_hooks(TOKENS, fwd_hooks=[(name, Replace(clean[name], pos=pos))])).mean()
            for pos in range(6)
        ]
        for name in NAMES
    ]
    np.testing.assert_allclose(got.values, by_hand, atol=1e-5)
    assert np.abs(got.values - got.baseline).max() > 1e-3
    for spelling in ("mlp.hook_dummy", "hook_dummy", "dumb"):
        np.testing.assert_array_equal(sweep(model, TOKENS, clean, METRIC, spelling, ("pos",)).values, got.values)
    one = sweep(model, TOKENS, clean, METRIC, ("dummy", -1), ("pos",))
    np.testing.assert_allclose(one.values, got.values[1:], atol=1e-6)
    assert one.activation_name == NAMES[1]
    zeroed = ablation_sweep(model, TOKENS, METRIC, "dummy", (), layers=[1])
    expected = METRIC(model.run_with_hooks(TOKENS, fwd_hooks=[("mlp_out1", Scale(0.0))])).mean()
    np.testing.assert_allclose(zeroed.values, [expected], atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["gpt2", "latent", "qk_norm", "moe", "chosen_first", "solu_ln"])
def test_dtypes_and_sizes_are_those_of_a_run(kind: str, dtype: jnp.dtype) -> None:
    changes = {"router": "chosen_softmax"} if kind == "chosen_first" else {}
    model = build("moe" if changes else kind, dtype=dtype, **changes)
    names = [name for name, row in point_table(model.cfg).items() if row.asks_for == "shared"]

    def run(tokens: jax.Array) -> dict[str, jax.Array]:
        return model.run_with_cache(tokens, names_filter=names, return_type=None)[1].cache_dict

    kept = jax.eval_shape(run, jnp.asarray(TOKENS))
    assert {name: value.dtype for name, value in kept.items()} == {
        name: point_table(model.cfg)[name].dtype for name in names
    }
    assert cache_bytes(model.cfg, tuple(names), *TOKENS.shape) == sum(v.size * v.dtype.itemsize for v in kept.values())


@pytest.mark.parametrize("kind", list(VARIANTS))
def test_a_name_within_its_block_finds_its_point(kind: str) -> None:
    table = point_table(build(kind).cfg)
    for name in table:
        if name.startswith("blocks."):
            _, layer, relative = name.split(".", 2)
            assert resolve((relative, int(layer)), table, 2) == name


def test_a_mixture_names_its_own_points() -> None:
    _, cache = build("moe").run_with_cache(TOKENS)
    assert cache["router_scores", 1] is cache["blocks.1.mlp.hook_router_scores"]
    assert cache["expert_weights", -1] is cache["expert_weights1"] is cache["blocks.1.mlp.hook_expert_weights"]
    assert cache["experts.hook_post", 1] is cache["blocks.1.mlp.experts.hook_post"]
    assert cache["post", 1, "shared"] is cache["blocks.1.mlp.shared.hook_post"]
    with pytest.raises(
        AmbiguousHookError, match=r"'mlp.experts.hook_post' or 'mlp.shared.hook_post'|'blocks.1.mlp.exp"
    ):
        cache["post", 1]
    with pytest.raises(
        AmbiguousHookError, match=r"'z' is a point of each of the layers \[0, 1\]: .* 'blocks.0.attn.hook_z'"
    ):
        cache["z"]
    assert "z" not in cache
    with pytest.raises(UnknownHookError, match="The model has 2 layers"):
        cache["router_scores", 2]
