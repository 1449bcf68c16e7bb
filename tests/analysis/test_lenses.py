"""Lenses: readouts against full logits, a tuned lens that learns, Jacobians against their definition; mistakes."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from variants import TOKENS, build

from tljax import HookedTransformer
from tljax.analysis.jacobian_lens import JacobianLens, ShortPromptWarning
from tljax.analysis.logit_lens import LensReadout, logit_lens, readout
from tljax.analysis.tuned_lens import TunedLens, lens_divergence
from tljax.errors import CheckpointError, InputError

PROMPT = "When John and Mary went to the store, John gave a drink to"
SKIP = 1


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return build("gpt2", n_layers=3)


@pytest.fixture(scope="module")
def tuned(model: HookedTransformer) -> TunedLens:
    return TunedLens.fit(model, TOKENS, steps=60, batch_size=2, optimizer=optax.adam(3e-2))


@pytest.fixture(scope="module")
def jacobian(model: HookedTransformer) -> JacobianLens:
    return JacobianLens.fit(model, TOKENS, skip_first_positions=SKIP, dim_batch=5)


@pytest.mark.parametrize("kind", ["soft_caps", "attn_only"])
def test_a_readout_is_the_cache_logit_lens_in_short(kind: str) -> None:
    model = build(kind)
    _, cache = model.run_with_cache(TOKENS)
    whole, labels = cache.logit_lens(incl_mid=True, return_labels=True)
    found = logit_lens(model, TOKENS, incl_mid=True, targets=[3, 7], top_k=4)
    log_probs = jax.nn.log_softmax(whole)
    assert found.labels == tuple(labels)
    np.testing.assert_allclose(found.top_log_probs, jnp.sort(log_probs)[..., :-5:-1], atol=1e-5)
    np.testing.assert_allclose(found.entropy, -(jnp.exp(log_probs) * log_probs).sum(-1), atol=1e-5)
    np.testing.assert_allclose(found.target_log_probs, log_probs[..., jnp.array([3, 7])], atol=1e-5)
    place = np.argsort(np.argsort(-np.asarray(whole), axis=-1), axis=-1)[..., [3, 7]]
    np.testing.assert_array_equal(found.target_ranks, place)
    np.testing.assert_array_equal(found.tokens, TOKENS)
    again = logit_lens(model, cache=cache, incl_mid=True, targets=[3, 7], top_k=4, pos=-1)
    np.testing.assert_array_equal(again.top_ids, found.top_ids[:, :, -1])


def test_depths_and_positions_can_be_chosen(model: HookedTransformer) -> None:
    every = logit_lens(model, TOKENS)
    some = logit_lens(model, TOKENS, layers=[2, -1], pos=(1, 4))
    assert some.labels == ("2_pre", "final_post")
    np.testing.assert_array_equal(some.top_ids, every.top_ids[jnp.array([2, 3])][:, :, 1:4])
    np.testing.assert_array_equal(some.tokens, TOKENS[:, 1:4])


def test_chunks_do_not_change_a_readout(model: HookedTransformer) -> None:
    vectors = jax.random.normal(jax.random.key(0), (7, model.cfg.d_model))
    whole, pieces = readout(model, vectors), readout(model, vectors, chunk_size=3)
    np.testing.assert_array_equal(whole.top_ids, pieces.top_ids)
    np.testing.assert_allclose(whole.entropy, pieces.entropy, atol=1e-6)


def test_a_readout_goes_through_jit(model: HookedTransformer) -> None:
    found = jax.jit(lambda model, tokens: logit_lens(model, tokens))(model, TOKENS)
    assert isinstance(found, LensReadout)
    np.testing.assert_array_equal(found.top_ids, logit_lens(model, TOKENS).top_ids)


def test_tokens_as_text_and_prompts_of_different_lengths(tiny: HookedTransformer) -> None:
    found = logit_lens(tiny, PROMPT, targets=" Mary")
    assert found.top_tokens(tiny)[-1][0][-1][0] == " Mary"
    assert found.target_ranks is not None
    assert found.target_ranks[-1, 0, -1, 0] == 0
    padded = logit_lens(tiny, [PROMPT, "Mary and"])
    np.testing.assert_array_equal(padded.top_ids[:, 0], found.top_ids[:, 0])
    assert "LensReadout of [5, 1, 15]" in repr(found)


def test_the_picture_of_a_readout_shows_its_tokens(tiny: HookedTransformer, tmp_path: Path) -> None:
    found = logit_lens(tiny, PROMPT)
    page = found.table(tiny)._repr_html_()
    assert "Mary" in page
    assert "final_post" in page
    found.figure(tiny, path=tmp_path / "lens.png")
    assert (tmp_path / "lens.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="index=3 is out of range"):
        found.table(tiny, index=3)
    with pytest.raises(InputError, match="depths and positions"):
        logit_lens(tiny, PROMPT, pos=-1).table(tiny)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a prompt or a cache"),
        ({"input": TOKENS, "layers": [9]}, "not all depths"),
        ({"input": TOKENS, "top_k": 0}, "top_k=0"),
        ({"input": TOKENS, "targets": 99}, "no id of the output vocabulary"),
        ({"input": TOKENS, "targets": [[1], [2]]}, "a token or a list of tokens"),
        ({"input": TOKENS, "layers": [1], "incl_mid": True}, "incl_mid"),
    ],
)
def test_mistakes_with_the_logit_lens(model: HookedTransformer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        logit_lens(model, **options)
    with pytest.raises(InputError, match="d_model=16"):
        readout(model, jnp.zeros((2, 5)))


# tuned lens


def test_a_tuned_lens_comes_closer_at_every_layer(model: HookedTransformer, tuned: TunedLens) -> None:
    before, after = lens_divergence(model, TOKENS), lens_divergence(model, TOKENS, tuned)
    assert (after < 0.5 * before).all()
    np.testing.assert_allclose(tuned.losses[0], before, rtol=1e-4)
    assert tuned.losses.shape == (60, 3)


def test_divergence_is_the_mean_over_tokens(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(TOKENS)
    log_probs = jax.nn.log_softmax(cache.logit_lens())
    expected = (jnp.exp(log_probs[-1:]) * (log_probs[-1:] - log_probs[:-1])).sum(-1).mean((1, 2))
    np.testing.assert_allclose(lens_divergence(model, TOKENS, batch_size=1), expected, rtol=1e-4)


def test_a_tuned_lens_maps_each_layer_and_leaves_the_end(model: HookedTransformer, tuned: TunedLens) -> None:
    _, cache = model.run_with_cache(TOKENS)
    found = logit_lens(model, TOKENS, lens=tuned, top_k=1)
    for depth in range(3):
        stream = cache["resid_pre", depth]
        mapped = stream + jnp.einsum("bpd,de->bpe", stream, tuned.weight[depth]) + tuned.bias[depth][None, None]
        np.testing.assert_allclose(readout(model, mapped, top_k=1).entropy, found.entropy[depth], atol=1e-5)
    np.testing.assert_array_equal(found.top_ids[-1, ..., 0], model(TOKENS).argmax(-1))


def test_any_lens_can_be_judged(model: HookedTransformer, jacobian: JacobianLens) -> None:
    found = lens_divergence(model, TOKENS, jacobian)
    _, cache = model.run_with_cache(TOKENS)
    wanted = jax.nn.log_softmax(cache.logit_lens()[-1])
    carried = cache.accumulated_resid()[1:3]
    for row, matrix, divergence in zip(carried, jacobian.matrices, found, strict=True):
        stream = cache.accumulated_resid().at[-1].set(jnp.einsum("bpd,ed->bpe", row, matrix))[-1]
        kept = cache.with_activations({**cache, "blocks.2.hook_resid_post": stream})
        log_probs = jax.nn.log_softmax(kept.logit_lens()[-1])
        np.testing.assert_allclose(divergence, (jnp.exp(wanted) * (wanted - log_probs)).sum(-1).mean(), rtol=1e-4)


def test_padding_does_not_train_a_tuned_lens(model: HookedTransformer) -> None:
    rows = [[1, 2, 3, 4], [5, 6]]
    options: dict[str, Any] = {"steps": 3, "batch_size": 2}
    fits = [TunedLens.fit(model, model.to_batch(rows, padding_side=side), **options) for side in ("left", "right")]
    np.testing.assert_allclose(fits[0].weight, fits[1].weight, atol=1e-6)


def test_a_fit_compiles_once(model: HookedTransformer, compilations: Any) -> None:
    options: dict[str, Any] = {"batch_size": 2, "optimizer": optax.sgd(0.1)}
    TunedLens.fit(model, TOKENS, steps=2, **options)
    first = compilations.count
    TunedLens.fit(model, TOKENS, steps=9, **options)
    assert compilations.count - first <= 2  # the stack of losses has another length


@pytest.mark.parametrize("kind", ["tuned", "jacobian"])
def test_lenses_on_disk(kind: str, model: HookedTransformer, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    lens = request.getfixturevalue(kind)
    path = tmp_path / "deep" / "lens.safetensors"
    lens.save(path)
    again = type(lens).load(path)
    assert jax.tree.structure(again) == jax.tree.structure(lens)
    for loaded, saved in zip(jax.tree.leaves(again), jax.tree.leaves(lens), strict=True):
        np.testing.assert_array_equal(loaded, saved)
    other = JacobianLens if kind == "tuned" else TunedLens
    with pytest.raises(CheckpointError, match="does not hold a"):
        other.load(path)
    with pytest.raises(CheckpointError, match="no file"):
        type(lens).load(tmp_path / "none")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        type(lens).load(path)


@pytest.mark.parametrize("kind", ["tuned", "jacobian"])
def test_a_lens_knows_its_model(kind: str, model: HookedTransformer, request: pytest.FixtureRequest) -> None:
    lens = request.getfixturevalue(kind)
    with pytest.raises(InputError, match="n_layers=3"):
        logit_lens(build("gpt2"), TOKENS, lens=lens)
    with pytest.raises(InputError, match="center_writing_weights=False"):
        logit_lens(model.process_weights(), TOKENS, lens=lens)
    assert repr(lens).startswith(type(lens).__name__)


def test_a_tuned_lens_needs_steps(model: HookedTransformer) -> None:
    with pytest.raises(InputError, match="steps=0"):
        TunedLens.fit(model, TOKENS, steps=0)


# Jacobian lens


def jacobian_by_definition(model: HookedTransformer, tokens: jax.Array, layer: int) -> jax.Array:
    """Every derivative of the final stream [t'] by the layer's output [t], then the double sum."""
    start = model(tokens[None], stop_at_layer=layer + 1)
    n = model.cfg.n_layers

    def end(stream: jax.Array) -> jax.Array:
        _, cache = model.run_with_cache(stream, start_at_layer=layer + 1, return_type=None)
        return cache["resid_post", n - 1][0]

    whole = jax.jacrev(end)(start)[:, :, 0]  # [t', d_final, t, d_layer]
    kept = slice(SKIP, len(tokens) - 1)
    part = whole[kept, :, kept]
    return part.sum((0, 2)) / part.shape[0]


def test_jacobians_are_as_defined() -> None:
    model = build("llama", n_layers=3)
    lens = JacobianLens.fit(model, TOKENS, skip_first_positions=SKIP, dim_batch=5)
    assert (lens.layers, lens.depths, lens.n_prompts) == ((0, 1), (1, 2, 3), len(TOKENS))
    for layer in lens.layers:
        expected = sum(jacobian_by_definition(model, row, layer) for row in TOKENS) / len(TOKENS)
        np.testing.assert_allclose(lens.matrices[layer], expected, atol=2e-5, rtol=1e-4)


def test_prompts_of_different_lengths_count_alike(model: HookedTransformer) -> None:
    rows = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 1]]
    each = [JacobianLens.fit(model, [row], skip_first_positions=SKIP) for row in rows]
    both = JacobianLens.fit(model, rows, skip_first_positions=SKIP)
    merged = JacobianLens.merge(each)
    assert merged.n_prompts == 2
    np.testing.assert_allclose(merged.matrices, both.matrices, atol=1e-5)
    with pytest.warns(ShortPromptWarning, match="1 of 2 prompts"):
        alone = JacobianLens.fit(model, [rows[0], [1, 2]], skip_first_positions=SKIP)
    np.testing.assert_allclose(alone.matrices, each[0].matrices, atol=1e-6)


def test_the_lens_reads_transported_vectors(model: HookedTransformer, jacobian: JacobianLens) -> None:
    _, cache = model.run_with_cache(TOKENS)
    carried = jnp.einsum("bpd,ed->bpe", cache["resid_post", 1], jacobian.matrices[1])
    found = logit_lens(model, TOKENS, lens=jacobian)
    assert found.labels == ("1_pre", "2_pre", "final_post")
    np.testing.assert_allclose(readout(model, carried).entropy, found.entropy[1], atol=1e-5)
    np.testing.assert_allclose(jacobian.transport(cache["resid_post", 1], 1), carried, atol=1e-5)


def test_lens_vectors_are_the_tokens_rows_of_the_unembedding_after_the_matrix(
    model: HookedTransformer, jacobian: JacobianLens
) -> None:
    vectors = jacobian.lens_vectors(model, [2, 5], 1)
    weight = model.params["ln_final"]["w"]
    expected = (model.W_U[:, jnp.array([2, 5])] * weight[:, None]).T @ jacobian.matrices[1]
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_mistakes_with_the_jacobian_lens(model: HookedTransformer, jacobian: JacobianLens) -> None:
    with pytest.raises(InputError, match="No prompt has more than"):
        JacobianLens.fit(model, TOKENS)
    for layers in ([2], [0, 0], []):
        with pytest.raises(InputError, match="source_layers"):
            JacobianLens.fit(model, TOKENS, source_layers=layers)
    with pytest.raises(InputError, match="at least 1"):
        JacobianLens.fit(model, TOKENS, dim_batch=0)
    with pytest.raises(InputError, match="no matrix for layer 2"):
        jacobian.transport(jnp.zeros(16), 2)
    with pytest.raises(InputError, match="not all depths"):
        logit_lens(model, TOKENS, lens=jacobian, layers=[0])
    with pytest.raises(InputError, match="merge"):
        JacobianLens.merge([jacobian, dataclasses.replace(jacobian, layers=(0, 2))])
