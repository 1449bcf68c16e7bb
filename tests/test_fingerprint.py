"""What tells models apart: other numbers and other functions do; dtype, placement, names and transformations do not."""

import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import build

from tljax import ActivationCache, HookedTransformer, fingerprint
from tljax.errors import CacheError
from tljax.fingerprint import Fingerprint, fingerprint_of, sample_of

TOKENS = np.array([[1, 2, 3, 4]])


def other(model: HookedTransformer) -> HookedTransformer:
    """Other numbers in the same places."""
    return model.replace(params=jax.tree.map(lambda leaf: leaf + 0.01, model.params))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_makes_no_other_model(dtype: str, model: HookedTransformer) -> None:
    one, two = fingerprint_of(model), fingerprint_of(model.to(dtype))
    assert not one.differences(two)
    assert not two.differences(one)
    assert two.differences(fingerprint_of(other(model)))


def test_what_does_not_change_the_function(model: HookedTransformer) -> None:
    named = model.cfg.replace(model_name="x", seed=5, use_attn_result=True, default_prepend_bos=False)
    assert not fingerprint_of(model).differences(fingerprint_of(model.replace(cfg=named)))


def test_processing_in_another_order_of_rounding(model: HookedTransformer) -> None:
    noisy = jax.tree.map(lambda leaf: leaf * jnp.float32(1 + 3e-7), model.params)
    assert not fingerprint_of(model).differences(fingerprint_of(model.replace(params=noisy)))
    found = fingerprint_of(model).differences(fingerprint_of(model.process_weights()))
    assert found[0] == "fold_ln applied here, not there"


@pytest.mark.parametrize("path", ["W_V", "b_V"])
def test_a_step_of_fine_tuning_in_one_matrix(path: str, model: HookedTransformer) -> None:
    params = jax.tree.map(lambda leaf: leaf, model.params)
    params["blocks"][1]["attn"][path] += 1e-4
    tuned = fingerprint_of(model.replace(params=params))
    assert fingerprint_of(model).differences(tuned) == ("the weights are other numbers",)
    assert not fingerprint_of(model).differences_of_stream(tuned)


def test_unrelated_weights_are_no_kin() -> None:
    one, two = (fingerprint_of(HookedTransformer(build("gpt2").cfg.replace(seed=seed))) for seed in (1, 2))
    assert one.differences_of_stream(two) == ("the weights have nothing in common",)


def test_a_fingerprint_survives_json(model: HookedTransformer) -> None:
    found = fingerprint_of(model)
    assert Fingerprint.from_dict(found.to_dict()) == found
    with pytest.raises(ValueError, match="incomplete"):
        Fingerprint.from_dict({**found.to_dict(), "weights": {"values": "AAAA", "rounding": 0.1}})


def test_a_sample_is_taken_once_and_keeps_nothing_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    model = other(build("gpt2"))
    sample = sample_of(model.params)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "_some", lambda leaf: pytest.fail("read again"))
        assert sample_of(model.params) is sample
        assert sample_of(model.add_hook("blocks.0.hook_attn_out", lambda act, hook: None).params) is sample
    references = fingerprint._kept[tuple(map(id, jax.tree.leaves(model.params | {"pos_embed": {}})))][0]
    del model
    gc.collect()
    assert all(reference() is None for reference in references)


def test_numpy_parameters_can_change_in_place(model: HookedTransformer) -> None:
    params = jax.tree.map(np.array, model.params)
    before = sample_of(params)
    params["embed"]["W_E"] += 1
    assert sample_of(params) != before


def test_placement_makes_no_other_model(model: HookedTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    here = sample_of(model.params)
    monkeypatch.setattr(fingerprint, "_is_here", lambda leaf: False)
    assert sample_of(jax.tree.map(jnp.array, model.params)) == here


def test_traced_weights_are_not_known(model: HookedTransformer) -> None:
    found: list[Any] = []

    @jax.jit
    def run(model: HookedTransformer, cache: ActivationCache) -> jax.Array:
        found.append((sample_of(model.params), cache.fingerprint.weights))
        return cache.with_model(model).accumulated_resid()

    cache = model.run_with_cache(TOKENS)[1]
    run(model, cache)
    run(other(model), cache)  # one program serves both models; the config alone could be compared
    assert found == [(None, None)]


def test_a_program_does_not_hand_out_the_model_it_was_traced_for(model: HookedTransformer) -> None:
    double = jax.jit(lambda cache: jax.tree.map(lambda x: 2 * x, cache))
    one, two = (m.run_with_cache(TOKENS, names_filter="z0")[1] for m in (model, other(model)))
    for cache in (one, two):
        assert double(cache).fingerprint.weights is None
    assert double._cache_size() == 1
    for doubled, right, wrong in (
        (jax.tree.map(jnp.add, one, one), model, other(model)),
        (one.to("cpu"), model, other(model)),
    ):
        assert doubled.with_model(right).model is right
        with pytest.raises(CacheError, match=r"weights are other numbers.*as_if_from"):
            doubled.with_model(wrong)
    jax.tree.map(jnp.subtract, one, two)  # caches of two models have one structure


def test_the_label_can_be_changed(model: HookedTransformer) -> None:
    changed = other(model)
    cache = model.run_with_cache(TOKENS, names_filter="z0")[1].as_if_from(changed)
    assert cache.model is changed
    cache.check_model(changed)
