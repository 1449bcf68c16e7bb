"""Direct paths equal the fork they stand for: one head's new output added to what one other head reads."""

import inspect
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from variants import build

from tljax import HookedTransformer, Replace, Zero
from tljax.errors import InputError
from tljax.patching import (
    LogitDiff,
    get_act_patch_direct_path,
    get_act_patch_direct_path_all_sources,
    path_patch,
)

LAYERS = 3
CLEAN = jnp.asarray(np.random.default_rng(3).integers(0, 13, (2, 5)), jnp.int32)
CORRUPTED = CLEAN.at[:, 2].set(jnp.asarray([11, 7])).at[1, 1].set(3)


def metric(logits: Any) -> Any:
    return logits[0, -1, 1] - logits[1, 3, 4]


def by_hand(model: HookedTransformer, source: tuple[int, int], letter: str, receiver: tuple[int, int]) -> float:
    """The metric with one edge patched: a run with all else frozen, and what the receiver read of it."""
    (_, base), (_, clean) = model.run_with_cache(CORRUPTED), model.run_with_cache(CLEAN)
    layer, head = source
    forked = model
    for number in range(LAYERS):
        if number != layer:
            forked = forked.add_hook(f"blocks.{number}.hook_attn_out", Replace(base["attn_out", number]))
        if not model.cfg.attn_only:
            forked = forked.add_hook(f"blocks.{number}.hook_mlp_out", Replace(base["mlp_out", number]))
    name = f"blocks.{receiver[0]}.attn.hook_{letter}"
    _, fork = forked.add_hook(f"blocks.{layer}.attn.hook_z", Replace(clean["z", layer], head=head)).run_with_cache(
        CORRUPTED, names_filter=name
    )
    return metric(model.run_with_hooks(CORRUPTED, fwd_hooks=[(name, Replace(fork[name], head=receiver[1]))]))


@pytest.mark.parametrize(
    ("kind", "letter"),
    [
        ("gpt2", "q"),
        ("gpt2", "k"),
        ("gpt2", "v"),
        ("llama", "q"),
        ("llama", "v"),
        ("neox", "k"),
        ("multipliers", "k"),
        ("sandwich", "q"),
        ("post_norm_only", "q"),
        ("clipped", "v"),
        ("qk_after_rotary", "k"),
        ("latent_keys", "k"),
    ],
)
def test_direct_paths(kind: str, letter: Any) -> None:
    model = build(kind, n_layers=LAYERS)
    _, cache = model.run_with_cache(CLEAN)
    heads = 4 if letter == "q" else model.cfg.kv_heads
    every = get_act_patch_direct_path_all_sources(model, CORRUPTED, cache, cache, metric, letter, verbose=False)
    assert every.shape == (LAYERS, 4, LAYERS, heads)
    for layer in range(LAYERS):
        np.testing.assert_array_equal(every[layer, :, : layer + 1], 0)
    for source, receiver in (((0, 1), (1, 0)), ((0, 3), (2, 1)), ((1, 2), (2, heads - 1))):
        np.testing.assert_allclose(every[source][receiver], by_hand(model, source, letter, receiver), atol=1e-5)
    one = get_act_patch_direct_path(model, CORRUPTED, cache, None, metric, 1, -2, letter, verbose=False)
    assert one.shape == (LAYERS, heads)
    np.testing.assert_allclose(one, every[1, 2], atol=1e-5)


def test_a_direct_path_is_a_path_with_mlps_frozen(model: HookedTransformer) -> None:
    only_z = model.run_with_cache(CLEAN, names_filter="blocks.0.attn.hook_z")[1]
    direct = get_act_patch_direct_path(model, CORRUPTED, only_z, None, metric, 0, 3, "k", verbose=False)
    path = path_patch(model, CORRUPTED, CLEAN, metric, [("k", 2, 1)], freeze_mlps=True)
    np.testing.assert_allclose(direct[2, 1], path.values[0, 3], atol=1e-5)
    assert abs(float(direct[2, 1] - path.baseline)) > 1e-4


def test_the_last_layer_has_nothing_after_it(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(CLEAN)
    last = get_act_patch_direct_path(model, CORRUPTED, cache, cache, metric, 2, 0)
    np.testing.assert_array_equal(last, np.zeros((LAYERS, 4)))


def test_narrow_models() -> None:
    model, wide = (build("gpt2", n_layers=LAYERS, dtype=dtype) for dtype in ("bfloat16", "float32"))
    got, expected = (
        get_act_patch_direct_path_all_sources(one, CORRUPTED, one.run_with_cache(CLEAN)[1], None, metric, "q")
        for one in (model, wide)
    )
    np.testing.assert_allclose(got, expected, atol=0.1)


def unchecked(function: Any) -> Any:
    """A function without the type checks that only tests make."""
    return inspect.unwrap(function)


def test_mistakes(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(CLEAN)

    def run(*args: Any, tokens: Any = CORRUPTED, source: Any = cache, metric: Any = metric) -> None:
        get_act_patch_direct_path(model, tokens, source, None, metric, *args)

    with pytest.raises(InputError, match="src_layer=3 does not exist: there are 3, numbered 0 to 2"):
        run(3, 0)
    with pytest.raises(InputError, match="src_head=-5 does not exist: there are 4"):
        run(0, -5)
    with pytest.raises(InputError, match=r'component=.x. is not one of "q", "k" and "v"'):
        unchecked(get_act_patch_direct_path_all_sources)(model, CORRUPTED, cache, None, metric, "x")
    with pytest.raises(InputError, match="take one metric that returns one number"):
        run(1, 0, metric=LogitDiff(1, 3))
    with pytest.raises(InputError, match=r"does not hold blocks.1.attn.hook_z"):
        run(1, 0, source={"blocks.0.attn.hook_z": cache["z", 0]})
    with pytest.raises(InputError, match="must have equally many tokens"):
        run(1, 0, tokens=CORRUPTED[:, :4])
    with pytest.raises(InputError, match="carries hooks"):
        get_act_patch_direct_path_all_sources(
            model.add_hook("blocks.0.hook_resid_post", Zero()), CORRUPTED, cache, None, metric
        )
