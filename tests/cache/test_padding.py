"""Caches of padded runs: marks of padding, and each prompt as if it had run alone."""

import functools
from pathlib import Path
from typing import Any

import compare
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import build

from tljax import ActivationCache
from tljax.errors import CacheError

close = functools.partial(compare.close, atol=1e-5, rtol=1e-5)

RNG = np.random.default_rng(3)
ROWS = [RNG.integers(0, 13, n).tolist() for n in (3, 7, 1, 5)]
SIDES = ["left", "right"]


def padded(kind: str = "gpt2", side: Any = "left", **options: Any) -> ActivationCache:
    model = build(kind)
    return model.run_with_cache(model.to_batch(ROWS, padding_side=side), **options)[1]


def same(cache: ActivationCache, alone: ActivationCache) -> None:
    assert list(cache) == list(alone)
    for name, value in alone.items():
        assert cache[name].shape == value.shape, name
        close(cache[name], value)


@pytest.mark.parametrize(
    ("kind", "side", "every"),
    [
        ("gpt2", "left", True),
        ("local", "right", True),
        ("gpt2", "right", False),
        ("local", "left", False),
        ("llama", "left", False),
        ("neox", "right", False),
        ("bidirectional", "left", False),
        ("bidirectional", "right", False),
        ("alibi", "left", False),
        ("alibi_rounded", "left", False),
        ("alibi_rounded", "right", False),
    ],
)
def test_unpadded_prompts_equal_single_runs(kind: str, side: Any, every: bool) -> None:
    model = build(kind)
    names = [point.name for point in model.hook_points()] if every else None
    _, cache = model.run_with_cache(model.to_batch(ROWS, padding_side=side), names_filter=names)
    for index, row in enumerate(ROWS):
        one = cache.unpad(index)
        same(one, model.run_with_cache([row], names_filter=names)[1])
        assert one.token_mask is None
        assert one.model is model
    same(cache.unpad(-1), cache.unpad(3))


def test_masks_given_by_hand_mark_padding_too() -> None:
    model = build("llama")
    tokens = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]])
    mask = np.array([[0, 0, 1, 1, 1], [1, 0, 1, 1, 0]])
    _, cache = model.run_with_cache(tokens, attention_mask=mask)
    assert (np.asarray(cache.token_mask) == mask.astype(bool)).all()
    same(cache.unpad(0), model.run_with_cache(tokens[:1, 2:])[1])
    same(cache.unpad(1), model.run_with_cache(tokens[1:, [0, 2, 3]])[1])


def test_without_padding() -> None:
    model = build("gpt2")
    _, cache = model.run_with_cache([ROWS[0], ROWS[0]])
    assert cache.token_mask is None
    assert cache.key_mask is None
    same(cache.unpad(1), cache.apply_slice_to_batch_dim([1]))
    assert model.run_with_cache(model.to_batch([ROWS[0], ROWS[0]]))[1].token_mask is None


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kept", [(2, 6), slice(None, None, 2), [-1, 0]], ids=str)
def test_position_slices(side: Any, kept: Any) -> None:
    cache, whole = padded(side=side, pos_slice=kept), padded(side=side)
    index = slice(*kept) if isinstance(kept, tuple) else kept
    assert (cache.key_mask == whole.token_mask).all()
    for row in range(4):
        real = np.asarray(whole.token_mask[row])
        chosen = np.flatnonzero(real)[index]  # positions count in the text
        assert int(cache.token_mask[row].sum()) == len(chosen)
        one = cache.unpad(row)
        close(one["resid_post", 1], whole["resid_post", 1][row : row + 1, chosen])
        close(one["pattern", 1], np.asarray(whole["pattern", 1])[row : row + 1][:, :, chosen][..., real])


def test_marks_survive(tmp_path: Path) -> None:
    cache = padded()
    expected, mask = cache.unpad(0), np.asarray(cache.token_mask)
    cache.save(tmp_path / "cache.safetensors")
    loaded = ActivationCache.load(tmp_path / "cache.safetensors")
    jitted = jax.jit(lambda c: c)(cache)
    mapped = jax.tree.map(lambda x: x, cache)
    for other in (cache.to("cpu"), loaded, jitted, mapped, cache.with_model(cache.model)):
        assert (other.token_mask == mask).all()
        same(other.unpad(0), expected)
    sliced = cache.apply_slice_to_batch_dim([2, 0])
    assert (sliced.token_mask == mask[[2, 0]]).all()
    same(sliced.unpad(1), expected)
    single = cache.apply_slice_to_batch_dim(0)
    assert (single.token_mask == mask[0]).all()
    for other in (single, cache.apply_slice_to_batch_dim([0]).remove_batch_dim()):
        assert not other.unpad(0).has_batch_dim
        same(other.unpad(0), expected.remove_batch_dim())
    partial = padded(pos_slice=(2, 6))
    partial.save(tmp_path / "partial.safetensors")
    same(ActivationCache.load(tmp_path / "partial.safetensors").unpad(1), partial.unpad(1))


def test_traced_runs_mark_padding() -> None:
    model = build("gpt2")
    batch = model.to_batch(ROWS, padding_side="left")
    cache = jax.jit(lambda b: model.run_with_cache(b)[1])(batch)
    assert (cache.token_mask == batch.mask).all()
    same(cache.unpad(0), model.run_with_cache([ROWS[0]])[1])


def test_arithmetic_leaves_padding_marked() -> None:
    cache, other = padded(), padded("gpt2", "left")
    difference = jax.tree.map(jnp.subtract, cache, other)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, cache, other)
    gradient = jax.grad(lambda c: (c["z0"] ** 2).sum())(cache)
    for made in (difference, mean, jax.tree.map(lambda x: -2 * x, cache)):
        assert (made.token_mask == cache.token_mask).all()
    assert difference.unpad(0)["z0"].shape[1] == 3
    close(gradient["z0"], 2 * cache["z0"])


def test_gradients_are_cut_too() -> None:
    cache = padded(return_type="loss", incl_bwd=True, names_filter=["z0", "pattern1"])
    one = cache.unpad(0)
    assert one["blocks.0.attn.hook_z_grad"].shape == (1, 3, 4, 8)
    assert one["blocks.1.attn.hook_pattern_grad"].shape == (1, 4, 3, 3)


def test_mistakes() -> None:
    cache = padded()
    for prompt in (4, -5):
        with pytest.raises(CacheError, match=f"There is no prompt {prompt}: this cache has 4"):
            cache.unpad(prompt)
    with pytest.raises(CacheError, match="There is no prompt 1: this cache has 1"):
        cache.apply_slice_to_batch_dim(0).unpad(1)
    with pytest.raises(CacheError, match=r"call cache.unpad outside jax.jit"):
        jax.jit(lambda c: c.unpad(0))(cache)
    cut = ActivationCache({"hook_embed": cache["hook_embed"][:, 1:]}, cache.model, token_mask=cache.token_mask)
    with pytest.raises(CacheError, match=r"hook_embed has 6 positions, the padding marks of its cache 7"):
        cut.unpad(0)
    odd = ActivationCache({"mine": cache["hook_embed"]}, cache.model, token_mask=cache.token_mask)
    with pytest.raises(CacheError, match="mine is no hook point of this model"):
        odd.unpad(0)
