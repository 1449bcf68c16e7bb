"""A position counts in the text: every function that takes one gives padded prompts what each of them gives alone."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import build

import tljax
from tljax import HookedTransformer
from tljax.analysis.direct_logit_attribution import direct_logit_attribution
from tljax.analysis.logit_lens import logit_lens
from tljax.errors import InputError
from tljax.forward.forward import _apply_compiled
from tljax.patching import (
    KL,
    Logit,
    LogitDiff,
    LogProb,
    Loss,
    Normalized,
    ablation_sweep,
    path_patch,
    steering_sweep,
    sweep,
)
from tljax.patching import transformerlens as in_its_terms
from tljax.text import positions

RNG = np.random.default_rng(5)
ROWS = [RNG.integers(1, 12, n).tolist() for n in (3, 6)]
CLEAN = [RNG.integers(1, 12, len(row)).tolist() for row in ROWS]
VECTOR = np.linspace(-1, 1, 16).astype(np.float32)
SIDES = ("left", "right")
RESID, PATTERN = "blocks.0.hook_resid_post", "blocks.1.attn.hook_pattern"


def hooked(*hooks: Any) -> Callable[..., Any]:
    """The last token's logits under some hooks."""

    def run(model: HookedTransformer, rows: Sequence[Any], batch: Any) -> Any:
        logits, mask = model.run_with_hooks(batch, fwd_hooks=list(hooks)), np.asarray(batch.mask)
        return [np.asarray(logits)[n, np.flatnonzero(row)[-1]] for n, row in enumerate(mask)]

    return run


def of_cache(read: Callable[[Any], Any], **options: Any) -> Callable[..., Any]:
    """Something of a cache, whose prompts are axis 1."""

    def run(model: HookedTransformer, rows: Sequence[Any], batch: Any) -> Any:
        return np.moveaxis(np.asarray(read(model.run_with_cache(batch, **options)[1])), 1, 0)

    return run


def swept(run: Callable[[HookedTransformer, Any, Any], Any]) -> Callable[..., Any]:
    """A sweep's values for each prompt, and what it compares them with."""

    def values(model: HookedTransformer, rows: Sequence[Any], batch: Any) -> Any:
        clean = model.to_batch([CLEAN[ROWS.index(row)] for row in rows], padding_side=batch.padding_side)
        result = run(model, batch, clean)
        return np.concatenate(
            [
                np.moveaxis(np.asarray(result.values), -1, 0).reshape(len(rows), -1),
                np.asarray(result.baseline)[:, None],
            ],
            axis=1,
        )

    return values


DIFF = LogitDiff(3, 4)
CASES: dict[str, Callable[..., Any]] = {
    "zero -1": hooked((RESID, tljax.Zero(pos=-1))),
    "zero 0": hooked((RESID, tljax.Zero(pos=0))),
    "zero numbers": hooked((RESID, tljax.Zero(pos=[0, -2]))),
    "zero slice": hooked((RESID, tljax.Zero(pos=slice(-2, None)))),
    "zero slice past the end": hooked((RESID, tljax.Zero(pos=slice(2, 5)))),
    "add vector": hooked((RESID, tljax.Add(VECTOR, pos=-1))),
    "add rows": hooked((RESID, tljax.Add(np.stack([VECTOR, -2 * VECTOR]), pos=[-1, 0]))),
    "pattern query": hooked((PATTERN, tljax.Zero(pos=-1))),
    "pattern key": hooked((PATTERN, tljax.Scale(0.5, query_pos=-1, key_pos=0))),
    "mean over pos": hooked((RESID, tljax.Mean(over="pos", pos=-1))),
    "chain": hooked((RESID, tljax.Chain(tljax.Zero(pos=1), tljax.Add(VECTOR, pos=-2)))),
    "embedding": hooked(("hook_embed", tljax.Zero(pos=-2))),
    "accumulated": of_cache(lambda c: c.accumulated_resid(pos_slice=-1, apply_ln=True)),
    "accumulated at the start": of_cache(lambda c: c.accumulated_resid(pos_slice=(0, 2))),
    "decomposed": of_cache(lambda c: c.decompose_resid(pos_slice=-1, apply_ln=True)),
    "decomposed slice": of_cache(lambda c: c.decompose_resid(pos_slice=(-3, -1))),
    "full decomposition": of_cache(
        lambda c: c.get_full_resid_decomposition(pos_slice=-2, expand_neurons=True, apply_ln=True)
    ),
    "heads": of_cache(lambda c: c.stack_head_results(pos_slice=[-1, 0], apply_ln=True, incl_remainder=True)),
    "neurons": of_cache(lambda c: c.stack_neuron_results(-1, pos_slice=-1, neuron_slice=(0, 3))),
    "one layer's neurons": of_cache(lambda c: c.get_neuron_results(0, neuron_slice=2, pos_slice=-1)[None]),
    "cache lens": of_cache(lambda c: c.logit_lens(pos_slice=-1)),
    "logit attribution": of_cache(lambda c: c.logit_attrs(c.decompose_resid(pos_slice=-1), 3, 4, pos_slice=-1)),
    "norm of a stack": of_cache(lambda c: c.apply_ln_to_stack(c.accumulated_resid(pos_slice=-2), pos_slice=-2)),
    "cut run": of_cache(lambda c: c["resid_post", 1][None], pos_slice=-1),
    "cut run, pattern": of_cache(lambda c: c["pattern", 1].sum(-1)[None], pos_slice=[0, -1]),
    "cut run, then cut": of_cache(lambda c: c.accumulated_resid(pos_slice=-1), pos_slice=(-3, None)),
    "lens": lambda m, rows, b: np.moveaxis(np.asarray(logit_lens(m, b, pos=-1).top_log_probs), 1, 0),
    **{
        f"attribution by {unit}": lambda m, rows, b, unit=unit: (
            np.asarray(direct_logit_attribution(m, b, 3, 4, unit=unit).attribution).T
        )
        for unit in ("component", "head", "neuron", "layer")
    },
    "sweep": swept(
        lambda m, b, c: sweep(m, b, c, DIFF, "resid_pre", axes=("pos",), at={"pos": [0, -1]}, reduce="none")
    ),
    "sweep at": swept(lambda m, b, c: sweep(m, b, c, DIFF, "z", axes=("head",), at={"pos": -1}, reduce="none")),
    "sweep patterns": swept(
        lambda m, b, c: sweep(
            m,
            b,
            c,
            LogProb(3),
            "pattern",
            axes=("query_pos", "key_pos"),
            at={"query_pos": [-1, -2], "key_pos": slice(0, 2)},
            reduce="none",
        )
    ),
    "sweep from a hook": swept(
        lambda m, b, c: sweep(m, b, tljax.Zero(pos=-1), Logit(3, pos=-1), "mlp_out", axes=(), reduce="none")
    ),
    "sweep of a hooked model": swept(
        lambda m, b, c: sweep(
            m.add_hook("blocks.0.hook_mlp_out", tljax.Scale(2.0, pos=-1)),
            b,
            c,
            DIFF,
            "z",
            axes=("head",),
            at={"pos": -1},
            layers=[1],
            reduce="none",
        )
    ),
    "ablation": swept(lambda m, b, c: ablation_sweep(m, b, DIFF, at={"pos": -1}, reduce="none")),
    "steering": swept(lambda m, b, c: steering_sweep(m, b, VECTOR, DIFF, [2.0], at={"pos": -1}, reduce="none")),
    "paths": swept(
        lambda m, b, c: path_patch(m, b, c, DIFF, [("q", 1)], "z", at={"pos": slice(-2, None)}, reduce="none")
    ),
    "loss": swept(lambda m, b, c: sweep(m, b, c, Loss(b), "resid_pre", axes=(), reduce="none")),
    "kl": swept(
        lambda m, b, c: sweep(m, b, c, KL(m(c), attention_mask=b), "resid_pre", axes=(), layers=[0], reduce="none")
    ),
    "its terms": swept(
        lambda m, b, c: in_its_terms.generic_activation_patch(
            m, b, c, DIFF, in_its_terms.layer_pos_patch_setter, "resid_pre", index_df=LAST, reduce="none"
        )
    ),
}


class _Table:
    """What stands for a DataFrame of one row: layer 1, the last position."""

    columns = ("layer", "pos")

    def __getitem__(self, name: str) -> list[int]:
        return {"layer": [1], "pos": [-1]}[name]


LAST = _Table()


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return build("gpt2")


@pytest.fixture(scope="module")
def alone(model: HookedTransformer) -> dict[str, list[np.ndarray]]:
    return {}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", CASES)
def test_padded_prompts_get_what_they_get_alone(name: str, side: Any, model: HookedTransformer, alone: Any) -> None:
    run = CASES[name]
    if name not in alone:
        alone[name] = [np.asarray(run(model, [row], model.to_batch([row])))[0] for row in ROWS]
    together = run(model, ROWS, model.to_batch(ROWS, padding_side=side))
    for prompt, value in enumerate(alone[name]):
        got = np.asarray(together[prompt])
        if name == "zero slice past the end" or got.shape == value.shape:
            np.testing.assert_allclose(got, value, atol=3e-5, rtol=0, err_msg=f"prompt {prompt}")
        else:
            raise AssertionError((got.shape, value.shape))


def compiled_programs() -> int:
    """How many block programs exist."""
    return _apply_compiled._cache_size()


def test_other_numbers_and_other_prompts_compile_nothing(model: HookedTransformer) -> None:
    batches = [model.to_batch([rows[n] for n in (0, 1)], padding_side="right") for rows in (ROWS, ROWS[::-1])]
    model.run_with_hooks(batches[0], fwd_hooks=[(RESID, tljax.Zero(pos=-1))])
    before = compiled_programs()
    for batch in batches:
        for pos in (0, -2, 1):
            model.run_with_hooks(batch, fwd_hooks=[(RESID, tljax.Zero(pos=pos))])
    assert compiled_programs() == before


def test_without_padding_the_programs_are_those_of_arrays(model: HookedTransformer) -> None:
    hook, batch = (RESID, tljax.Zero(pos=-1)), model.to_batch([ROWS[1], ROWS[1]])
    plain = model.run_with_hooks(batch.tokens, fwd_hooks=[hook])
    before = compiled_programs()
    np.testing.assert_array_equal(plain, model.run_with_hooks(batch, fwd_hooks=[hook]))
    assert compiled_programs() == before


def test_plain_arrays_are_counted_as_they_are(model: HookedTransformer) -> None:
    tokens = np.asarray(model.to_batch(ROWS, padding_side="right").tokens)
    logits, cache = model.run_with_cache(tokens)
    np.testing.assert_array_equal(cache.accumulated_resid(pos_slice=-1)[-1], cache["resid_post", -1][:, -1])
    assert LogitDiff(3, 4)(logits)[0] == logits[0, -1, 3] - logits[0, -1, 4]


def test_under_jit_a_position_that_is_not_there_is_nan(model: HookedTransformer) -> None:
    batch = model.to_batch(ROWS, padding_side="left")

    @jax.jit
    def run(batch: tljax.Batch, pos: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        _, cache = model.run_with_cache(batch)
        logits = model.run_with_hooks(batch, fwd_hooks=[(RESID, tljax.Zero(pos=pos))])
        return cache.accumulated_resid(pos_slice=pos)[-1], cache.accumulated_resid(pos_slice=(1, -1))[-1], logits

    one, several, logits = run(batch, jnp.asarray(-5))
    assert np.isnan(one[0]).all()
    assert np.isnan(logits[0]).any()
    assert np.isfinite(logits[1]).all()
    np.testing.assert_allclose(one[1], model.run_with_cache([ROWS[1]])[1]["resid_post", -1][0, 1], atol=3e-5)
    assert np.isfinite(several).all(axis=-1).sum(axis=-1).tolist() == [len(row) - 2 for row in ROWS]


@pytest.mark.parametrize("side", SIDES)
def test_what_is_filled_is_marked(model: HookedTransformer, side: Any) -> None:
    _, cache = model.run_with_cache(model.to_batch(ROWS, padding_side=side), pos_slice=(1, None))
    assert np.asarray(cache.token_mask).sum(axis=1).tolist() == [len(row) - 1 for row in ROWS]
    assert bool(cache.token_mask[:, -1 if side == "left" else 0].all())
    assert (np.isnan(cache["resid_post", 0]).all(axis=-1) == ~cache.token_mask).all()


def test_generation_counts_in_each_text(model: HookedTransformer) -> None:
    def answer(rows: list[list[int]], hook: tljax.Intervention) -> np.ndarray:
        whole = model.generate(model.to_batch(rows), 2, do_sample=False, stop_at_eos=False, fwd_hooks=[(RESID, hook)])
        return np.asarray(whole)[:, -2:]

    for hook in (tljax.Add(5 * VECTOR, pos=2), tljax.Zero(pos="new")):
        together = answer(ROWS, hook)
        for prompt, row in enumerate(ROWS):
            np.testing.assert_array_equal(together[prompt], answer([row], hook)[0])


def test_metrics_of_logits_say_where_padding_is(model: HookedTransformer) -> None:
    batch, lasts = model.to_batch(ROWS, padding_side="left"), np.array([2, 5])
    logits, metric = model(batch), LogitDiff(3, 4, pos=1)
    alone = [float(metric(model([row]))[0]) for row in ROWS]
    placed = metric.in_text(batch)
    np.testing.assert_allclose(placed(logits), alone, atol=3e-5)
    again = jax.tree.map(lambda leaf: leaf, placed)
    for same in (placed, again, metric):  # a sweep counts once
        result = sweep(model, batch, tljax.Zero(), same, "z", axes=(), layers=[1], reduce="none")
        np.testing.assert_allclose(result.baseline, alone, atol=3e-5)
    each = sweep(model, batch, tljax.Zero(), LogitDiff(3, 4, pos=lasts), "z", axes=(), layers=[1], reduce="none")
    np.testing.assert_allclose(each.baseline, LogitDiff(3, 4)(logits), atol=3e-5)
    right = model.to_batch(ROWS, padding_side="right")
    scale = Normalized(LogitDiff(3, 4), clean=model(right), corrupted=np.float32(0))
    with pytest.raises(InputError, match=r"Normalized took .*in_text\(batch\)"):
        sweep(model, right, tljax.Zero(), scale, "z", axes=(), layers=[1])
    fitting = Normalized(LogitDiff(3, 4).in_text(right), clean=model(right), corrupted=np.zeros(2, np.float32))
    result = sweep(model, right, tljax.Zero(), fitting, "z", axes=(), layers=[1], reduce="none")
    np.testing.assert_allclose(result.baseline, 1, atol=1e-5)


def test_slices_are_those_of_python() -> None:
    mask = np.array([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]], bool)
    for bounds in (slice(None), slice(1, -1), slice(-2, None), slice(None, None, -2), slice(3, 0, -1), slice(-9, 2)):
        chosen = np.asarray(positions.chosen(mask, bounds))
        cut = positions.text_cut(mask, bounds)
        for row in range(3):
            places = np.flatnonzero(mask[row])[bounds]
            assert sorted(places) == np.flatnonzero(chosen[row]).tolist()
            assert np.asarray(cut.places[row])[np.asarray(cut.mask[row])].tolist() == places.tolist()
