"""Batches of ragged prompts: what they hold, what a model makes of them, and every refusal by its message."""

import functools
from typing import Any

import compare
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_tokenizers import TINY
from variants import build

import tljax
from tljax import Batch, HookedTransformer
from tljax.errors import InputError, TokenizerError
from tljax.patching import LogitDiff, sweep

close = functools.partial(compare.close, atol=1e-5, rtol=1e-5)

RNG = np.random.default_rng(3)
ROWS = [RNG.integers(0, 13, n).tolist() for n in (3, 7, 1, 5)]
SIDES = ["left", "right"]
KINDS = ["gpt2", "llama", "neox"]


def text_model(name: str = "gpt2", **changes: Any) -> HookedTransformer:
    like = build("gpt2", d_vocab=300, **changes)
    return HookedTransformer(like.cfg, TINY[name](), params=like.params)


# what a batch holds


@pytest.mark.parametrize("side", SIDES)
def test_parts(side: Any) -> None:
    batch = build("gpt2").to_batch(ROWS, padding_side=side)
    assert len(batch) == 4
    assert batch.shape == (4, 7)
    assert batch.padding_side == side
    assert (batch.tokens.dtype, batch.mask.dtype, batch.positions.dtype) == (jnp.int32, jnp.bool_, jnp.int32)
    assert batch.lengths.tolist() == [3, 7, 1, 5]
    for index, row in enumerate(ROWS):
        assert batch.row(index).tolist() == row
        mask = np.asarray(batch.mask[index])
        assert mask[-1 if side == "left" else 0]
        assert mask.sum() == len(row)
        assert np.asarray(batch.positions[index])[mask].tolist() == list(range(len(row)))
    assert batch.row(-1).tolist() == ROWS[-1]
    assert repr(batch) == f"Batch(4 prompts of 1 to 7 tokens, padded {side})"
    with pytest.raises(InputError, match="There is no prompt 4: the batch has 4"):
        batch.row(4)


def test_what_makes_a_batch() -> None:
    model = build("gpt2")
    assert repr(model.to_batch([1, 2])) == "Batch(1 prompt of 2 tokens)"
    assert model.to_batch(np.array(ROWS[0])).row(0).tolist() == ROWS[0]
    assert model.to_batch(jnp.asarray([ROWS[0], ROWS[0]])).row(1).tolist() == ROWS[0]
    assert [model.to_batch([np.array(row) for row in ROWS]).row(i).tolist() for i in range(4)] == ROWS
    right = model.to_batch(ROWS)
    assert model.to_batch(right) is right
    left = model.to_batch(right, padding_side="left")
    assert (left.padding_side, left.row(2).tolist()) == ("left", ROWS[2])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", TINY)
def test_texts(name: str, side: Any) -> None:
    model = text_model(name)
    texts = ["the cat", "", "the"]
    batch = model.to_batch(texts, padding_side=side)
    for index, text in enumerate(texts):
        assert batch.row(index).tolist() == model.to_tokens(text)[0].tolist()
    assert (np.asarray(batch.tokens) == np.asarray(model.to_tokens(texts, padding_side=side))).all()
    assert model.to_batch("the cat", prepend_bos=False).row(0).tolist() == batch.row(0).tolist()[1:]
    with pytest.raises(InputError, match=r"Prompt 1 has no tokens.*prepend_bos=True"):
        model.to_batch(texts, prepend_bos=False)


@pytest.mark.parametrize("side", SIDES)
def test_from_rows_of_a_width(side: Any) -> None:
    batch = Batch.from_rows([[1, 2, 3], [4]], side, width=5)
    assert batch.shape == (2, 5)
    assert [batch.row(n).tolist() for n in range(2)] == [[1, 2, 3], [4]]
    with pytest.raises(InputError, match="has 3 tokens, more than width=2"):
        Batch.from_rows([[1, 2, 3], [4]], side, width=2)


@pytest.mark.parametrize("side", SIDES)
def test_from_mask(side: Any) -> None:
    made = build("gpt2").to_batch(ROWS, padding_side=side)
    for mask in (np.asarray(made.mask), made.mask.astype(jnp.int32), np.asarray(made.mask).astype(float).tolist()):
        again = Batch.from_mask(made.tokens, mask)
        assert again.padding_side == side
        for part in ("tokens", "mask", "positions"):
            assert (getattr(again, part)[np.asarray(made.mask)] == getattr(made, part)[np.asarray(made.mask)]).all()
    assert Batch.from_mask([1, 2], [1, 1]).padding_side == "right"
    assert Batch.from_mask([1, 2], [1, 1], "left").padding_side == "left"


def test_pytree() -> None:
    batch = build("gpt2").to_batch(ROWS, padding_side="left")
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(batch)[0]]
    assert paths == [".tokens", ".mask", ".positions"]
    again = jax.jit(lambda b: b)(batch)
    assert isinstance(again, Batch)
    assert again.padding_side == "left"
    assert repr(jax.tree.map(lambda _: None, batch)).startswith("Batch(tokens=None")
    seen = []
    jax.jit(lambda b: seen.append(repr(b)) or b.lengths)(batch)
    assert seen == ["Batch(4 prompts in 7 positions, padded left, traced)"]


# batch == single


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", [*KINDS, "local", "bidirectional"])
def test_each_prompt_gets_what_it_gets_alone(kind: str, side: Any) -> None:
    model = build(kind)
    batch = model.to_batch(ROWS, padding_side=side)
    logits, losses = model(batch, return_type="both", loss_per_token=True)
    lengths, total = np.asarray(batch.lengths), 0.0
    for index, row in enumerate(ROWS):
        close(logits[index][np.asarray(batch.mask[index])], model([row])[0])
        if len(row) > 1:
            alone = float(model([row], return_type="loss"))
            assert float(losses[index].sum()) / (len(row) - 1) == pytest.approx(alone, abs=1e-5)
            total += alone * (len(row) - 1)
    assert float(model(batch, return_type="loss")) == pytest.approx(total / (lengths - 1).sum(), abs=1e-5)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_traced_batches(kind: str, side: Any) -> None:
    model = build(kind)
    batch = model.to_batch(ROWS, padding_side=side)
    mask = np.asarray(batch.mask)
    close(jax.jit(model)(batch)[mask], model(batch)[mask])
    close(jax.jit(lambda b: model(b, return_type="loss"))(batch), model(batch, return_type="loss"))
    made = jax.jit(lambda t, m: model(Batch.from_mask(t, m, side)))(batch.tokens, batch.mask)
    close(made[mask], model(batch)[mask])
    gradient = jax.grad(lambda m: m(batch, return_type="loss"))(model)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("side", SIDES)
def test_hooks_and_other_ways_in(model: HookedTransformer, side: Any) -> None:
    batch = model.to_batch(ROWS, padding_side=side)
    mask = np.asarray(batch.mask)
    hooks = [("resid_pre1", tljax.Scale(2.0))]
    hooked = model.run_with_hooks(batch, fwd_hooks=hooks)
    close(hooked[1][mask[1]], model.run_with_hooks([ROWS[1]], fwd_hooks=hooks)[0])
    residual, tokens, _, token_mask = model.input_to_embed(batch)
    assert (tokens == batch.tokens).all()
    assert (token_mask == batch.mask).all()
    loss = model(residual, start_at_layer=0, tokens=batch, return_type="loss")
    close(loss, model(batch, return_type="loss"))


def test_full_batches_share_the_programs_of_plain_tokens(model: HookedTransformer, compilations: Any) -> None:
    tokens = np.array([ROWS[0], ROWS[0]])
    batch = model.to_batch(tokens)
    expected = model(tokens)
    before = compilations.count
    close(model(batch), expected)
    assert compilations.count == before


def test_sweeps_of_left_padded_prompts_equal_single_ones() -> None:
    model = build("gpt2")
    rows = [row for row in ROWS if len(row) > 1]
    batch, metric = model.to_batch(rows, padding_side="left"), LogitDiff(1, 2)
    options: dict[str, Any] = {"activation_name": "z", "axes": ("head",), "reduce": "none"}
    result = sweep(model, batch, tljax.Zero(), metric, **options)
    for index, row in enumerate(rows):
        alone = sweep(model, np.array([row]), tljax.Zero(), metric, **options)
        close(result.values[..., index], alone.values[..., 0])


# refusals


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1, 2], []], r"Prompt 1 has no tokens"),
        ([], "no prompts|no tokens"),
        ([[1, 2], [3, 13, 1]], r"Token id 13 at position 1 of prompt 1 is outside the vocabulary \(0 to 12\)"),
        ([[-1], [3]], "Token id -1 at position 0 of prompt 0"),
        ([[1.5], [3]], "Prompt 0 holds float64 values: token ids must be integers"),
        ([[1], [[3]]], r"Prompt 1 has shape \(1, 1\)"),
        ([[1] * 13, [3]], "The sequence has 13 tokens; this model takes at most n_ctx=12"),
        (np.zeros((1, 2, 3), np.int32), r"must have shape \[pos\] or \[batch, pos\]"),
    ],
    ids=str,
)
def test_rows_that_make_no_batch(prompts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build("gpt2").to_batch(prompts)


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(TokenizerError, match="no tokenizer"):
        build("gpt2").to_batch(["the"])
    with pytest.raises(InputError, match="Expected a list of strings, got list"):
        text_model().to_batch([[1], "the"])
    with pytest.raises(InputError, match=r"padding_side='middle' is not one of 'left', 'right'"):
        build("gpt2").to_batch([1], padding_side="middle")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"does not show: make the Batch outside jax.jit"):
        jax.jit(build("gpt2").to_batch)(np.array([[1, 2]]))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 1], [1, 0, 1]], r"Row 1 of attention_mask has a gap after position 0.*attention_mask= to the model"),
        ([[1, 1, 1], [0, 0, 0]], "Row 1 of attention_mask is all padding.*Leave that row out"),
        ([[0, 1, 1], [1, 1, 0]], r"Row 1 .* not padded on the left only: its text is at positions 0 to 1 of 3"),
        ([[0, 1, 0], [1, 1, 1]], "Row 0 .* not padded on the left only"),
        ([[1, 1], [1, 1]], r"attention_mask has shape \(2, 2\); the tokens have shape \(2, 3\)"),
        ([[1, 1], [1]], "different lengths"),
        (1, r"shape \[batch, pos\], got \(\)"),
    ],
    ids=str,
)
def test_masks_that_make_no_batch(mask: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Batch.from_mask(np.ones((2, 3), np.int32), mask)


def test_more_masks_that_make_no_batch() -> None:
    with pytest.raises(InputError, match=r"Row 0 .* not padded on the right only"):
        Batch.from_mask([[1, 2]], [[0, 1]], "right")
    with pytest.raises(InputError, match="must be integers, got dtype float64"):
        Batch.from_mask([[0.5]], [[1]])
    with pytest.raises(InputError, match="A traced mask does not show its padding side: pass padding_side="):
        jax.jit(Batch.from_mask)(np.array([[1, 2]]), np.array([[1, 1]]))
    with pytest.raises(InputError, match=r"call batch.row outside jax.jit"):
        jax.jit(lambda b: b.row(0))(build("gpt2").to_batch([1, 2]))


def test_what_contradicts_a_batch() -> None:
    model = build("gpt2")
    batch = model.to_batch(ROWS, padding_side="left")
    for run in (model, model.run_with_cache, model.run_with_hooks, model.input_to_embed):
        with pytest.raises(InputError, match=r"attention_mask= came together with a Batch.*Batch.from_mask"):
            run(batch, attention_mask=batch.mask)
        with pytest.raises(InputError, match=r"padding_side='right' came together with a Batch padded left"):
            run(batch, padding_side="right")
        run(batch, padding_side="left")
    with pytest.raises(InputError, match=r"start_at_layer= needs the residual stream.*got Batch"):
        model(batch, start_at_layer=1)
    with pytest.raises(InputError, match=r"Token id 99 at batch 0, position 6"):
        model(Batch(batch.tokens.at[0, -1].set(99), batch.mask, batch.positions, "left"))
    with pytest.raises(InputError, match="not padded on the right only"):
        model(Batch(batch.tokens, batch.mask, batch.positions, "right"))
    with pytest.raises(InputError, match="positions of this Batch do not count up from 0"):
        model(Batch(batch.tokens, batch.mask, batch.positions + 1, "left"))
    with pytest.raises(InputError, match=r"The parts of this Batch have shapes"):
        model(Batch(batch.tokens, batch.mask[:, 1:], batch.positions, "left"))
