"""Sampling against exact distributions, HuggingFace's processors, and every refusal by its message."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tljax.errors import InputError
from tljax.generation import sampling as module
from tljax.generation.sampling import Sampling, count_tokens, next_tokens, read_sampling, sample_logits

LOGITS = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0], np.float32)
TEXT = np.array([0, 0, 2, 5, 0], np.int32)
DRAWS = 6000
CHI_SQUARE = [0, 15.14, 18.42, 21.11, 23.51, 25.74, 27.86]  # exceeded once in 10,000, by degrees of freedom

draw = jax.jit(next_tokens)


def keys_of(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def penalties_of(batch: int, d_vocab: int = 7) -> tuple[jax.Array, jax.Array]:
    counts = jnp.tile(count_tokens(jnp.asarray(TEXT[None]), d_vocab), (batch, 1))
    return counts, counts > 0


def exact(logits, temperature=1.0, top_k=None, top_p=None, freq_penalty=0.0, repetition_penalty=1.0) -> np.ndarray:
    """The distribution, by sorting, in float64."""
    scores = np.asarray(logits, np.float64)
    counts = np.bincount(TEXT, minlength=len(scores))
    penalised = np.where(scores > 0, scores / repetition_penalty, scores * repetition_penalty)
    scores = np.where(counts > 0, penalised, scores) / temperature - freq_penalty * counts
    if top_k is not None:
        scores = np.where(scores >= np.sort(scores)[-top_k], scores, -np.inf)
    probs = np.exp(scores - scores.max())
    probs /= probs.sum()
    if top_p is not None:
        order = np.argsort(-probs, kind="stable")
        dropped = order[1:][np.cumsum(probs[order])[:-1] >= top_p]
        probs[dropped] = 0
    return probs / probs.sum()


def weights_of(logits: np.ndarray, counts: np.ndarray | None = None, **options) -> np.ndarray:
    """The probabilities that tljax draws with, of one row."""
    weights = np.asarray(_weights(logits, counts, read_sampling(len(logits), **options)), np.float64)
    return weights / weights.sum()


@jax.jit
def _weights(logits, counts, sampling):
    seen = None if counts is None else counts > 0
    return module._weights(module._scores(logits, counts, seen, sampling), sampling)


def assert_fits(tokens: jax.Array, probs: np.ndarray) -> None:
    observed = np.bincount(np.asarray(tokens), minlength=len(probs))
    assert observed[probs == 0].sum() == 0
    expected = probs[probs > 0] * len(tokens)
    statistic = ((observed[probs > 0] - expected) ** 2 / expected).sum()
    assert statistic <= CHI_SQUARE[len(expected) - 1]


# Distributions


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 100},
        {"top_p": 0.7},
        {"top_p": 1e-6},
        {"top_k": 4, "top_p": 0.75},
        {"freq_penalty": 0.4},
        {"freq_penalty": -0.2},
        {"repetition_penalty": 1.6},
        {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "freq_penalty": 0.3, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(options):
    counts, seen = penalties_of(DRAWS)
    logits = jnp.tile(jnp.asarray(LOGITS), (DRAWS, 1))
    tokens = draw(logits, read_sampling(7, **options), counts, seen, keys_of(DRAWS))
    assert tokens.dtype == jnp.int32
    assert tokens.shape == (DRAWS,)
    assert_fits(tokens, exact(LOGITS, **{**options, **({"top_k": 7} if options.get("top_k", 0) > 7 else {})}))


def test_draws_over_several_blocks_follow_the_exact_distribution():
    logits = np.full(1000, -np.inf, np.float32)
    logits[[0, 127, 128, 555, 999]] = [0.0, 1.0, 0.5, -1.0, 0.3]
    tokens = draw(jnp.tile(jnp.asarray(logits), (DRAWS, 1)), read_sampling(1000), None, None, keys_of(DRAWS))
    assert_fits(tokens, exact(logits))


def test_a_token_without_probability_is_never_drawn():
    logits = np.where(np.arange(400) % 2, 0.0, -np.inf).astype(np.float32)
    tokens = draw(jnp.tile(jnp.asarray(logits), (DRAWS, 1)), read_sampling(400), None, None, keys_of(DRAWS))
    assert (np.asarray(tokens) % 2 == 1).all()
    assert len(np.unique(tokens)) == 200


# HuggingFace's processors


def huggingface(logits: np.ndarray, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0) -> np.ndarray:
    steps = [RepetitionPenaltyLogitsProcessor(repetition_penalty), TemperatureLogitsWarper(temperature)]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p else []
    scores = torch.from_numpy(logits)[None]
    for step in steps:
        scores = step(torch.from_numpy(TEXT.astype(np.int64))[None], scores)
    return torch.softmax(scores.double(), -1)[0].numpy()


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 50},
        {"top_k": 1500},
        {"top_p": 0.9},
        {"top_p": 0.2},
        {"top_k": 50, "top_p": 0.7},
        {"top_k": 1500, "top_p": 0.7},
        {"temperature": 0.7, "top_k": 300, "top_p": 0.93, "repetition_penalty": 1.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("ties", [False, True])
def test_distribution_equals_huggingface(options, ties):
    generator = np.random.default_rng(3)
    for scale in (0.5, 2.0, 6.0):
        logits = generator.normal(0, scale, 3000).astype(np.float32)
        if ties:
            logits = np.round(logits * 4) / 4
        ours = weights_of(logits, np.bincount(TEXT, minlength=3000).astype(np.int32), **options)
        theirs = huggingface(logits, **options)
        if ties and "top_p" in options:  # HuggingFace's sort decides which of equal tokens are kept
            ours, theirs = np.sort(ours), np.sort(theirs)
        np.testing.assert_array_equal(ours > 0, theirs > 0)
        np.testing.assert_allclose(ours, theirs, rtol=2e-5)


def test_ties_at_top_k_are_all_kept_even_beyond_the_limit():
    assert (weights_of(np.zeros(300, np.float32), top_k=2) > 0).all()
    half = weights_of(np.zeros(300, np.float32), top_k=2, top_p=0.5)
    np.testing.assert_array_equal(half > 0, np.arange(300) < 150)


def test_ties_at_top_p_keep_the_first():
    logits = np.log(np.array([0.1, 0.2, 0.2, 0.3, 0.2], np.float32))
    np.testing.assert_allclose(weights_of(logits, top_p=0.6), np.array([0, 2, 2, 3, 0]) / 7, rtol=1e-5)


@pytest.mark.parametrize("options", [{"top_p": 0.8}, {"top_k": 20, "top_p": 0.8}, {"top_k": 1100, "top_p": 0.8}])
def test_rows_one_by_one_equal_rows_at_once(options):
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 2, (8, 1200)), jnp.float32)
    sampling, keys = read_sampling(1200, **options), keys_of(8)
    at_once = jax.jit(jax.vmap(lambda row, key: module._next_token(sampling, (row, None, None, key))))(logits, keys)
    np.testing.assert_array_equal(draw(logits, sampling, None, None, keys), at_once)


# Greedy


@pytest.mark.parametrize("options", [{"temperature": 0}, {"do_sample": False, "top_k": 3, "top_p": 0.5}])
def test_greedy_takes_the_first_largest_and_needs_no_key(options):
    sampling = read_sampling(4, **options)
    assert sampling == Sampling(None, None, None, None, None)
    logits = jnp.array([[0.0, 3.0, 3.0, -1.0], [5.0, 3.0, 3.0, -1.0]])
    assert draw(logits, sampling, None, None, None).tolist() == [1, 0]


def test_penalties_apply_to_greedy():
    logits = jnp.array([[3.0, 2.5, 2.8, 0.0, 0.0, 2.7]])
    tokens = TEXT[None]  # 0 three times, 2 and 5 once
    assert sample_logits(logits, temperature=0).tolist() == [0]
    assert sample_logits(logits, temperature=0, freq_penalty=0.15, tokens=tokens).tolist() == [2]
    assert sample_logits(logits, temperature=0, repetition_penalty=1.3, tokens=tokens).tolist() == [1]
    negative = jnp.array([[-1.0, -1.2, -9.0, -9.0, -9.0, -9.0]])
    assert sample_logits(negative, temperature=0, repetition_penalty=1.3, tokens=tokens).tolist() == [1]


# Keys


@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.9}])
def test_draws_are_reproducible_and_depend_on_the_row_alone(options):
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 1, (6, 300)), jnp.float32)
    sampling, keys = read_sampling(300, **options), keys_of(6)
    tokens = draw(logits, sampling, None, None, keys)
    np.testing.assert_array_equal(draw(logits, sampling, None, None, keys), tokens)
    np.testing.assert_array_equal(draw(logits[2:4], sampling, None, None, keys[2:4]), tokens[2:4])
    assert tokens.tolist() != draw(logits, sampling, None, None, keys_of(6, seed=1)).tolist()
    equal = jnp.tile(logits[:1], (6, 1))
    assert len(np.unique(draw(equal, sampling, None, None, keys))) > 1


def test_sample_logits_seeds_and_keys():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 1, (6, 300)), jnp.float32)
    default = sample_logits(logits)
    np.testing.assert_array_equal(default, sample_logits(logits, seed=0))
    np.testing.assert_array_equal(default, sample_logits(logits, key=jax.random.key(0)))
    np.testing.assert_array_equal(default, sample_logits(logits, key=jax.random.key_data(jax.random.key(0))))
    np.testing.assert_array_equal(default[:2], sample_logits(logits[:2]))
    assert default.tolist() != sample_logits(logits, seed=1).tolist()
    single = sample_logits(np.asarray(logits[0]), repetition_penalty=1.1, tokens=[1, 2])
    assert single.shape == ()
    assert single == sample_logits(logits, repetition_penalty=1.1, tokens=np.tile([1, 2], (6, 1)))[0]


# Compilation and transformations


@pytest.mark.parametrize("first", [{"top_k": 3}, {"top_p": 0.4}, {"top_k": 3, "top_p": 0.4}])
def test_other_numbers_compile_nothing(compilations, first):
    logits, (counts, seen) = jnp.tile(jnp.asarray(LOGITS), (3, 1)), penalties_of(3)
    keys = keys_of(3)
    on = {"temperature": 0.9, "freq_penalty": 0.1, "repetition_penalty": 1.1}
    draw(logits, read_sampling(7, **on, **first), counts, seen, keys)
    sample_logits(logits, **on, **first, tokens=np.tile(TEXT, (3, 1)))
    before = compilations.count
    other = {"temperature": 2, "freq_penalty": 1.5, "repetition_penalty": 3.0}
    changed = {name: {"top_k": 6, "top_p": 0.8}[name] for name in first}
    draw(logits, read_sampling(7, **other, **changed), counts, seen, keys)
    sample_logits(logits, **other, **changed, tokens=np.tile(TEXT, (3, 1)), seed=5)
    assert compilations.count == before


def test_what_is_off_is_structure():
    off = read_sampling(50, freq_penalty=0.0, repetition_penalty=1, top_p=1.0, top_k=None)
    assert (off.top_k, off.top_p, off.freq_penalty, off.repetition_penalty) == (None, None, None, None)
    assert len(jax.tree.leaves(off)) == 1
    big = read_sampling(50257, top_k=65, top_p=0.5)
    assert (big.top_k.dtype, big.k_limit, big.top_p.dtype) == (np.int32, 128, np.float32)
    assert read_sampling(50, top_k=1000).top_k == 50
    same = [jax.tree.structure(read_sampling(50257, top_k=k)) for k in (1, 64)]
    assert same[0] == same[1]


@pytest.mark.parametrize("options", [{"top_p": 0.8}, {"top_k": 40, "top_p": 0.8}])
def test_under_vmap_scan_and_a_callers_jit(options):
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 1, (2, 3, 300)), jnp.float32)
    sampling, keys = read_sampling(300, **options), keys_of(6).reshape(2, 3)
    expected = jnp.stack([draw(logits[i], sampling, None, None, keys[i]) for i in range(2)])
    mapped = jax.vmap(lambda rows, keys: draw(rows, sampling, None, None, keys))(logits, keys)
    np.testing.assert_array_equal(mapped, expected)
    _, scanned = jax.lax.scan(lambda _, x: (None, next_tokens(x[0], sampling, None, None, x[1])), None, (logits, keys))
    np.testing.assert_array_equal(scanned, expected)
    traced = jax.jit(lambda row, numbers: sample_logits(row, **numbers))(logits[0], options)
    np.testing.assert_array_equal(traced, sample_logits(logits[0], **options))


# Unusual logits


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.9}, {"temperature": 0}])
def test_bfloat16_logits_equal_the_same_numbers_in_float32(options):
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 2, (8, 200)), jnp.bfloat16)
    narrow = draw(logits, read_sampling(200, **options), None, None, keys_of(8))
    np.testing.assert_array_equal(
        narrow, draw(logits.astype(jnp.float32), read_sampling(200, **options), None, None, keys_of(8))
    )


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 5}, {"top_p": 0.999}, {"top_k": 5, "top_p": 0.9}, {"temperature": 0}]
)
def test_infinite_logits(options):
    everything = {**options, "repetition_penalty": 1.2, "freq_penalty": 0.5}
    counts, seen = penalties_of(2)
    logits = jnp.full((2, 7), -jnp.inf).at[0, 3].set(1.0)
    tokens = draw(logits, read_sampling(7, **everything), counts, seen, keys_of(2))
    assert tokens.tolist() == [3, 0]  # no token allowed: the first
    forced = jnp.asarray(LOGITS)[None].at[0, 6].set(jnp.inf)
    assert draw(forced, read_sampling(7, **options), None, None, keys_of(1)).tolist() == [6]


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-300, 3e38])
@pytest.mark.parametrize("top_p", [None, 0.9])
def test_extreme_temperatures(temperature, top_p):
    sampling = read_sampling(7, temperature=temperature, top_p=top_p)
    tokens = draw(jnp.tile(jnp.asarray(LOGITS), (64, 1)), sampling, None, None, keys_of(64))
    assert len(np.unique(tokens)) == (1 if temperature < 1 else 7)


def test_count_tokens():
    tokens = jnp.array([[3, 1, 3], [0, 0, 2]])
    assert count_tokens(tokens, 4).tolist() == [[0, 1, 0, 2], [2, 0, 1, 0]]
    assert count_tokens(tokens, 4, tokens > 0).tolist() == [[0, 1, 0, 2], [0, 0, 1, 0]]


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, "temperature=-0.5 is out of range. It takes a number, 0 or more"),
        ({"temperature": math.nan}, "temperature=nan is out of range"),
        ({"temperature": math.inf}, "temperature=inf is out of range"),
        ({"temperature": None}, "temperature takes one number, 0 or more"),
        ({"temperature": "hot"}, "temperature takes one number, 0 or more; 0 takes the likeliest token; got 'hot'"),
        ({"temperature": [1.0, 2.0]}, "temperature takes one number"),
        ({"top_k": 0}, "top_k=0 is not a number of tokens. It takes an integer from 1, or None"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 2.0}, "top_k=2.0"),
        ({"top_k": True}, "top_k=True"),
        ({"top_p": 0.0}, "top_p=0.0 is out of range. It takes a number, above 0 and up to 1"),
        ({"top_p": 1.5}, "top_p=1.5 is out of range"),
        ({"top_p": math.nan}, "top_p=nan is out of range"),
        ({"freq_penalty": math.inf}, "freq_penalty=inf is out of range. It takes a number, finite"),
        ({"freq_penalty": True}, "freq_penalty takes one number"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 is out of range. It takes a number, above 0"),
        ({"repetition_penalty": -1}, "repetition_penalty=-1 is out of range"),
        ({"do_sample": False, "top_p": 2.0}, "top_p=2.0 is out of range"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        read_sampling(7, **options)


@pytest.mark.parametrize(
    ("options", "missing"),
    [({"freq_penalty": 1.0}, "counts"), ({"repetition_penalty": 2.0}, "seen"), ({"temperature": 0.5}, "keys")],
)
def test_next_tokens_says_what_is_missing(options, missing):
    given = {"counts": penalties_of(1)[0], "seen": penalties_of(1)[1], "keys": keys_of(1), missing: None}
    with pytest.raises(InputError, match=f"next_tokens needs {missing}="):
        next_tokens(jnp.asarray(LOGITS[None]), read_sampling(7, **options), **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final_logits": np.zeros((1, 2, 7), np.float32)}, "got shape (1, 2, 7)"),
        ({"final_logits": np.zeros((2, 7), np.int32)}, "dtype int32"),
        ({"final_logits": np.zeros((2, 0), np.float32)}, "got shape (2, 0)"),
        ({"freq_penalty": 1.0}, "needs the text so far: pass tokens="),
        ({"repetition_penalty": 1.5}, "needs the text so far: pass tokens="),
        ({"freq_penalty": 1.0, "tokens": [1, 2]}, "takes token ids [2, pos] for logits of shape [2, 7]; got shape [2]"),
        ({"freq_penalty": 1.0, "tokens": [[1, 2]]}, "got shape [1, 2]"),
        ({"freq_penalty": 1.0, "tokens": [[0.5], [1.0]]}, "dtype float64"),
        ({"freq_penalty": 1.0, "tokens": [[1], [7]]}, "outside the vocabulary of the logits, 0 to 6"),
        ({"freq_penalty": 1.0, "tokens": [[1], [-1]]}, "outside the vocabulary"),
        ({"seed": 0, "key": jax.random.key(0)}, "both key= and seed="),
        ({"seed": 0.5}, "seed takes an integer, got 0.5"),
        ({"key": 3}, "key takes one jax.random.key(...), got 3. For an integer pass seed="),
        ({"key": jax.random.split(jax.random.key(0), 2)}, "key takes one jax.random.key(...)"),
    ],
)
def test_sample_logits_refusals(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        sample_logits(**{"final_logits": np.zeros((2, 7), np.float32), **options})
