"""Negative positions where the mask is known: a position counts in the text."""

import jax
import jax.numpy as jnp
import numpy as np
from table import Case, World

import tljax
from tljax.analysis.direct_logit_attribution import direct_logit_attribution
from tljax.analysis.logit_lens import logit_lens
from tljax.errors import CacheError, InputError, InterventionError
from tljax.patching import KL, LogitDiff, sweep

POINT = "blocks.1.hook_resid_post"


def metric(w: World, **options: object) -> LogitDiff:
    return LogitDiff(w.tiny.to_single_token(" Mary"), w.tiny.to_single_token(" John"), **options)  # type: ignore[arg-type]


def batch(w: World, side: str = "right") -> tljax.Batch:
    return w.tiny.to_batch([w.P, w.S], padding_side=side)  # type: ignore[arg-type]


def last_of_short(w: World, *hooks: tuple[str, object], side: str = "right") -> np.ndarray:
    """The logits after the shorter prompt, run beside the longer one."""
    prompts = batch(w, side)
    logits = np.asarray(w.tiny.run_with_hooks(prompts, fwd_hooks=list(hooks)))
    return logits[1][np.asarray(prompts.mask[1])][-1]


def short(w: World, *hooks: tuple[str, object]) -> np.ndarray:
    return np.asarray(w.tiny.run_with_hooks(w.S, fwd_hooks=list(hooks)))[0, -1]


def cache(w: World, prompts: object) -> tljax.ActivationCache:
    return w.tiny.run_with_cache(prompts)[1]


def traced(w: World, number: int) -> bool:
    """Whether the prompt that lacks a position got NaN for it, and the other one numbers."""
    run = jax.jit(lambda b, n: w.tiny.run_with_hooks(b, fwd_hooks=[(POINT, tljax.Zero(pos=n))]))
    logits = np.asarray(run(batch(w), jnp.asarray(number)))
    return bool(np.isfinite(logits[0]).all() and np.isnan(logits[1][np.asarray(batch(w).mask[1])]).any())


ZERO = (POINT, tljax.Zero(pos=-1))
CASES: tuple[Case, ...] = (
    Case(
        "the last token of a list, hooked",
        lambda w: last_of_short(w, ZERO),
        equals=lambda w: short(w, ZERO),
        tolerance=1e-4,
    ),
    Case(
        "padded left, hooked at 0",
        lambda w: last_of_short(w, (POINT, tljax.Zero(pos=0)), side="left"),
        equals=lambda w: short(w, (POINT, tljax.Zero(pos=0))),
        tolerance=1e-4,
    ),
    Case(
        "a list of texts, hooked",
        lambda w: w.tiny.run_with_hooks([w.P, w.S], fwd_hooks=[ZERO])[1, w.tiny.to_tokens(w.S).shape[1] - 1],
        equals=lambda w: short(w, ZERO),
        tolerance=1e-4,
    ),
    Case(
        "the lens",
        lambda w: logit_lens(w.tiny, [w.P, w.S], top_k=3, pos=-1).top_ids[:, 1],
        equals=lambda w: logit_lens(w.tiny, w.S, top_k=3, pos=-1).top_ids[:, 0],
    ),
    Case(
        "direct attribution",
        lambda w: direct_logit_attribution(w.tiny, [w.P, w.S], " Mary", " John").attribution[:, 1],
        equals=lambda w: direct_logit_attribution(w.tiny, w.S, " Mary", " John").attribution[:, 0],
        tolerance=1e-4,
    ),
    Case(
        "a mean of attributions counts no padding",
        lambda w: (
            direct_logit_attribution(w.tiny, [w.P, w.S], " Mary", pos=None).mean()
            * sum(w.tiny.to_tokens(p).shape[1] for p in (w.P, w.S))
        ),
        equals=lambda w: sum(
            np.asarray(direct_logit_attribution(w.tiny, p, " Mary", pos=None).attribution).sum((1, 2))
            for p in (w.P, w.S)
        ),
        tolerance=1e-2,
    ),
    Case(
        "a cache",
        lambda w: cache(w, batch(w)).accumulated_resid(pos_slice=-1)[:, 1],
        equals=lambda w: cache(w, w.S).accumulated_resid(pos_slice=-1)[:, 0],
        tolerance=1e-4,
    ),
    Case(
        "a metric of a right-padded batch",
        lambda w: sweep(w.tiny, batch(w), tljax.Zero(), metric(w), "z", axes=(), layers=[3], reduce="none").baseline[1],
        equals=lambda w: metric(w)(w.tiny(w.S))[0],
        tolerance=1e-4,
    ),
    Case(
        "a metric of padded logits",
        lambda w: metric(w).in_text(batch(w))(w.tiny(batch(w)))[1],
        equals=lambda w: metric(w)(w.tiny(w.S))[0],
        tolerance=1e-4,
    ),
    Case(
        "a position that one prompt lacks",
        lambda w: w.tiny.run_with_hooks(batch(w), fwd_hooks=[(POINT, tljax.Zero(pos=10))]),
        InterventionError,
        "pos=10",
        "prompt 1",
        "5 tokens",
    ),
    Case(
        "addressed to the prompt that has it",
        lambda w: last_of_short(w, (POINT, tljax.Zero(pos=10, batch=0))),
        equals=short,
        tolerance=1e-4,
    ),
    Case("a position that one prompt lacks, under jit", lambda w: traced(w, 10), equals=True),
    Case(
        "a cut that one prompt lacks",
        lambda w: cache(w, batch(w)).decompose_resid(pos_slice=10),
        CacheError,
        "no position 10 in prompt 1",
    ),
    Case(
        "a run cut where one prompt has nothing",
        lambda w: w.tiny.run_with_cache(batch(w), pos_slice=-12),
        InputError,
        "no position -12 in prompt 1",
    ),
    Case(
        "sites that one prompt lacks",
        lambda w: sweep(w.tiny, batch(w), tljax.Zero(), metric(w), "z", axes=("pos",), at={"pos": [10]}),
        InputError,
        "no position 10 in prompt 1",
    ),
    Case(
        "a metric's position that one prompt lacks",
        lambda w: sweep(w.tiny, batch(w), tljax.Zero(), metric(w, pos=10), "z", axes=()),
        InputError,
        "LogitDiff",
        "no position 10 in prompt 1",
    ),
    Case(
        "a function that reads padding",
        lambda w: sweep(w.tiny, batch(w), tljax.Zero(), lambda logits: logits[:, -1, 5], "z", axes=()),
        InputError,
        "padding",
        "prompt 1",
        "logits[np.arange(batch), last]",
    ),
    Case(
        "a divergence whose base was read at padding",
        lambda w: sweep(w.tiny, batch(w), tljax.Zero(), KL(w.tiny(batch(w))), "z", axes=()),
        InputError,
        "attention_mask=batch.mask",
    ),
    Case(
        "clean prompts of other lengths",
        lambda w: sweep(w.tiny, batch(w), w.tiny.to_batch([w.S, w.P]), metric(w), "z", axes=()),
        InputError,
        "Prompt 0 has 5 tokens",
        "equally many",
    ),
    Case(
        "generation from padded prompts, a position that one will not have",
        lambda w: w.tiny.generate([w.P, w.S], 2, do_sample=False, fwd_hooks=[(POINT, tljax.Zero(pos=14))]),
        InterventionError,
        "pos=14",
        "prompt 1",
    ),
)
