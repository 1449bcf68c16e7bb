"""Generation on a CPU lays weights out for few rows; the numbers stay the same."""

import gc
import pickle
import weakref
from typing import Any

import jax
import numpy as np
import pytest

import tljax
from tljax.dictionaries import Dictionary, DictionaryConfig
from tljax.generation import decoding
from tljax.generation.few_rows import TransposedWeights, in_pieces, size_of_copies
from tljax.hooks import splices


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "gated"])
def wide(request: pytest.FixtureRequest) -> tljax.HookedTransformer:
    """A model whose weights are large enough to be laid out anew."""
    cfg = tljax.HookedTransformerConfig(
        d_model=512, n_heads=8, d_head=64, n_layers=1, d_mlp=520, d_vocab=516, n_ctx=64, act_fn="silu", seed=3,
        gated_mlp=request.param,
    )  # fmt: skip
    return tljax.HookedTransformer(cfg)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_logits_are_those_of_the_plain_weights(wide: tljax.HookedTransformer, batch: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 516, (batch, 7))
    options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False, "output_logits": True}
    fast = wide.generate(tokens, 24, **options)
    plain = wide.generate(tokens, 24, use_past_kv_cache=False, **options)
    np.testing.assert_array_equal(fast.sequences, plain.sequences)
    np.testing.assert_allclose(np.stack(fast.logits), np.stack(plain.logits), atol=1e-5)


@pytest.mark.parametrize("batch", [1, 4])
def test_features_changed_in_a_spliced_dictionary(
    wide: tljax.HookedTransformer, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, point = np.random.default_rng(1), "blocks.0.hook_resid_post"
    arrays = {"W_enc": (512, 1024), "b_enc": (1024,), "W_dec": (1024, 512), "b_dec": (512,)}
    params = {name: rng.standard_normal(shape, np.float32) / 20 for name, shape in arrays.items()}
    one = Dictionary(params, DictionaryConfig(d_in=512, d_sae=1024, normalize_activations="layer_norm"))
    tokens = rng.integers(0, 516, (batch, 7))
    model = wide.with_dictionaries({point: one}, exclude_tokens=[int(tokens[0, 3])])
    model = model.with_hooks([(f"{point}.hook_sae_acts_post", tljax.Scale(4.0))])
    used, moved = [], splices._moved
    monkeypatch.setattr(splices, "_moved", lambda *arguments: used.append(True) or moved(*arguments))
    options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False, "output_logits": True}
    fast = model.generate(tokens, 24, **options)
    assert used
    plain = model.generate(tokens, 24, use_past_kv_cache=False, **options)
    np.testing.assert_array_equal(fast.sequences, plain.sequences)
    np.testing.assert_allclose(np.stack(fast.logits), np.stack(plain.logits), atol=2e-5)
    unchanged = wide.generate(tokens, 24, **options)
    assert np.abs(np.stack(unchanged.logits)[0] - np.stack(fast.logits)[0]).max() > 1e-2


def test_layouts_hold_the_same_numbers(wide: tljax.HookedTransformer) -> None:
    block = wide.params["blocks"][0]
    pieces, turned = in_pieces(wide.params)["blocks"][0], TransposedWeights().of(wide.params)
    heads_last = np.asarray(block["attn"]["W_Q"]).reshape(512, 512)
    np.testing.assert_array_equal(np.asarray(pieces["attn"]["W_Q"]).reshape(512, 512), heads_last)
    np.testing.assert_array_equal(turned["blocks"][0]["mlp"]["W_in"], np.asarray(block["mlp"]["W_in"]).T)
    assert turned["unembed"]["W_U"].shape == (516, 512)
    assert size_of_copies(wide.params) == sum(leaf.nbytes for leaf in jax.tree.leaves(turned))


@pytest.mark.parametrize(("rows", "limit", "free"), [(3, 50, 2**40), (4, 19, 2**40), (4, 50, 2**20), (4, 50, None)])
def test_copies_are_made_only_where_they_pay(
    wide: tljax.HookedTransformer, monkeypatch: pytest.MonkeyPatch, rows: int, limit: int, free: int | None
) -> None:
    def laid_out(rows: int, limit: int) -> Any:
        rules: Any = None
        return decoding.Decoder(wide, wide._hooks, rules, limit)._lay_out(rows)

    monkeypatch.setattr(decoding, "free_bytes", lambda device: free)
    assert laid_out(rows, limit) == {}
    monkeypatch.setattr(decoding, "free_bytes", lambda device: 2**40)
    assert laid_out(4, 50)["unembed"].keys() == {"W_U"}


def kept(model: tljax.HookedTransformer) -> jax.Array:
    """The copy of the first block's ``W_in`` that a generation used."""
    tokens = np.zeros((4, 2), np.int32)
    model.generate(tokens, 20, do_sample=False, stop_at_eos=False, verbose=False, fwd_hooks=[("embed", tljax.Scale(2))])
    copy: jax.Array = model._transposed._kept[1]["blocks"][0]["mlp"]["W_in"]
    return copy


def test_a_model_keeps_its_copies(wide: tljax.HookedTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "free_bytes", lambda device: 2**40)
    model = wide.replace(params=wide.params)
    copy = kept(model)
    assert kept(model) is kept(model.add_hook("embed", tljax.Zero())) is copy
    assert "_transposed" not in vars(jax.tree.map(lambda leaf: leaf, model))
    assert "_transposed" not in vars(model.replace(params=model.params))
    assert pickle.loads(pickle.dumps(model._transposed))._kept == ({}, {})
    lives = weakref.ref(copy)
    del model, copy
    gc.collect()
    assert lives() is None


def test_copies_are_of_the_weights_that_run(wide: tljax.HookedTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "free_bytes", lambda device: 2**40)
    mlp = dict(wide.params["blocks"][0]["mlp"])
    model = wide.replace(params={**wide.params, "blocks": ({**wide.params["blocks"][0], "mlp": mlp},)})
    np.testing.assert_array_equal(kept(model), mlp["W_in"].T)
    mlp["W_in"] = 2 * mlp["W_in"]  # nobody should: a model does not change
    np.testing.assert_array_equal(kept(model), mlp["W_in"].T)
