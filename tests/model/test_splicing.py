"""Dictionaries spliced into a model: what it computes, against plain hooks that encode and decode by hand."""

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from spliced import MODEL, TRANSCODED, dictionary, everywhere, spliced
from variants import TOKENS

from tljax import ActivationCache, Add, HookedTransformer, Replace, Scale, Zero
from tljax.dictionaries import Dictionary, Tap
from tljax.errors import CacheError, DictionaryError
from tljax.model.splice_sites import UnfittedWarning

T = TOKENS[:, :6]
SITE = "blocks.2.hook_resid_pre"
ACTS = f"{SITE}.hook_sae_acts_post"
WRITTEN = [name if isinstance(name, str) else name[1] for name in everywhere()]
TOLERANCE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-5}


def by_hand(dictionaries: dict[Any, Dictionary], skip: bool = True) -> list[tuple[str, Any]]:
    """Plain hooks that put each dictionary's output in place of its point."""
    seen: dict[str, Any] = {}

    def replaced(one: Dictionary, at: str) -> Any:
        return lambda value, hook: one.forward(seen[at] if at in seen else value.reshape(*value.shape[:2], -1)).reshape(
            value.shape
        )

    hooks: list[tuple[str, Any]] = []
    for where, one in dictionaries.items():
        reads, writes = (where, where) if isinstance(where, str) else where
        if reads != writes:
            hooks.append((reads, lambda value, hook, reads=reads: seen.update({reads: value})))
        without_skip = one.replace(params={k: v for k, v in one.params.items() if k != "W_skip"})
        hooks.append((writes, replaced(one if skip else without_skip, reads)))
    return hooks


def test_error_term_keeps_the_model_as_it_is() -> None:
    model = spliced()
    logits, cache = model.run_with_cache(T)
    np.testing.assert_allclose(logits, MODEL(T), **TOLERANCE)
    for name in WRITTEN:
        np.testing.assert_allclose(cache[f"{name}.hook_sae_output"], cache[name], **TOLERANCE)
    recons = everywhere()["blocks.0.hook_resid_post"].forward(cache["resid_post", 0])
    np.testing.assert_allclose(
        cache["blocks.0.hook_resid_post.hook_sae_error"], cache["resid_post", 0] - recons, **TOLERANCE
    )


@pytest.mark.parametrize("skip", [True, False])
def test_without_error_term_the_output_is_the_reconstruction(skip: bool) -> None:
    want = MODEL.run_with_hooks(T, fwd_hooks=by_hand(everywhere(), skip))
    model = spliced(error="drop", skip=skip)
    np.testing.assert_allclose(model(T), want, **TOLERANCE)
    assert "blocks.0.hook_resid_post.hook_sae_error" not in {point.name for point in model.hook_points()}


def test_points_follow_the_point_written_and_keep_its_names() -> None:
    model = spliced()
    names = [point.name for point in model.hook_points()]
    first = names.index("blocks.1.hook_mlp_out") + 1
    ends = ["input", "acts_pre", "acts_post", "recons", "error", "output"]
    assert names[first : first + 6] == [f"blocks.1.hook_mlp_out.hook_sae_{end}" for end in ends]
    shapes = {point.name: point.shape(2, 6) for point in model.hook_points()}
    _, cache = model.run_with_cache(T)
    for name, value in cache.items():
        assert value.shape == shapes[name], name
    assert {point.axes for point in model.hook_points() if point.name.endswith("acts_post")} == {
        ("batch", "pos", "feature")
    }
    np.testing.assert_array_equal(
        cache["hook_mlp_out.hook_sae_acts_post", 1], cache[f"{TRANSCODED[1]}.hook_sae_acts_post"]
    )
    assert cache["resid_pre", 2].shape == (2, 6, 16)
    assert "dictionaries at" in repr(model)
    assert "blocks.1.hook_mlp_out" in repr(model)


def test_ablating_a_feature_takes_away_its_direction() -> None:
    model = MODEL.with_dictionaries({SITE: dictionary(seed=2)})
    _, clean = model.run_with_cache(T)
    feature, pos = np.argwhere(np.asarray(clean[ACTS][0]).T > 0.1)[-1]
    hooks = [(ACTS, Zero(batch=0, pos=int(pos), feature=int(feature)))]
    _, cache = model.with_hooks(hooks).run_with_cache(T)
    expected = np.zeros((2, 6, 16), np.float32)
    expected[0, pos] = -clean[ACTS][0, pos, feature] * model.dictionaries[SITE].W_dec[feature]
    output = f"{SITE}.hook_sae_output"
    np.testing.assert_allclose(cache[output] - clean[output], expected, atol=2e-6)
    np.testing.assert_array_equal(cache[f"{SITE}.hook_sae_error"], clean[f"{SITE}.hook_sae_error"])


def test_python_hooks_at_inner_points_do_what_interventions_do() -> None:
    model = spliced()
    compiled, plain = [], []
    seen = []
    for name in WRITTEN:
        compiled += [(f"{name}.hook_sae_acts_post", Scale(0.5, feature=1)), (name, Add(0.1))]
        plain += [
            (f"{name}.hook_sae_acts_post", lambda act, hook: act.at[..., 1].multiply(0.5)),
            (name, lambda act, hook: act + 0.1),
        ]
    plain.append(("blocks.2.hook_resid_post.hook_sae_output", lambda act, hook: seen.append(np.asarray(act))))
    logits, cache = model.with_hooks(compiled).run_with_cache(T)
    np.testing.assert_allclose(model.run_with_hooks(T, fwd_hooks=plain), logits, **TOLERANCE)
    np.testing.assert_allclose(seen[0], cache["blocks.2.hook_resid_post.hook_sae_output"], **TOLERANCE)


def test_ragged_prompts_equal_singles_and_excluded_tokens_keep_their_value() -> None:
    left_out = int(T[0, 1])
    model = spliced(error="drop", exclude_tokens=[left_out])
    prompts = [T[0], T[1, :4]]
    batch = MODEL.to_batch([list(map(int, prompt)) for prompt in prompts])
    _, cache = model.run_with_cache(batch)
    for row, prompt in enumerate(prompts):
        _, single = model.run_with_cache(prompt[None])
        there = np.asarray(batch.mask[row])
        for end in ("acts_post", "output"):
            name = f"blocks.0.hook_resid_post.hook_sae_{end}"
            np.testing.assert_allclose(cache[name][row][there], single[name][0], **TOLERANCE)
    plain, output = cache["resid_post", 0], cache["blocks.0.hook_resid_post.hook_sae_output"]
    kept = np.asarray((batch.tokens == left_out) & batch.mask)
    np.testing.assert_array_equal(np.asarray(plain)[kept], np.asarray(output)[kept])
    others = np.asarray(batch.mask) & ~kept
    assert (np.abs(np.asarray(plain) - np.asarray(output))[others].max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize("hooked", ["interventions", "python"])
def test_generation_equals_uncached_recomputation(hooked: str) -> None:
    model = spliced(error="drop", exclude_tokens=[int(T[0, 1])])
    hook: Any = Scale(3.0, feature=2) if hooked == "interventions" else lambda act, hook: act.at[..., 2].multiply(3.0)
    model = model.with_hooks([(ACTS, hook), ("blocks.2.hook_resid_post.hook_sae_acts_post", hook)])
    tokens = model.generate(T[:1], 4, do_sample=False, stop_at_eos=False, prepend_bos=False, verbose=False)
    text = jnp.asarray(T[:1])
    for _ in range(4):
        text = jnp.concatenate([text, model(text)[:, -1:].argmax(-1).astype(text.dtype)], axis=1)
    np.testing.assert_array_equal(tokens, text)


def test_one_head_alone() -> None:
    one = dictionary(8).replace(cfg=dictionary(8).cfg.replace(tap=Tap(reads="blocks.1.attn.hook_z", head=2)))
    model = MODEL.with_dictionaries([one], error="drop")

    def replaced(z: Any, hook: Any) -> Any:
        return z.at[:, :, 2].set(one.forward(z[:, :, 2]))

    want = MODEL.run_with_hooks(T, fwd_hooks=[("blocks.1.attn.hook_z", replaced)])
    np.testing.assert_allclose(model(T), want, **TOLERANCE)


def test_a_dictionary_keeps_its_dtype() -> None:
    narrow = spliced().to("bfloat16")
    _, cache = narrow.run_with_cache(T)
    dtypes = {name: str(value.dtype) for name, value in cache.items() if ".hook_resid_pre.hook_sae" in name}
    assert {end: dtypes[f"{SITE}.hook_sae_{end}"] for end in ("input", "acts_post", "error", "output")} == {
        "input": "float32", "acts_post": "float32", "error": "float32", "output": "bfloat16",
    }  # fmt: skip
    table = {point.name: str(point.dtype) for point in narrow.hook_points()}
    assert all(table[name] == dtype for name, dtype in dtypes.items())
    np.testing.assert_array_equal(cache[f"{SITE}.hook_sae_output"], cache[SITE])


def test_names_of_saelens() -> None:
    one = dictionary().replace(cfg=dictionary().cfg.replace(tap=Tap(reads=SITE)))
    dropped, kept = MODEL.with_dictionaries([one], error="drop"), MODEL.with_dictionaries(one)
    np.testing.assert_array_equal(MODEL.run_with_saes(T, saes=[one]), dropped(T))
    np.testing.assert_array_equal(MODEL.run_with_saes(T, saes=[one], use_error_term=True), kept(T))
    logits, cache = MODEL.run_with_cache_with_saes(T, saes=[one], names_filter=ACTS)
    assert [*cache] == [ACTS]
    hooks = [(ACTS, Zero(feature=1))]
    hooked = MODEL.run_with_hooks_with_saes(T, saes=[one], fwd_hooks=hooks)
    np.testing.assert_array_equal(hooked, dropped.run_with_hooks(T, fwd_hooks=hooks))
    with MODEL.saes([one]) as inside:
        np.testing.assert_array_equal(inside(T), logits)
    assert MODEL.add_sae(one).reset_saes().cfg is not None
    assert not MODEL.add_sae(one).reset_saes().dictionaries


def test_dictionaries_come_back_as_they_went_in() -> None:
    model = spliced(gradient="pass")
    assert [*model.dictionaries] == sorted(model.dictionaries, key=[p.name for p in model.hook_points()].index)
    for where, one in everywhere().items():
        back = model.dictionaries[where if isinstance(where, str) else where[1]]
        assert back.cfg.architecture == one.cfg.architecture
        assert back.cfg.tap.reads is not None
        np.testing.assert_array_equal(back.W_dec, one.W_dec)
    fewer = model.without_dictionaries(["hook_embed", ("resid_pre", 2)])
    assert len(fewer.dictionaries) == len(model.dictionaries) - 2
    plain = model.without_dictionaries()
    assert plain.cfg == MODEL.cfg
    assert plain.cfg.computation == MODEL.cfg.computation
    np.testing.assert_array_equal(plain(T), MODEL(T))
    assert jax.tree.structure(plain.params) == jax.tree.structure(MODEL.params)


def test_a_cache_knows_what_was_spliced_in(tmp_path: Path) -> None:
    model = MODEL.with_dictionaries({SITE: dictionary()})
    _, cache = model.run_with_cache(T, names_filter=[ACTS, SITE])
    with pytest.raises(CacheError, match="splices="):
        cache.check_model(MODEL)
    cache.save(tmp_path / "cache")
    read = ActivationCache.load(tmp_path / "cache")
    read.check_model(model)
    with pytest.raises(CacheError, match="splices="):
        read.check_model(MODEL)
    with pytest.raises(CacheError, match="other numbers"):
        read.check_model(MODEL.with_dictionaries({SITE: dictionary(seed=5)}))
    with pytest.raises(CacheError, match="splices="):
        read.check_model(MODEL.with_dictionaries({SITE: dictionary()}, error="drop"))


def test_grouped_heads_are_ungrouped_under_a_dictionary() -> None:
    from variants import build

    grouped = build("llama")
    model = grouped.with_dictionaries({"blocks.0.attn.hook_z": dictionary(32)}, error="drop")
    np.testing.assert_allclose(model.set_ungroup_grouped_query_attention(True)(T), model(T), **TOLERANCE)
    with pytest.raises(DictionaryError, match="grouped key/value heads"):
        grouped.with_dictionaries({"blocks.0.attn.hook_v": dictionary(16)}).set_ungroup_grouped_query_attention(True)


def test_other_processing_is_said() -> None:
    raw = dictionary().cfg.replace(tap=Tap(reads=SITE, processing=("fold_ln", "center_writing_weights")))
    with pytest.warns(UnfittedWarning, match="fit_to"):
        MODEL.with_dictionaries(dictionary().replace(cfg=raw))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MODEL.with_dictionaries(dictionary().replace(cfg=raw.replace(tap=Tap(reads=SITE, processing=()))))


def test_a_sharding_moves_the_dictionaries_along() -> None:
    model = spliced()
    moved = model.to("cpu:0")
    assert {d.platform for leaf in jax.tree.leaves(moved.params) for d in leaf.devices()} == {"cpu"}
    assert isinstance(moved, HookedTransformer)
    assert [*moved.dictionaries] == [*model.dictionaries]
    replaced = model.run_with_hooks(T, fwd_hooks=[(ACTS, Replace(np.zeros((2, 6, 9), np.float32)))])
    assert np.isfinite(np.asarray(replaced)).all()
