"""The vocabulary is reduced some positions at a time: the numbers of whole logits, which never exist."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import close
from variants import build

from tljax import Batch, HookedTransformer, Replace
from tljax.analysis import TunedLens, lens_divergence, logit_lens
from tljax.dictionaries.evaluation.measuring import measure_losses
from tljax.dictionaries.training.prompts import TokenBatch
from tljax.dictionaries.training.spliced_loss import compared
from tljax.modules import readout
from tljax.modules.context import AttentionContext
from tljax.modules.readout import Readout, by_positions
from tljax.patching import KL, LogitDiff, LogProb, Loss, Normalized, sweep

BATCH, POS, VOCAB = 2, 11, 13
"""Positions that divide by no part's length but 1: the last part is shorter."""
TOKENS = np.random.default_rng(5).integers(0, VOCAB, (BATCH, POS)).astype(np.int32)
MASK = np.arange(POS) < np.array([[POS], [7]])
POINT = "blocks.1.hook_resid_pre"


@pytest.fixture(autouse=True)
def four_positions_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parts of four positions; programs compiled for others are forgotten, before and after."""
    by_positions.clear_cache()
    monkeypatch.setattr(readout, "CPU_BYTES", 4 * BATCH * VOCAB * 4)
    yield
    by_positions.clear_cache()


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return build("soft_caps")


@pytest.fixture(scope="module")
def other(model: HookedTransformer) -> HookedTransformer:
    """Another model of the same shape."""
    return model.replace(
        params=jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), model.params)
    )


def shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """Yields the shape of every array in a program, those of programs inside it included."""
    for equation in jaxpr.eqns:
        yield from (var.aval.shape for var in (*equation.invars, *equation.outvars) if hasattr(var.aval, "shape"))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes(inner)


def most_positions(function: Callable[..., Any], *arguments: Any) -> int:
    """Returns how many positions of all prompts the largest array over the vocabulary has, parameters aside."""
    found = shapes(jax.make_jaxpr(function)(*arguments).jaxpr)
    return max((int(np.prod(shape[:-1])) for shape in found if len(shape) > 2 and shape[-1] == VOCAB), default=0)


def log_softmax(logits: Any) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    largest = wide.max(axis=-1, keepdims=True)
    return wide - largest - np.log(np.exp(wide - largest).sum(axis=-1, keepdims=True))


def test_parts_and_the_rest_are_the_whole(model: HookedTransformer) -> None:
    """Values, and gradients by streams and parameters, of arrays that are split and of those that are cut in place."""
    end = Readout.of(model.cfg, model.params)
    stream = jnp.asarray(np.random.default_rng(0).standard_normal((BATCH, POS, 16)), jnp.float32)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((BATCH, POS, VOCAB)), jnp.float32)

    def parts(end: Readout, stream: Any, weights: Any) -> Any:
        return by_positions(_weighted, end, stream, beside=(weights,)).sum()

    def whole(end: Readout, stream: Any, weights: Any) -> Any:
        return _weighted(end, stream, weights).sum()

    got, expected = (jax.grad(function, (0, 1, 2))(end, stream, weights) for function in (parts, whole))
    jax.tree.map(lambda one, two: close(one, two, atol=1e-5), got, expected)
    close(by_positions(_weighted, end, stream, beside=(weights,)), _weighted(end, stream, weights))
    close(by_positions(_weighted, end, stream, weights, at_once=3), _weighted(end, stream, weights))


def _weighted(end: Readout, stream: jax.Array, weights: jax.Array) -> jax.Array:
    return (jax.nn.softmax(end.logits(stream)) * weights).sum(axis=-1)


@pytest.mark.parametrize("masked", [False, True])
def test_loss(model: HookedTransformer, masked: bool) -> None:
    mask = MASK if masked else np.ones_like(MASK)
    log_probs = log_softmax(model(TOKENS, attention_mask=mask))[:, :-1]
    each = -np.take_along_axis(log_probs, TOKENS[:, 1:, None], -1)[..., 0]
    counted = mask[:, 1:] & mask[:, :-1]

    def loss(params: Any, **options: Any) -> Any:
        return model.replace(params=params)(TOKENS, return_type="loss", attention_mask=mask, **options)

    close(loss(model.params), (each * counted).sum() / counted.sum(), atol=1e-5)
    close(loss(model.params, loss_per_token=True), each * counted, atol=1e-5)

    def by_logits(params: Any) -> Any:
        logits = model.replace(params=params)(TOKENS, attention_mask=mask)
        return model.loss_fn(logits, TOKENS, mask)

    got, again = jax.grad(loss)(model.params), jax.grad(lambda params: loss(params, remat=True))(model.params)
    for found in (got, again):
        jax.tree.map(lambda one, two: close(one, two, atol=1e-5), found, jax.grad(by_logits)(model.params))
    assert most_positions(jax.grad(loss), model.params) == 4 * BATCH
    assert most_positions(jax.grad(by_logits), model.params) >= BATCH * POS


METRICS = {
    "loss": lambda _: Loss(TOKENS),
    "normalised": lambda _: Normalized(Loss(TOKENS), 1.0, 3.0),
    "last": lambda _: LogProb(3),
    "difference": lambda _: LogitDiff([1, 2], [[3, 4], [5, 6]], pos=[-1, 2]),
    "divergence": lambda other: KL.to_run(other, TOKENS),
    "divergence of last": lambda other: KL.to_run(other, TOKENS, pos=-1),
}


@pytest.mark.parametrize("name", METRICS)
def test_gradients_of_declared_metrics(model: HookedTransformer, other: HookedTransformer, name: str) -> None:
    """The numbers are those of the same metric as a function of whole logits; it alone makes these."""
    metric = METRICS[name](other)
    got = model.run_with_grads(TOKENS, metric, POINT, remat=True)
    expected = model.run_with_grads(TOKENS, lambda logits: metric(logits), POINT)
    close(got.value, expected.value, atol=1e-5)
    close(got.grads[POINT], expected.grads[POINT], atol=1e-5)

    def run(tokens: Any, metric: Any) -> Any:
        return dict(model.run_with_grads(tokens, metric, POINT, remat=True).grads)

    last = name in ("last", "difference", "divergence of last")
    assert most_positions(run, TOKENS, metric) <= (BATCH if last else 4 * BATCH)
    assert most_positions(lambda tokens: run(tokens, lambda logits: metric(logits)), TOKENS) >= BATCH * POS


def test_several_metrics_and_a_named_head(model: HookedTransformer, other: HookedTransformer) -> None:
    metrics = {name: make(other) for name, make in METRICS.items()}
    got = model.run_with_grads(TOKENS, metrics, POINT)
    for name, metric in metrics.items():
        close(got.grads[name][POINT], model.run_with_grads(TOKENS, metric, POINT).grads[POINT], atol=1e-5)
    head = model.run_with_grads(TOKENS, metrics, [POINT, "ln_final.hook_normalized"])
    for name in metrics:
        close(head.grads[name][POINT], got.grads[name][POINT], atol=1e-5)
        assert np.asarray(head.grads[name]["ln_final.hook_normalized"]).any()
    moved = model.run_with_jvp(TOKENS, {POINT: np.ones(16, np.float32)}, metrics)
    for name in metrics:
        close(moved.tangent[name], np.asarray(got.grads[name][POINT]).sum((1, 2)), atol=1e-4)


def test_divergence_from_a_run(model: HookedTransformer, other: HookedTransformer) -> None:
    """Over all positions of the text, and at one; with a hook after the blocks; zero to itself."""
    batch = Batch.from_mask(TOKENS, MASK, "right")
    log_p, log_q = (log_softmax(one(batch)) for one in (other, model))
    each = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    logits = model(batch)
    close(KL.to_run(other, batch)(logits), (each * MASK).sum(1) / MASK.sum(1), atol=1e-5)
    close(KL.to_run(other, batch, pos=-1)(logits), each[[0, 1], [10, 6]], atol=1e-5)
    hooked = other.add_hook("ln_final.hook_normalized", lambda x, hook: 2 * x)
    log_p = log_softmax(hooked(batch))
    each = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    close(KL.to_run(hooked, batch)(logits), (each * MASK).sum(1) / MASK.sum(1), atol=1e-5)
    close(KL.to_run(model, batch)(logits), [0, 0], atol=1e-6)


def test_lenses(model: HookedTransformer) -> None:
    """Log-probabilities, entropies and ranks of every depth, and the divergences that a tuned lens lowers."""
    _, cache = model.run_with_cache(TOKENS)
    streams = [cache["resid_pre", 0], cache["resid_pre", 1], cache["resid_post", 1]]
    log_probs = log_softmax(1.5 * np.tanh(np.stack([model.unembed(model.ln_final(one)) for one in streams]) / 1.5))
    found = logit_lens(model, TOKENS, targets=[3, 5], top_k=2)
    own = log_probs[..., [3, 5]]
    close(found.target_log_probs, own, atol=1e-5)
    np.testing.assert_array_equal(found.target_ranks, (log_probs[..., None] > own[..., None, :]).sum(-2))
    close(found.top_log_probs, np.sort(log_probs)[..., :-3:-1], atol=1e-5)
    close(found.entropy, -(np.exp(log_probs) * log_probs).sum(-1), atol=1e-5)
    expected = (np.exp(log_probs[-1]) * (log_probs[-1] - log_probs[:-1])).sum(-1).mean((1, 2))
    close(lens_divergence(model, TOKENS), expected, atol=1e-5)
    close(TunedLens.fit(model, TOKENS, steps=1).losses[0], expected, atol=1e-5)


def test_sweeps(model: HookedTransformer, other: HookedTransformer) -> None:
    """Of patched runs measured together: as of each run's whole logits."""
    corrupted = np.roll(TOKENS, 1)
    metrics = {"loss": Loss(corrupted), "run": KL.to_run(other, TOKENS), "logits": KL(other(TOKENS), pos=None)}
    found = sweep(model, corrupted, TOKENS, metrics, "resid_pre", axes=("pos",))
    _, source = model.run_with_cache(TOKENS, names_filter=POINT)
    patched = model.run_with_hooks(corrupted, fwd_hooks=[(POINT, Replace(source[POINT], pos=POS - 2))])
    for name, metric in metrics.items():
        close(found[name].values[1, POS - 2], np.asarray(metric(patched)).mean(), atol=1e-5, message=name)
    close(found["run"].values, found["logits"].values, atol=1e-5)


def test_dictionaries_are_evaluated_and_trained_by_parts(model: HookedTransformer) -> None:
    end, text = Readout.of(model.cfg, model.params), jnp.asarray(MASK)
    random = np.random.default_rng(2)
    ends = tuple(jnp.asarray(random.standard_normal((BATCH, POS, 16)), jnp.float32) for _ in range(3))
    whole = np.asarray(measure_losses(tuple(map(end.logits, ends)), None, TOKENS, text, text))
    close(measure_losses(ends, end, TOKENS, text, text), whole, atol=1e-5)
    assert most_positions(measure_losses, ends, end, TOKENS, text, text) == BATCH  # three runs: one position at a time
    batch = TokenBatch(jnp.asarray(TOKENS), AttentionContext(), text, text)
    kl, losses = compared(end, *ends[:2], batch)
    close(kl, whole[..., 5].sum() / MASK.sum(), atol=1e-5)
    for name, column in (("ce_original", 2), ("ce_spliced", 3)):
        close(losses[name], whole[..., column].sum() / whole[..., 1].sum(), atol=1e-5)
    assert most_positions(jax.grad(lambda stream: compared(end, ends[0], stream, batch)[0]), ends[1]) == 2 * BATCH
