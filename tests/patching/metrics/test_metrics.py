"""Metrics equal their definitions, on arrays and on lazy logits, and refuse what they cannot read."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import build

from tljax import HookedTransformer
from tljax.errors import InputError
from tljax.patching.metrics.lazy_logits import LazyLogits
from tljax.patching.metrics.metrics import KL, Logit, LogitDiff, LogProb, Loss, Normalized
from tljax.patching.metrics.reads import Reads

BATCH, POS, VOCAB = 2, 4, 13
RESIDUAL, OTHER = (
    jnp.asarray(np.random.default_rng(seed).standard_normal((BATCH, POS, 16)), jnp.float32) for seed in (1, 2)
)
TOKENS = np.random.default_rng(3).integers(0, VOCAB, (BATCH, POS))
MASK = np.asarray([[1, 1, 1, 0], [1, 1, 1, 1]])


def lazy(residual: jax.Array = RESIDUAL, model: HookedTransformer | None = None, **kwargs: Any) -> LazyLogits:
    model = model or build("gpt2")
    return LazyLogits(model.cfg, model.params, residual, **kwargs)


LOGITS, BASE = np.float64(lazy()), np.float64(lazy(OTHER))
LOG_PROBS, BASE_LOG_PROBS = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (LOGITS, BASE))
DIVERGENCE = (np.exp(BASE_LOG_PROBS) * (BASE_LOG_PROBS - LOG_PROBS)).sum(-1)
LOSSES = -np.take_along_axis(LOG_PROBS[:, :-1], TOKENS[:, 1:, None], -1)[..., 0]

ROWS, EACH = np.arange(2), np.arange(2)[:, None]
LAST = np.asarray([2, 3])
PAIRS = np.asarray([[3, 5], [1, 2]])
TEXT = MASK[:, 1:]
CASES: dict[str, tuple[Callable[[], Any], Any]] = {
    "one pair": (lambda: LogitDiff(3, 4), LOGITS[:, -1, 3] - LOGITS[:, -1, 4]),
    "a pair for each prompt": (
        lambda: LogitDiff([3, 5], jnp.asarray([4, 0]), 1),
        LOGITS[ROWS, 1, [3, 5]] - LOGITS[ROWS, 1, [4, 0]],
    ),
    "several answers": (lambda: LogitDiff(PAIRS, 4), LOGITS[EACH, -1, PAIRS].mean(-1) - LOGITS[:, -1, 4]),
    "a position for each prompt": (
        lambda: LogitDiff(3, [4, 5], pos=LAST),
        LOGITS[ROWS, LAST, 3] - LOGITS[ROWS, LAST, [4, 5]],
    ),
    "logit": (lambda: Logit(np.int64(3), pos=-2), LOGITS[:, -2, 3]),
    "log prob": (lambda: LogProb([3, 4]), LOG_PROBS[ROWS, -1, [3, 4]]),
    "log prob at positions": (
        lambda: LogProb(PAIRS.tolist(), pos=jnp.asarray(LAST)),
        LOG_PROBS[EACH, LAST[:, None], PAIRS].mean(-1),
    ),
    "kl": (lambda: KL(jnp.asarray(BASE, jnp.float32)), DIVERGENCE[:, -1]),
    "kl of log probs": (lambda: KL(jnp.asarray(BASE_LOG_PROBS, jnp.float32), pos=1), DIVERGENCE[:, 1]),
    "kl of rows": (lambda: KL(np.float32(BASE[:, -1])), DIVERGENCE[:, -1]),
    "kl of lazy logits": (lambda: KL(lazy(OTHER), pos=LAST), DIVERGENCE[ROWS, LAST]),
    "kl everywhere": (lambda: KL(lazy(OTHER), pos=None), DIVERGENCE.mean(-1)),
    "kl where text": (lambda: KL(lazy(OTHER), None, MASK), (DIVERGENCE * MASK).sum(-1) / MASK.sum(-1)),
    "loss": (lambda: Loss(TOKENS), LOSSES.mean(-1)),
    "loss where text": (lambda: Loss(TOKENS, jnp.asarray(MASK)), (LOSSES * TEXT).sum(-1) / TEXT.sum(-1)),
    "normalized": (lambda: Normalized(Logit(3), 2.0, np.asarray([1.0, 3.0])), (LOGITS[:, -1, 3] - [1, 3]) / [1, -1]),
    "normalized by runs": (
        lambda: Normalized(Logit(3), lazy(OTHER), jnp.zeros((2, 4, 13))),
        LOGITS[:, -1, 3] / BASE[:, -1, 3],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_its_definition(name: str) -> None:
    make, expected = CASES[name]
    metric = make()
    for logits in (jnp.asarray(LOGITS, jnp.float32), np.float32(LOGITS), lazy()):
        value = metric(logits)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected, atol=2e-5)
    compiled = jax.jit(lambda metric, residual: metric(lazy(residual)))(metric, RESIDUAL)
    np.testing.assert_allclose(compiled, expected, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_reads_what_it_says(name: str) -> None:
    make, _ = CASES[name]
    metric, reads = make(), Reads()
    metric(lazy(reads=reads))
    pos = metric.metric.pos if isinstance(metric, Normalized) else getattr(metric, "pos", None)
    if pos is None:
        assert len(reads.positions or ()) == POS - isinstance(metric, Loss)
    else:
        assert reads.positions == tuple(np.unique(np.asarray(pos) % POS))
    whole_rows = isinstance(metric, LogProb | KL | Loss)
    assert (reads.elements(VOCAB) >= VOCAB) == whole_rows


def test_numbers_are_data(compilations: Any) -> None:
    measure = jax.jit(lambda metric, residual: metric(lazy(residual)))
    makes: list[Callable[[int], Any]] = [
        lambda n: LogitDiff(n, n + 1),
        lambda n: LogitDiff([n, 1], [[n, 2], [3, 4]], [0, n]),
        lambda n: LogProb(np.int64(n)),
        lambda n: KL(jnp.asarray(LOGITS + n, jnp.float32)),
        lambda n: Loss((TOKENS + n) % VOCAB),
        lambda n: Normalized(Logit(n), float(n), 0),
    ]
    for make in makes:
        make(1)
        measure(make(1), RESIDUAL)
    for make in makes:
        metric = make(2)
        start = compilations.count
        measure(metric, RESIDUAL)
        assert compilations.count == start


def test_signs() -> None:
    clean, corrupted = LOGITS[:1], LOGITS[:1] + 5 * np.eye(VOCAB)[4]
    run = {name: jnp.asarray(logits, jnp.float32) for name, logits in {"clean": clean, "corrupted": corrupted}.items()}
    for metric, sign in ((LogitDiff(3, 4), 1), (LogProb(3), 1), (KL(run["clean"]), -1)):
        assert sign * float((metric(run["clean"]) - metric(run["corrupted"]))[0]) > 0


def test_divergence_from_impossible_tokens_is_finite() -> None:
    base = jnp.asarray([[[0.0, -jnp.inf]]])
    np.testing.assert_allclose(KL(base)(jnp.zeros((1, 1, 2))), np.log(2), rtol=1e-6)


def test_narrow_logits_are_measured_in_float32() -> None:
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    for metric in (LogitDiff(3, 4), LogProb(3), KL(logits), Loss(TOKENS), Normalized(Logit(3), 1.0, 0.0)):
        assert metric(logits).dtype == jnp.float32


def test_goes_through_tree_functions() -> None:
    metric = Normalized(LogitDiff([3, 4], 5, pos=LAST), 1.0, 0.0)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(metric)]
    assert names == [".metric.answer", ".metric.wrong", ".metric.pos", ".clean", ".corrupted"]
    assert [leaf.tolist() for leaf in jax.tree.leaves(LogitDiff(3, 4, pos=2))] == [3, 4]
    tiled = jax.tree.map(lambda leaf: leaf, metric)
    np.testing.assert_array_equal(tiled(lazy()), metric(lazy()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: LogitDiff(" Paris", 3), r"answer=...\) got ' Paris'; it takes token ids.*_token\(' Paris'\)"),
        (lambda x: LogitDiff(1, [" Rome", " Oslo"]), r"wrong=.*to_single_token\(' Rome'\)"),
        (lambda x: Logit(3.0), "got 3.0; it takes token ids"),
        (lambda x: Logit(13)(x), r"no token 13 in these logits.* 13 tokens.*to_single_token"),
        (lambda x: LogProb(-1)(x), "got the token id -1; ids run from 0 to 12"),
        (lambda x: Logit(3, pos=4)(x), "no position 4 in these logits: they have 4 positions"),
        (lambda x: Logit(3, pos=-5)(x), "no position -5"),
        (lambda x: LogProb(3, pos=[0, 9])(x), "no position 9"),
        (lambda x: Logit(3, pos=[0, 1, 2])(x), "got 3 positions for 2 prompts"),
        (lambda x: Logit(3, pos=None)(x), r"Logit\(pos=...\) got None"),
        (lambda x: Logit([1, 2, 3])(x), r"shape \(3,\) for 2 prompts: give one id, one for each prompt \[2\]"),
        (lambda x: Logit(3)(x[0]), r"logits of 2 axes; it takes \[batch, pos, d_vocab\]"),
        (lambda x: KL(jnp.zeros((2, 3, 13)), None)(x), r"KL compares logits .* base's \(2, 3, 13\)"),
        (lambda x: KL(jnp.zeros((3, 13)))(x), r"base's \(3, 13\)"),
        (lambda x: KL(jnp.zeros(13)), "got an array of 1 axes; give the logits of a run"),
        (lambda x: KL(jnp.zeros((2, 3, 13)), pos=3), "no position 3"),
        (lambda x: Loss(TOKENS[:, :3])(x), r"has shape \(2, 3\); the logits are of 2 prompts of 4 tokens"),
        (lambda x: Loss(TOKENS + VOCAB)(x), "There is no token"),
        (lambda x: Loss(TOKENS, MASK[:1])(x), r"attention mask has shape \(1, 4\); these prompts need \(2, 4\)"),
        (lambda x: Normalized(Logit(3), 1.0, 1.0), "same metric for the clean and the corrupted run"),
    ],
)
@pytest.mark.parametrize("make", [lambda: jnp.asarray(LOGITS, jnp.float32), lazy], ids=["array", "lazy"])
def test_mistakes(make: Callable[[], Any], call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(make())
