"""The activation cache: a mapping, a pytree, slices, stacks, the logit lens, files, warnings."""

import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import close
from variants import TOKENS, build

import tljax
from tljax import ActivationCache, HookedTransformer, LargeCacheWarning
from tljax.cache import memory
from tljax.errors import CacheError, InputError, UnknownHookError


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return build("gpt2")


@pytest.fixture(scope="module")
def cache(model: HookedTransformer) -> ActivationCache:
    return model.run_with_cache(TOKENS)[1]


# a mapping


def test_mapping(model: HookedTransformer, cache: ActivationCache) -> None:
    assert list(cache) == list(cache.keys()) == [p.name for p in model.hook_points() if not p.optional]
    assert len(cache) == len(list(cache.values())) == len(dict(cache.items()))
    assert cache["resid_post", 1] is cache["blocks.1.hook_resid_post"]
    assert cache["pattern", -1] is cache["blocks.1.attn.hook_pattern"]
    assert cache["pattern", np.int64(1)] is cache["blocks.1.attn.hook_pattern"]
    assert cache["q0"] is cache["blocks.0.attn.hook_q"]
    assert cache["scale4ln1".replace("4", "1")] is cache["scale", 1, "ln1"] is cache["blocks.1.ln1.hook_scale"]
    assert cache["normalized"] is cache["ln_final.hook_normalized"]
    assert cache["embed"] is cache["hook_embed"]
    assert cache["blocks.1.attn.hook_out"] is cache["attn_out", 1]
    assert cache.get("nothing") is None
    assert ("z", 1) in cache
    assert "q7" not in cache
    assert 5 not in cache
    assert (1, 2) not in cache
    assert repr(cache).startswith("ActivationCache with keys ['hook_embed'")
    assert cache.nbytes == sum(value.nbytes for value in cache.values())
    assert cache.model is model


def test_mutating_what_was_passed_in_changes_nothing(model: HookedTransformer) -> None:
    given = {"hook_embed": jnp.ones((1, 2, 16))}
    cache = ActivationCache(given, model)
    given.clear()
    assert list(cache) == ["hook_embed"]
    with pytest.raises(TypeError):
        cache["hook_embed"] = 3  # type: ignore[index]


def test_misses(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(TOKENS, names_filter=["z0", "hook_embed"])
    for key, message in [
        (
            "blocks.0.attn.hook_v",
            r"'blocks.0.attn.hook_v' was not kept in this cache \(2 activations\): include it in names_filter",
        ),
        (("z", 1), "'blocks.1.attn.hook_z' was not kept"),
        ("blocks.0.attn.hook_z_grad", "was not kept.*run with incl_bwd=True"),
        (("z_grad", 0), "run with incl_bwd=True"),
        ("blocks.0.attn.hook_zz", "is not a hook point of this model. Did you mean 'blocks.0.attn.hook_z'"),
        (("z", 9), "2 layers"),
    ]:
        with pytest.raises(UnknownHookError, match=message):
            cache[key]
    with pytest.raises(KeyError):
        cache["nothing"]
    with pytest.raises(CacheError, match="needs the model"):
        ActivationCache({})


# a pytree


def test_pytree(cache: ActivationCache) -> None:
    doubled = jax.tree.map(lambda x: 2 * x, cache)
    assert isinstance(doubled, ActivationCache)
    assert list(doubled) == list(cache)
    close(doubled["z0"], 2 * cache["z0"])
    assert doubled.has_batch_dim
    with pytest.raises(CacheError, match=r"no longer knows its model.*cache.with_model\(model\)"):
        doubled.model  # noqa: B018
    assert doubled.with_model(cache.model).model is cache.model
    path, _ = jax.tree_util.tree_flatten_with_path(cache)[0][0]
    assert jax.tree_util.keystr(path) == "['hook_embed']"
    mean = jax.jit(lambda c: c["resid_post", -1].mean())(cache)
    close(mean, cache["resid_post", 1].mean())
    gradient = jax.grad(lambda c: (c["z0"] ** 2).sum())(cache)
    close(gradient["z0"], 2 * cache["z0"])
    assert list(copy.deepcopy(cache)) == list(cache)


def test_differences_of_caches(model: HookedTransformer, cache: ActivationCache) -> None:
    _, other = model.run_with_cache(TOKENS[::-1])
    difference = jax.tree.map(jnp.subtract, cache, other)
    close(difference["z1"], cache["z1"] - other["z1"])


# slices


def test_batch_dim(model: HookedTransformer, cache: ActivationCache) -> None:
    _, single = model.run_with_cache(TOKENS[:1], remove_batch_dim=True)
    assert not single.has_batch_dim
    for name, value in single.items():
        close(value, cache[name][0])
    assert single.remove_batch_dim() is single
    with pytest.raises(CacheError, match=r"batch size \[2\].*apply_slice_to_batch_dim\(0\)"):
        cache.remove_batch_dim()
    with pytest.raises(CacheError, match="no batch axis left"):
        single.apply_slice_to_batch_dim(0)
    _, plain = model.run_with_cache(TOKENS[:1], remove_batch_dim=True, return_cache_object=False)
    assert type(plain) is dict
    assert plain["hook_embed"].shape == (6, 16)
    assert type(model.run_with_cache(TOKENS, return_cache_object=False)[1]) is dict


@pytest.mark.parametrize("chosen", [0, -1, [1, 0], (0, 1), slice(1, None), np.array([1]), (None, None, 2)])
def test_slice_of_the_batch(cache: ActivationCache, chosen: Any) -> None:
    sliced = cache.apply_slice_to_batch_dim(chosen)
    index = slice(*chosen) if isinstance(chosen, tuple) else chosen
    for name in ("hook_embed", "blocks.1.attn.hook_pattern"):
        close(sliced[name], np.asarray(cache[name])[index])
    assert sliced.has_batch_dim == (not isinstance(chosen, int))


@pytest.mark.parametrize("pos", [3, -1, [1, 4], (1, 4), slice(None, None, 2), np.array([5, 0]), None])
def test_position_slices(model: HookedTransformer, cache: ActivationCache, pos: Any) -> None:
    _, sliced = model.run_with_cache(TOKENS, pos_slice=pos)
    index = (
        slice(None)
        if pos is None
        else slice(*pos)
        if isinstance(pos, tuple)
        else np.atleast_1d(pos)
        if not isinstance(pos, slice)
        else pos
    )
    for name in cache:
        axis = 2 if "pattern" in name or "scores" in name else 1
        expected = np.asarray(cache[name])[(slice(None),) * axis + (index,)]
        assert sliced[name].shape == expected.shape, name
        close(sliced[name], expected)


def test_out_of_range_slices_are_refused(model: HookedTransformer, cache: ActivationCache) -> None:
    with pytest.raises((CacheError, IndexError)):
        cache.apply_slice_to_batch_dim(2)
    with pytest.raises((CacheError, IndexError)):
        cache.accumulated_resid(pos_slice=6)
    with pytest.raises(InputError, match="pos_slice=-7 is out of range"):
        model.run_with_cache(TOKENS, pos_slice=-7)


def test_moving(model: HookedTransformer, cache: ActivationCache) -> None:
    cpu = jax.devices("cpu")[0]
    _, moved = model.run_with_cache(TOKENS, device="cpu")
    for other in (cache.to("cpu"), cache.to(cpu), moved):
        assert all(value.devices() == {cpu} for value in other.values())
        close(other["z1"], cache["z1"])


# the residual stream


def test_stack_activation(cache: ActivationCache) -> None:
    assert cache.stack_activation("resid_post").shape == (2, 2, 6, 16)
    close(cache.stack_activation("z")[1], cache["z", 1])
    assert cache.stack_activation("z", layer=1).shape[0] == 1
    close(cache.stack_activation("scale", sublayer_type="ln2")[1], cache["scale", 1, "ln2"])
    with pytest.raises(UnknownHookError):
        cache.stack_activation("zz")
    with pytest.raises(CacheError):
        cache.stack_activation("z", layer=0)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, ["0_pre", "1_pre", "final_post"]),
        ({"layer": -1}, ["0_pre", "1_pre", "final_post"]),
        ({"layer": 2}, ["0_pre", "1_pre", "final_post"]),
        ({"incl_mid": True}, ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]),
        ({"layer": 1}, ["0_pre", "1_pre"]),
        ({"layer": 0}, ["0_pre"]),
        ({"layer": 1, "incl_mid": True}, ["0_pre", "0_mid", "1_pre"]),
        ({"layer": 1, "incl_mid": True, "mlp_input": True}, ["0_pre", "0_mid", "1_pre", "1_mid"]),
        ({"layer": 0, "mlp_input": True}, ["0_pre", "0_mid"]),
    ],
    ids=str,
)
def test_accumulated_resid_rows(cache: ActivationCache, options: dict, rows: list[str]) -> None:
    stack, labels = cache.accumulated_resid(**options, return_labels=True)
    assert labels == rows
    for row, label in zip(stack, labels, strict=True):
        layer, _, kind = label.partition("_")
        close(row, cache["resid_post", -1] if layer == "final" else cache[f"resid_{kind}", int(layer)])


@pytest.mark.parametrize("kind", ["neox", "attn_only"])
def test_accumulated_resid_without_mid(kind: str) -> None:
    _, cache = build(kind).run_with_cache(TOKENS)
    assert cache.accumulated_resid(incl_mid=True, return_labels=True)[1] == ["0_pre", "1_pre", "final_post"]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "final_rms", "no_norm"])
def test_logit_lens_ends_in_the_logits(kind: str) -> None:
    model = build(kind)
    _, cache = model.run_with_cache(TOKENS)
    logits = cache["unembed.hook_out"]
    lens = np.asarray(cache.accumulated_resid(apply_ln=True)) @ np.asarray(model.W_U) + np.asarray(model.b_U)
    assert lens.shape == (3, *logits.shape)
    close(lens[-1], logits)
    early = np.asarray(model.unembed(model.ln_final(cache["resid_pre", 1])))
    close(lens[1], early)
    close(
        cache.accumulated_resid(apply_ln=True, pos_slice=-1),
        np.asarray(cache.accumulated_resid(apply_ln=True))[:, :, -1],
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("mlp_input", [False, True])
def test_inner_norms_use_the_cached_scale(kind: str, mlp_input: bool) -> None:
    model = build(kind)
    _, cache = model.run_with_cache(TOKENS)
    options = {"layer": 1, "mlp_input": mlp_input}
    stack = np.asarray(cache.accumulated_resid(**options))
    norm = "ln2" if mlp_input else "ln1"
    if kind == "gpt2":
        stack = stack - stack.mean(-1, keepdims=True)
    expected = stack / np.asarray(cache["scale", 1, norm])
    close(cache.accumulated_resid(**options, apply_ln=True), expected)
    close(expected[-1], cache["normalized", 1, norm])
    close(cache.accumulated_resid(**options, apply_ln=True, pos_slice=(1, 3)), expected[:, :, 1:3])
    close(cache.accumulated_resid(**options, apply_ln=True, pos_slice=2), expected[:, :, 2])
    single = cache.apply_slice_to_batch_dim(0)
    close(single.accumulated_resid(**options, apply_ln=True), expected[:, 0])


def test_inner_norms_with_split_inputs(model: HookedTransformer, cache: ActivationCache) -> None:
    _, split = model.set_use_split_qkv_input(True).run_with_cache(TOKENS)
    close(split.accumulated_resid(layer=1, apply_ln=True), cache.accumulated_resid(layer=1, apply_ln=True))


def test_apply_ln_to_stack_is_linear_for_the_final_norm(model: HookedTransformer, cache: ActivationCache) -> None:
    pieces = jnp.stack([cache["resid_pre", 1], cache["attn_out", 1], cache["mlp_out", 1]])
    close(cache.apply_ln_to_stack(pieces).sum(0), cache["ln_final.hook_normalized"])
    close(cache.apply_ln_to_stack(pieces[:, 0], batch_slice=0).sum(0), cache["ln_final.hook_normalized"][0])


def test_accumulated_resid_mistakes(model: HookedTransformer, cache: ActivationCache) -> None:
    with pytest.raises(CacheError, match="layer=3 is out of range: the model has 2 layers"):
        cache.accumulated_resid(layer=3)
    _, partial = model.run_with_cache(TOKENS, names_filter=lambda name: "resid" in name)
    with pytest.raises(UnknownHookError, match=r"needs 'blocks.1.ln1.hook_scale', not kept in this cache"):
        partial.accumulated_resid(layer=1, apply_ln=True)
    doubled = jax.tree.map(lambda x: 2 * x, cache)
    with pytest.raises(CacheError, match="with_model"):
        doubled.accumulated_resid(apply_ln=True)


@pytest.mark.parametrize("layer", [None, 1])
def test_norms_of_the_residual_stream_itself_apply_to_no_part_of_it(layer: int | None) -> None:
    _, cache = build("residual_norm").run_with_cache(TOKENS)
    close(cache.accumulated_resid(layer=layer)[1], cache["resid_pre", 1])
    with pytest.raises(InputError, match="no norm to apply to a part of the stream"):
        cache.accumulated_resid(layer=layer, apply_ln=True)


# files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_files_are_bit_equal(tmp_path: Path, dtype: str, model: HookedTransformer) -> None:
    made = model.run_with_cache(TOKENS, names_filter=["hook_tokens", "z1", "hook_embed", "scale"])[1]
    cache = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, made).with_model(model)
    path = tmp_path / "deep" / "cache.safetensors"
    cache.save(path)
    again = ActivationCache.load(path, model)
    assert list(again) == list(cache)
    for name in cache:
        assert again[name].dtype == cache[name].dtype
        assert (again[name] == cache[name]).all()
    assert again.cfg == cache.cfg
    assert again.model is model
    with pytest.raises(CacheError, match="with_model"):
        ActivationCache.load(path).model  # noqa: B018


def test_files_remember_the_batch_axis(tmp_path: Path, model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(TOKENS[:1], names_filter="z1", remove_batch_dim=True)
    cache.save(tmp_path / "cache.safetensors")
    assert not ActivationCache.load(str(tmp_path / "cache.safetensors")).has_batch_dim


def test_damaged_files(tmp_path: Path, model: HookedTransformer, cache: ActivationCache) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "cache.safetensors"
    with pytest.raises(CacheError, match="There is no file"):
        ActivationCache.load(path)
    cache.save(path)
    whole = path.read_bytes()
    for broken in (whole[:-10], whole[:20], b"", b"\xff" * 100):
        path.write_bytes(broken)
        with pytest.raises(CacheError, match="damaged or incomplete"):
            ActivationCache.load(path)
    save_file({"x": np.zeros(2, np.float32)}, path)
    with pytest.raises(CacheError, match=r"does not hold a cache that ActivationCache.save wrote"):
        ActivationCache.load(path)
    cache.save(path)
    with pytest.raises(CacheError, match="made by a model with 2 layers of width 16"):
        ActivationCache.load(path, build("gpt2", n_layers=3))


# memory


def test_large_caches_warn_before_they_are_made(
    model: HookedTransformer, cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * cache.nbytes - 4)
    with pytest.warns(
        LargeCacheWarning, match=rf"{len(cache)} activations will take .* names_filter=lambda name"
    ) as caught:
        model.run_with_cache(TOKENS)
    assert caught[0].filename == __file__
    model.run_with_cache(TOKENS, names_filter="z0")
    model.run_with_cache(TOKENS, pos_slice=-1)
    model(TOKENS)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * cache.nbytes)
    model.run_with_cache(TOKENS)
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    model.run_with_cache(TOKENS)


def test_estimate_is_exact(model: HookedTransformer, cache: ActivationCache) -> None:
    assert memory.cache_bytes(model.cfg, tuple(cache), 2, 6) == cache.nbytes
    assert memory.free_bytes(jax.devices("cpu")[0]) > 0  # type: ignore[operator]


def test_estimate_knows_norms_are_float32_in_half_precision() -> None:
    model = build("gpt2").to("bfloat16")
    shapes = jax.eval_shape(lambda t: model.run_with_cache(t, return_cache_object=False)[1], TOKENS)
    size = sum(x.size * x.dtype.itemsize for x in shapes.values())
    assert memory.cache_bytes(model.cfg, tuple(shapes), 2, 6) == size


def test_backward_caches_keep_both(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True, names_filter=["z0", "resid_post1"])
    assert cache["z_grad", 0].shape == cache["z", 0].shape
    assert "blocks.0.attn.hook_z_grad" in cache
    assert isinstance(cache, tljax.ActivationCache)
