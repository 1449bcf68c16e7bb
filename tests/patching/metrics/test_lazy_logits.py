"""Lazy logits are the logits, whatever is read of them and however."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from variants import VARIANTS, build

from tljax import HookedTransformer
from tljax.errors import InputError
from tljax.forward.forward import run_forward
from tljax.hooks.dictionary import HookDictionary
from tljax.modules.context import AttentionContext
from tljax.patching.metrics import lazy_logits
from tljax.patching.metrics.lazy_logits import LazyLogits
from tljax.patching.metrics.reads import PositionNotKept, Reads

SHAPE = BATCH, POS, VOCAB = (2, 4, 13)
MODEL = build("gpt2")
RESIDUAL = jnp.asarray(np.random.default_rng(5).standard_normal((BATCH, POS, 16)), jnp.float32)


def logits_of(model: HookedTransformer, residual: jax.Array = RESIDUAL) -> jax.Array:
    return run_forward(
        model.cfg, model.params, residual, AttentionContext(), hooks=HookDictionary(), start=model.cfg.n_layers
    )[0]


FULL = logits_of(MODEL)


def lazy(**kwargs: Any) -> LazyLogits:
    return LazyLogits(MODEL.cfg, MODEL.params, RESIDUAL, **kwargs)


def assert_same(got: Any, expected: Any) -> None:
    assert got.shape == expected.shape
    np.testing.assert_allclose(np.asarray(got), expected, atol=2e-5)


def along_one_axis(size: int) -> st.SearchStrategy[Any]:
    numbers = st.integers(-size, size - 1)
    arrays = hnp.arrays(np.int64, hnp.array_shapes(max_dims=2, max_side=3), elements=numbers)
    masks = hnp.arrays(bool, (size,))
    kinds = [numbers, numbers.map(np.int32), numbers.map(jnp.int32), st.slices(size), arrays, arrays.map(jnp.asarray)]
    return st.one_of(*kinds, st.lists(numbers, max_size=3), masks, st.none(), st.just(Ellipsis), st.just(slice(None)))


INDEX = st.tuples(*map(along_one_axis, SHAPE)) | st.tuples(*map(along_one_axis, SHAPE[:2])) | along_one_axis(BATCH)


def by_numpy(array: Any, index: Any) -> Any:
    def plain(part: Any) -> Any:
        if isinstance(part, list):
            return np.asarray(part, np.int64)
        return np.asarray(part) if isinstance(part, jax.Array) else part

    return array[tuple(map(plain, index))] if isinstance(index, tuple) else array[plain(index)]


@settings(max_examples=150, deadline=None)
@given(INDEX)
def test_any_index_reads_what_the_array_would(index: Any) -> None:
    try:
        expected = by_numpy(np.asarray(FULL), index)
    except IndexError:  # indices that do not broadcast, or two ellipses
        return
    assert_same(lazy()[index], expected)
    assert_same(lazy(views=False)[index], expected)


def test_many_elements_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_logits, "FEW", 0)
    reads = Reads()
    for index in np.s_[:, [3, -2], [3, 4]], np.s_[1, :, [3, 4, 3]], np.s_[:, -1, np.arange(VOCAB) > 5], np.s_[0, 1, 2]:
        assert_same(lazy(reads=reads)[index], FULL[index])
    assert all(read.tokens is None for read in reads.known.values())


@settings(max_examples=40, deadline=None)
@given(along_one_axis(BATCH), along_one_axis(VOCAB), along_one_axis(VOCAB))
def test_indices_of_views(first: Any, last: Any, index: Any) -> None:
    for chain in ((first, (..., last)), (0, -1, index), ((slice(None), 1), (0, index)), (slice(1, None), (0, 2), last)):
        try:
            expected: Any = np.asarray(FULL)
            for part in chain:
                expected = by_numpy(expected, part)
        except IndexError:
            continue
        got: Any = lazy()
        for part in chain:
            got = got[part]
        assert_same(got, expected)


@pytest.mark.parametrize("kind", [kind for kind in VARIANTS if kind not in ("local", "bidirectional")])
def test_every_kind_of_head(kind: str) -> None:
    model = build(kind)
    logits = LazyLogits(model.cfg, model.params, RESIDUAL)
    full = logits_of(model)
    assert_same(logits, full)
    assert_same(logits[0, -1, 3], full[0, -1, 3])
    assert_same(logits[:, 1, [3, 4]], full[:, 1, jnp.asarray([3, 4])])


def test_narrow_models_keep_their_dtype() -> None:
    model = build("gpt2", dtype="bfloat16")
    residual = RESIDUAL.astype(jnp.bfloat16)
    logits, full = LazyLogits(model.cfg, model.params, residual), logits_of(model, residual)
    assert logits.dtype == full.dtype == logits[0, -1, 3].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(logits[:, :, [3, 4]]), np.float32(full[:, :, 3:5]), atol=0.05)


def test_shapes_cost_nothing(compilations: Any) -> None:
    logits = lazy()
    assert (logits.shape, logits.ndim, logits.size, len(logits)) == (SHAPE, 3, BATCH * POS * VOCAB, BATCH)
    assert (logits[:, -1].shape, logits[0].shape, len(logits[0]), logits[0, -1].ndim) == ((2, 13), (4, 13), 4, 1)
    assert repr(logits[0]) == "LazyLogits(shape=(4, 13), dtype=float32)"
    assert compilations.count == 0


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "log_softmax": jax.nn.log_softmax,
    "max": jnp.max,
    "argmax": lambda x: x.argmax(-1),
    "mean": lambda x: x.mean(),
    "astype": lambda x: x.astype(jnp.bfloat16),
    "at": lambda x: x.at[0].set(0.0),
    "numpy": np.asarray,
    "tolist": lambda x: np.asarray(x.tolist()),
    "minus": lambda x: x - FULL,
    "minus_itself": lambda x: x - x,
    "right_minus": lambda x: FULL - x,
    "numpy_minus": lambda x: np.ones(SHAPE, np.float32) - x,
    "power": lambda x: 2.0**-x,
    "matmul": lambda x: x @ jnp.ones((VOCAB, 2)),
    "greater": lambda x: x > 0,
    "equal": lambda x: x == x,
    "abs": abs,
    "take": lambda x: jnp.take_along_axis(x, jnp.zeros((BATCH, POS, 1), jnp.int32), axis=-1),
    "where": lambda x: jnp.where(x > 0, x, 0.0),
    "stack": lambda x: jnp.stack([x, x]),
    "einsum": lambda x: jnp.einsum("bpv->b", x),
    "iteration": lambda x: jnp.stack([row[-1, 3] for row in x]),
    "logsumexp": jax.scipy.special.logsumexp,
    "rows": lambda x: jax.nn.softmax(x[:, -1]),
    "numpy's functions": lambda x: np.logaddexp.reduce(np.exp(x), axis=-1),
    "device_get": lambda x: np.asarray(jax.device_get(x)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_acts_as_an_array(name: str) -> None:
    function = FUNCTIONS[name]
    expected = function(FULL)
    assert_same(jnp.asarray(function(lazy())).astype(float), jnp.asarray(expected).astype(float))
    if name in ("numpy", "numpy's functions", "tolist", "device_get"):
        return
    traced = jax.jit(lambda residual: function(LazyLogits(MODEL.cfg, MODEL.params, residual)))(RESIDUAL)
    assert_same(traced.astype(float), expected.astype(float))


def test_stays_lazy_through_jit_vmap_and_grad() -> None:
    answers = jnp.asarray([3, 4])

    def metric(logits: Any) -> Any:
        return logits[jnp.arange(BATCH), -1, answers] - logits[:, 0][:, 7]

    expected = metric(FULL)
    program = jax.jit(metric)
    assert_same(program(lazy()), expected)
    assert f"{BATCH},{POS},{VOCAB}" not in str(jax.make_jaxpr(metric)(lazy()))
    stack = jnp.stack([RESIDUAL, -RESIDUAL])
    mapped = jax.vmap(lambda residual: program(LazyLogits(MODEL.cfg, MODEL.params, residual)))(stack)
    assert_same(mapped[0], expected)

    def total(residual: jax.Array, make: Any) -> jax.Array:
        return metric(make(residual)).sum()

    gradients = [
        jax.grad(total)(RESIDUAL, make)
        for make in (lambda r: LazyLogits(MODEL.cfg, MODEL.params, r), lambda r: logits_of(MODEL, r))
    ]
    assert_same(gradients[0], gradients[1])


def test_traced_indices() -> None:
    @jax.jit
    def read(batch: Any, pos: Any, tokens: Any) -> Any:
        logits = lazy()
        return logits[batch, pos, tokens], logits[0, 1:][pos, tokens], logits[:, pos]

    for got, expected in zip(
        read(1, -1, np.asarray([3, -1])), (FULL[1, -1, [3, -1]], FULL[0, -1, [3, -1]], FULL[:, -1]), strict=True
    ):
        assert_same(got, expected)


def test_other_indices_and_chains_compile_nothing(compilations: Any) -> None:
    logits = lazy()

    def run(prompt: int, pos: int, token: int) -> None:
        logits[prompt, pos, token], logits[prompt][pos][token], logits[:, pos, [token, 0]], logits[[prompt], pos]

    run(0, -1, 3)
    start = compilations.count
    run(1, 2, 7)
    run(np.int64(0), jnp.int32(1), np.int32(-1))
    assert compilations.count == start


def test_one_kept_position() -> None:
    for kept in (2, 3):
        logits = LazyLogits(MODEL.cfg, MODEL.params, RESIDUAL[:, kept : kept + 1], length=POS, kept=kept)
        assert logits.shape == SHAPE
        assert_same(logits[0, kept, 3], FULL[0, kept, 3])
        assert_same(logits[:, kept - POS], FULL[:, kept])
        assert_same(logits[:, kept : kept + 1, :2], FULL[:, kept : kept + 1, :2])
        assert_same(logits[[0, 1], [kept, kept - POS], [3, 4]], FULL[jnp.arange(2), kept, jnp.asarray([3, 4])])
        reads: list[Callable[[Any], Any]] = [
            lambda x: x[0, 0, 3], lambda x: x[:, [2, 3]].max(), jnp.max, lambda x: x[0].max(), lambda x: x[0, :, 3],
        ]  # fmt: skip
        for read in reads:
            with pytest.raises(PositionNotKept, match=f"other positions than {kept}"):
                read(logits)


def test_recording() -> None:
    def reads(metric: Callable[[Any], Any]) -> Reads:
        recorder = Reads()
        metric(lazy(reads=recorder))
        return recorder

    answers = np.asarray([3, 4])
    last = reads(lambda x: x[0, -1, 3] - x[:, -1][jnp.arange(2), answers])
    assert (last.positions, last.elements(VOCAB)) == ((3,), 3)
    assert reads(lambda x: x[0][-2][3]).positions == (2,)
    assert reads(lambda x: x[..., -1, :].max() / x.shape[1]).positions == (3,)
    assert reads(lambda x: x[:, 1:].sum()).positions == (1, 2, 3)
    assert reads(lambda x: x[:, -1].argmax()).elements(VOCAB) == BATCH * VOCAB
    assert reads(lambda x: jnp.argmax(x[:, -1])).elements(VOCAB) == BATCH * VOCAB
    assert reads(lambda x: jnp.asarray(x)).positions == (0, 1, 2, 3)
    assert reads(lambda x: x[None, :, 2].max()).positions == (2,)
    assert reads(lambda x: jax.jit(lambda x: x[0, 0, 0])(x)).jitted
    traced = reads(lambda x: jax.jit(lambda i: x[0, 1, i])(3))
    assert (traced.positions, traced.known) == ((1,), {})
    assert reads(lambda x: jax.jit(lambda i: x[0, i, 3])(3)).positions is None


def test_known_values_are_not_computed() -> None:
    recorder = Reads()
    first = lazy(reads=recorder)

    def metric(logits: Any) -> Any:
        return logits[0, -1, 3] - logits[:, 1][0][4] + logits[:, 1, [2, 3]].sum()

    expected = metric(first)
    known = {
        key: FULL[read.prompts, read.positions, slice(None) if read.tokens is None else read.tokens]
        for key, read in recorder.known.items()
    }
    replayed = LazyLogits(MODEL.cfg, MODEL.params, jnp.full_like(RESIDUAL, jnp.nan), known=known)
    np.testing.assert_allclose(metric(replayed), expected, atol=1e-5)
    np.testing.assert_allclose(jax.jit(metric)(replayed), expected, atol=1e-5)
    assert np.isnan(replayed[0, -1, 5])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ((0, 4, 3), "There is no position 4 in these logits: they have 4 positions, so the last is 3. Positions count"),
        ((0, -5), "There is no position -5"),
        ((0, [0, 9], 3), "There is no position 9"),
        ((2,), "There is no prompt 2 in these logits: they have 2 prompts"),
        ((0, -1, 13), r"There is no token 13 .* model.to_single_token\(' word'\) gives the id"),
        ((None, 0, -1, [3, 99]), "There is no token 99"),
        ((0, -1, " Paris"), "indexed with ' Paris'; indices are numbers, slices and masks. model.to_single_token"),
        ((0, -1, 3.0), "indexed with 3.0"),
        ((0, -1, 3, 3), "have 3 axes, and were indexed with 4 indices"),
        ((..., ...), "more than one ..."),
        ((0, -1, np.ones(5, bool)), r"a mask of shape \(5,\), along axes of \(13,\)"),
    ],
)
def test_mistakes(index: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        lazy()[index]


def test_assignment_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"logits.at\[index\].set\(value\)"):
        lazy()[0, -1] = 0.0  # type: ignore[index]
    with pytest.raises(AttributeError, match="no attribute 'gather'"):
        lazy().gather(3)
