"""Position embeddings that only queries and keys read: against TransformerLens 3.9, and in everything that runs."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from tljax import HookedTransformer, HookedTransformerConfig, Replace
from tljax.errors import InputError
from tljax.patching import LogitDiff, path_patch, sweep

GOLDEN = Path(__file__).parent / "golden" / "state_dicts_transformerlens.safetensors"
SHORT = np.array([[3, 10, 17, 0, 7]])
OTHER = np.array([[3, 10, 9, 0, 7]])
METRIC = LogitDiff(3, 5)


@functools.cache
def golden(part: str) -> dict[str, np.ndarray]:
    """Tensors of the case ``shortformer`` whose names start so."""
    start = f"shortformer/{part}/"
    with safe_open(GOLDEN, framework="numpy") as file:
        return {key.removeprefix(start): file.get_tensor(key) for key in file.keys() if key.startswith(start)}  # noqa: SIM118


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    with safe_open(GOLDEN, framework="numpy") as file:
        cfg = json.loads(file.metadata()["record"])["cfg"]["shortformer"]
    return HookedTransformer.from_transformer_lens(golden("state"), cfg)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    with safe_open(GOLDEN, framework="numpy") as file:
        return file.get_tensor("tokens").astype(np.int32)


def difference(logits: jax.Array) -> float:
    return float(logits[0, -1, 3] - logits[0, -1, 5])


@pytest.mark.parametrize("run", ["plain", "left", "apart"])
def test_activations_are_transformer_lens_s(model: HookedTransformer, tokens: np.ndarray, run: str) -> None:
    mask = np.ones_like(tokens)
    mask[0, : 2 if run == "left" else 0] = 0
    names = list(golden(run))
    assert len(names) > 5
    _, cache = model.run_with_cache(tokens, names_filter=names, attention_mask=mask)
    for name, value in golden(run).items():
        ours, theirs = np.asarray(cache[name]), value
        if run == "left":  # rows of padding are nobody's
            shown = mask[:, None, :, None] if "pattern" in name else mask.reshape(*mask.shape, *[1] * (value.ndim - 2))
            ours, theirs = ours * shown, theirs * shown
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5, err_msg=name)


def test_positions_are_no_part_of_the_residual_stream(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(SHORT)
    parts, labels = cache.decompose_resid(return_labels=True)
    assert "embed" in labels
    assert "pos_embed" not in labels
    np.testing.assert_allclose(parts.sum(axis=0), cache["resid_post", -1], atol=1e-5)
    np.testing.assert_allclose(
        cache.get_full_resid_decomposition(expand_neurons=False).sum(axis=0), cache["resid_post", -1], atol=1e-5
    )
    np.testing.assert_array_equal(cache["resid_pre", 0], cache["hook_embed"])
    embedded = model.input_to_embed(SHORT)[2]
    np.testing.assert_array_equal(embedded, cache["hook_pos_embed"])


def test_a_run_may_start_at_any_layer(model: HookedTransformer) -> None:
    logits, cache = model.run_with_cache(SHORT)
    for layer in (0, 1):
        np.testing.assert_allclose(model(cache["resid_pre", layer], start_at_layer=layer), logits, atol=1e-5)
    np.testing.assert_allclose(model.blocks[1](cache["resid_pre", 1]), cache["resid_post", 1], atol=1e-5)


def test_cached_generation_is_uncached(model: HookedTransformer) -> None:
    choice = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    written = np.asarray(model.generate(SHORT, **choice))
    seen = SHORT
    for _ in range(3):
        seen = np.concatenate([seen, np.asarray(model(seen)[:, -1:].argmax(-1))], axis=1)
    np.testing.assert_array_equal(written, seen)


@pytest.mark.parametrize("point", ["resid_pre", "k"])
def test_sweeps_are_hooked_runs(model: HookedTransformer, point: str) -> None:
    _, clean = model.run_with_cache(SHORT)
    swept = np.asarray(sweep(model, OTHER, clean, METRIC, point, axes=("pos",)).values)
    for layer, pos in np.ndindex(2, 5):
        put = Replace(clean[point, layer], pos=pos)
        wanted = difference(model.run_with_hooks(OTHER, fwd_hooks=[(f"{point}{layer}", put)]))
        assert swept[layer, pos] == pytest.approx(wanted, abs=2e-5)
    assert np.ptp(swept) > 1e-2


def test_a_sweep_over_positions_reaches_every_layer(model: HookedTransformer) -> None:
    values = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 8)), jnp.float32)
    swept = np.asarray(sweep(model, SHORT, Replace(values), METRIC, "pos_embed", axes=("pos",)).values)
    for pos in range(5):
        put = Replace(values, pos=pos)
        wanted = difference(model.run_with_hooks(SHORT, fwd_hooks=[("hook_pos_embed", put)]))
        assert swept[pos] == pytest.approx(wanted, abs=2e-5)
    assert np.ptp(swept) > 1e-2


def test_paths_into_queries_and_keys(model: HookedTransformer) -> None:
    _, clean = model.run_with_cache(SHORT)
    _, base = model.run_with_cache(OTHER)
    patched = path_patch(model, OTHER, clean, METRIC, [("q", 1, 0), ("k", 1, 1)], "z", layers=[0], freeze_mlps=True)
    for head in range(2):
        hooks: list[Any] = [("z0", Replace(clean["z", 0], head=head)), ("mlp_out0", Replace(base["mlp_out", 0]))]
        _, forked = model.with_hooks(hooks).run_with_cache(OTHER)
        receivers = [("q1", Replace(forked["q", 1], head=0)), ("k1", Replace(forked["k", 1], head=1))]
        wanted = difference(model.run_with_hooks(OTHER, fwd_hooks=receivers))
        assert float(patched.values[0, head]) == pytest.approx(wanted, abs=2e-5)
    with pytest.raises(InputError, match=r"added to the residual stream.*'hook_embed'; got 'hook_pos_embed'"):
        path_patch(model, OTHER, clean, METRIC, "logits", "pos_embed", axes=())


def test_processing_does_what_is_exact(model: HookedTransformer) -> None:
    processed = model.process_weights()
    assert processed.processing["fold_ln"].startswith("not exact here: queries and keys read position embeddings")
    assert processed.processing["center_writing_weights"].startswith("not exact here")
    assert processed.processing["fold_value_biases"] == "applied"
    logits, expected = jax.nn.log_softmax(processed(SHORT)), jax.nn.log_softmax(model(SHORT))
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_gradients_reach_the_table(model: HookedTransformer) -> None:
    gradient = jax.grad(lambda model: jax.jit(lambda m: m(SHORT, return_type="loss"))(model))(model)
    table = np.abs(np.asarray(gradient.params["pos_embed"]["W_pos"])).sum(axis=1)
    assert (table[:4] > 0).all()
    assert not table[5:].any()


def test_a_fresh_model_has_the_table() -> None:
    fresh = HookedTransformer(
        HookedTransformerConfig(
            d_model=8,
            n_heads=2,
            n_layers=1,
            n_ctx=4,
            d_vocab=9,
            attn_only=True,
            positional_embedding_type="shortformer",
        )
    )
    assert fresh.W_pos.shape == (4, 8)
    assert fresh([[1, 2]]).shape == (1, 2, 9)
    assert "hook_pos_embed" in [point.name for point in fresh.hook_points()]
