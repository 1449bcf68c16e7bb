"""Measuring many runs at once gives what calling the metric on each run's logits gives."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from variants import build

from tljax.errors import InputError
from tljax.forward.forward import run_forward
from tljax.hooks.dictionary import HookDictionary
from tljax.modules.context import AttentionContext
from tljax.patching.metrics import evaluation as measure_module
from tljax.patching.metrics.evaluation import Measure, PositionNotKept
from tljax.patching.metrics.metrics import KL, Logit, LogitDiff, LogProb, Loss, Normalized

RUNS, BATCH, POS, VOCAB = 11, 2, 4, 13
MODEL = build("gpt2")
FINALS = np.random.default_rng(5).standard_normal((RUNS, BATCH, POS, 16)).astype(np.float32)
BASE = FINALS[-1]
TOKENS = np.random.default_rng(3).integers(0, VOCAB, (BATCH, POS))


def logits_of(residual: Any) -> jax.Array:
    residual, context = jnp.asarray(residual), AttentionContext()
    return run_forward(MODEL.cfg, MODEL.params, residual, context, hooks=HookDictionary(), start=MODEL.cfg.n_layers)[0]


LOGITS = np.stack([logits_of(run) for run in FINALS])


def measuring(metric: Any, base: Any = BASE, **kwargs: Any) -> Measure:
    return Measure(metric, MODEL.cfg, MODEL.params, base, **kwargs)


def by_hand(metric: Callable[[Any], Any]) -> np.ndarray:
    return np.stack([np.asarray(metric(jnp.asarray(logits))) for logits in LOGITS])


@jax.tree_util.register_pytree_node_class
class Best:
    """A user's metric that takes raw primitives and Python's control flow, so that it neither stays lazy nor traces."""

    def __init__(self, scale: Any) -> None:
        self.scale = scale

    def __call__(self, logits: Any) -> Any:
        best = jax.lax.top_k(logits[:, -1], 1)[0].sum()
        return best * self.scale if best > 0 else -best

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        return (self.scale,), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[Any]) -> "Best":
        return cls(*children)


@jax.jit
def one_logit(logits: Any) -> Any:
    return logits[0, -1, 3]


def branching(logits: Any) -> float:
    difference = logits[0, -1, 3].item() - float(logits[0, -1, 4])
    return difference if difference > 0 else float(logits[1, -1, 5])


def rank(logits: Any) -> int:
    row = np.asarray(logits[0, -1])
    return int((row > row[3]).sum())


METRICS: dict[str, tuple[Callable[[Any], Any], str, tuple[int, ...] | None]] = {
    "LogitDiff": (LogitDiff([3, 4], 5), "compiled", (3,)),
    "LogitDiff at positions": (LogitDiff([3, 4], 5, pos=[1, 2]), "compiled", (1, 2)),
    "LogProb": (LogProb(3, pos=0), "compiled", (0,)),
    "KL": (KL(logits_of(BASE)), "compiled", (3,)),
    "KL everywhere": (KL(logits_of(BASE), pos=None), "compiled", (0, 1, 2, 3)),
    "Loss": (Loss(TOKENS), "compiled", (0, 1, 2)),
    "Normalized": (Normalized(Logit(3), 1.0, 0.0), "compiled", (3,)),
    "Partial": (jax.tree_util.Partial(lambda scale, x: x[:, -1].max(-1) * scale, np.float32(2.0)), "compiled", (3,)),
    "a pytree that does not trace": (Best(np.float32(2)), "plain", (3,)),
    "difference": (lambda x: x[0, -1, 3] - x[0, -1, 4], "replayed", (3,)),
    "for each prompt": (lambda x: x[:, -1, 3] - x[:, -1][np.arange(2), np.asarray([4, 5])], "replayed", (3,)),
    "chained": (lambda x: x[0][-1][3] - x[1, 2][4], "replayed", (2, 3)),
    "python floats": (lambda x: x[0, -1, 3].item() - float(x[0, -1, 4]), "replayed", (3,)),
    "reads as it goes": (branching, "replayed", (3,)),
    "constant": (lambda x: 1.5, "replayed", ()),
    "jitted": (jax.jit(lambda x: x[jnp.arange(2), -1, 3] - x[0, -1, 4]), "batched", (3,)),
    "jitted, position as an array": (jax.jit(lambda x: x[0, jnp.asarray(-1), 3]), "batched", (3,)),
    "float of jitted": (lambda x: float(one_logit(x)), "replayed", (3,)),
    "log_softmax of a row": (lambda x: jax.nn.log_softmax(x[0, -1])[3], "batched", (3,)),
    "log_softmax of all": (lambda x: jax.nn.log_softmax(x)[:, -1, 3], "batched", (0, 1, 2, 3)),
    "mean": (lambda x: x.mean(), "batched", (0, 1, 2, 3)),
    "best token": (lambda x: x[0, -1].argmax() == 3, "batched", (3,)),
    "top_k": (lambda x: jax.lax.top_k(x[0, -1], 2)[0].sum(), "batched", (3,)),
    "primitives": (lambda x: jax.lax.exp(x)[0, -1, 3], "batched", (0, 1, 2, 3)),
    "vmapped": (jax.vmap(lambda row: row[-1, 3]), "batched", (0, 1, 2, 3)),
    "position by value": (lambda x: x[0, jnp.argmax(x[0, :, 3]), 4], "replayed", (0, 1, 2, 3)),
    "position by value of a row": (lambda x: x[0, jnp.argmax(x[0, -1]) % 2, 4], "batched", None),
    "position by value of a row, jitted": (jax.jit(lambda x: x[0, jnp.argmax(x[0, -1]) % 2, 4]), "batched", None),
    "position for each prompt as data": (Logit(3, pos=jnp.asarray([3, 3])), "compiled", (3,)),
    "rows at positions as arrays": (lambda x: x[jnp.arange(2), jnp.asarray([2, 3])].max(-1), "batched", (2, 3)),
    "float": (lambda x: float(jax.nn.log_softmax(x[0, -1])[3]), "plain", (3,)),
    "rank": (rank, "plain", (3,)),
    "numpy": (lambda x: np.asarray(x)[0, -1, 3], "plain", (0, 1, 2, 3)),
}


@pytest.mark.parametrize("name", METRICS)
def test_equals_one_call_a_run(name: str) -> None:
    metric, how, positions = METRICS[name]
    measure = measuring(metric)
    assert (measure.how, measure.positions) == (how, positions)
    expected = by_hand(metric)
    np.testing.assert_allclose(measure(FINALS), expected, atol=3e-5)
    np.testing.assert_allclose(measure.baseline, expected[-1], atol=3e-5)
    assert measure.baseline.dtype == measure(FINALS).dtype == jnp.float32
    np.testing.assert_allclose(measure(jnp.asarray(FINALS[:3])), expected[:3], atol=3e-5)
    if positions is not None and len(positions) == 1:
        kept = positions[0]
        np.testing.assert_allclose(measure(FINALS[:, :, kept : kept + 1], kept), expected, atol=3e-5)
    assert measure(FINALS[:0]).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("name", ["LogProb", "KL everywhere", "difference", "mean", "rank"])
@pytest.mark.parametrize("budget", [1, 20_000])
def test_small_budgets_change_nothing(name: str, budget: int) -> None:
    metric, _, _ = METRICS[name]
    np.testing.assert_allclose(measuring(metric, budget=budget)(FINALS), measuring(metric)(FINALS), atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(*(st.integers(-n, n - 1) for n in (BATCH, POS, VOCAB))), min_size=1, max_size=6), st.data())
def test_any_reads_replay(reads: list[tuple[int, int, int]], data: st.DataObject) -> None:
    def metric(logits: Any) -> float:
        return sum(n * float(logits[index]) for n, index in enumerate(reads))

    runs = data.draw(st.integers(1, RUNS))
    np.testing.assert_allclose(measuring(metric)(FINALS[:runs]), by_hand(metric)[:runs], atol=3e-4)


def test_nothing_compiles_the_second_time(compilations: Any) -> None:
    def sweep(n: int, runs: int) -> None:
        metrics: list[Any] = [
            LogitDiff(n, n + 1),
            LogProb([n, 1]),
            KL(jnp.asarray(LOGITS[n])),
            lambda x: x[0, -1, n] - x[0, -1, n + 1],
            lambda x: float(x[0, 2, n]),
            lambda x: jax.nn.log_softmax(x[0, -1])[n],
            lambda x: float(x[0, -1].max()) * n,
            lambda x: x[:, -1][np.arange(2), np.asarray([n, 2])],
        ]
        for metric in metrics:
            measure = measuring(metric, FINALS[n])
            measure(FINALS[:runs])

    sweep(1, RUNS)
    start = compilations.count
    sweep(2, RUNS)
    sweep(3, RUNS - 1)
    assert compilations.count == start


def test_prompts_of_all_lengths_share_a_program(compilations: Any) -> None:
    def sweep(length: int) -> None:
        for metric in (LogitDiff(3, 4), LogProb([1, 2])):
            measure = measuring(metric, BASE[:, :length])
            measure(FINALS[:, :, length - 1 : length], length - 1)

    sweep(4)
    start = compilations.count
    sweep(3)
    sweep(2)
    assert compilations.count == start


def test_a_function_sees_its_surroundings_change() -> None:
    scale = [1.0]

    def metric(logits: Any) -> Any:
        return logits[0, -1].max() * scale[0]

    before = measuring(metric)(FINALS)
    scale[0] = 2.0
    np.testing.assert_allclose(measuring(metric)(FINALS), 2 * before, rtol=1e-5)


def test_positions_that_were_not_kept() -> None:
    measure = measuring(LogitDiff(3, 4))
    with pytest.raises(PositionNotKept, match=r"Only position 1 was kept, and the metric reads \(3,\)"):
        measure(FINALS[:, :, 1:2], 1)
    with pytest.raises(PositionNotKept, match="reads all"):
        measuring(METRICS["position by value of a row"][0])(FINALS[:, :, 3:], 3)


@pytest.mark.parametrize("always", [[3], [2, 3]])
@pytest.mark.parametrize("jitted", [False, True])
def test_positions_first_read_of_a_patched_run(always: list[int], jitted: bool) -> None:
    threshold = float(LOGITS[-1][0, -1, 3])

    def metric(logits: Any) -> Any:
        total = sum(logits[0, pos, 3] for pos in always)
        if jitted:
            return (
                float(jax.jit(lambda x: x[0, jnp.where(jnp.abs(x[0, 3, 3] - threshold) < 1e-5, 3, 0), 4])(logits))
                + total
            )
        return total if abs(logits[0, 3, 3] - threshold) < 1e-5 else total + logits[0, 0, 4]

    measure = measuring(metric)
    if measure.positions is not None:
        assert measure.positions == tuple(always)
        kept = 3 if len(always) == 1 else None
        with pytest.raises(PositionNotKept):
            measure(FINALS[:, :, 3:] if kept else FINALS, kept)
    assert measure.positions is None
    np.testing.assert_allclose(measure(FINALS), by_hand(metric), atol=1e-5)


def test_whole_logits_of_all_runs_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    chunks = measure_module.chunks

    def noted(*args: int) -> Any:
        for start, size in chunks(*args):
            sizes.append(size)
            yield start, size

    monkeypatch.setattr(measure_module, "chunks", noted)
    row = BATCH * POS * (VOCAB + 2 * 16) * 4
    for metric in (KL(logits_of(BASE), pos=None), lambda x: x.mean()):
        measuring(metric, budget=4 * row)(FINALS)
    assert max(sizes) == 4


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda x: None, r"The metric returned None. A metric returns one number.*return the number"),
        (lambda x: [x[0, -1, 3]], r"The metric returned \[.*\]. A metric returns one number"),
        (lambda x: x[0, -1, 3].item, "The metric returned a .*return the number"),
        (lambda x: x[0, -1], r"an array of shape \(13,\) for 2 prompts. A metric returns .* index the position"),
        (jax.tree_util.Partial(lambda a, x: x, np.float32(1)), r"an array of shape \(2, 4, 13\)"),
        (lambda x: x[0, -1, 3].astype(complex), "complex"),
        (lambda x: x[0, 7, 3], "There is no position 7"),
        (LogitDiff(3, 13), "There is no token 13"),
        (LogitDiff([3, 4, 5], 6), r"shape \(3,\) for 2 prompts"),
        (lambda x: LogProb(3, pos=9)(x), "There is no position 9"),
        ("accuracy", "A metric is a function of the logits.*got 'accuracy'"),
    ],
)
def test_mistakes(metric: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measuring(metric)


def test_a_metrics_own_errors_are_its_own() -> None:
    def wrong(logits: Any) -> Any:
        return {"paris": 3}["rome"] + logits[0, -1, 3]

    for metric in (wrong, jax.tree_util.Partial(lambda n, x: wrong(x), np.float32(1))):
        with pytest.raises(KeyError, match="rome") as caught:
            measuring(metric)
        assert caught.value.__notes__.count("(raised in the metric)") == 1
