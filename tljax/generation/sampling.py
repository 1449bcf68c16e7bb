"""Chooses the next token from logits: greedy, temperature, top-k, top-p, frequency and repetition penalty.

The order is TransformerLens 3.9's: repetition penalty, temperature, frequency penalty, top-k, top-p, draw. Two things
differ: TransformerLens ignores ``top_p`` when ``top_k`` is given, where here (as in HuggingFace) ``top_p`` applies to
what ``top_k`` kept; and the frequency penalty also applies to greedy choices.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from tljax.checks import check_type
from tljax.errors import InputError
from tljax.generation.selection import draw, least_kept, nth_true
from tljax.sizes import power_of_two

_LEAST_LIMIT = 64  # finding fewer largest logits than this is hardly faster
_MOST_LIMIT = 1024  # finding more than this is slower than bisection


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings for choosing the next token, as :func:`read_sampling` makes them from a user's arguments.

    A pytree: ``None`` turns a step off and is part of the structure; numbers are leaves, so new ones do not recompile.

    Attributes:
        temperature: scalar float32; ``None`` takes the largest logit.
        top_k: scalar int32.
        top_p: scalar float32.
        freq_penalty: scalar float32.
        repetition_penalty: scalar float32.
        k_limit: static; a power of two that ``top_k`` does not exceed, or 0 for any ``top_k`` (slower).
    """

    temperature: jax.Array | np.ndarray | None
    top_k: jax.Array | np.ndarray | None
    top_p: jax.Array | np.ndarray | None
    freq_penalty: jax.Array | np.ndarray | None
    repetition_penalty: jax.Array | np.ndarray | None
    k_limit: int = dataclasses.field(metadata={"static": True}, default=0)


class SamplingOptions(TypedDict, total=False):
    """Options for choosing the next token: see :func:`read_sampling`."""

    do_sample: bool
    temperature: float | jax.Array
    top_k: int | jax.Array | None
    top_p: float | jax.Array | None
    freq_penalty: float | jax.Array
    repetition_penalty: float | jax.Array


def read_sampling(
    d_vocab: int,
    *,
    do_sample: bool = True,
    temperature: Any = 1.0,
    top_k: Any = None,
    top_p: Any = None,
    freq_penalty: Any = 0.0,
    repetition_penalty: Any = 1.0,
) -> Sampling:
    """Checks the arguments that say how the next token is chosen.

    Args:
        d_vocab: size of the vocabulary; a larger ``top_k`` is cut to it.
        do_sample: ``False`` takes the largest logit, as does ``temperature=0``. Penalties still apply.
        temperature: divides the logits; above 1 flattens the distribution, below 1 sharpens it.
        top_k: how many of the most likely tokens stay, and any that tie with the last; ``None`` keeps all.
        top_p: the fewest most likely tokens whose probability reaches this stay, at least one; ``None`` or 1 keeps
            all.
        freq_penalty: subtracted from a token's logit, after the temperature, once for each time it occurred; 0 is off.
        repetition_penalty: divides the positive logits of tokens that occurred and multiplies the negative ones,
            before the temperature (https://arxiv.org/abs/1909.05858); 1 is off.

    Returns:
        The argument of :func:`next_tokens`. A step whose argument is traced counts as on.

    Raises:
        InputError: an argument is not a number, or out of range.

    >>> sampling = read_sampling(50257, temperature=0.7, top_k=100)
    >>> sampling.top_k, sampling.k_limit, sampling.top_p
    (array(100, dtype=int32), 128, None)
    >>> read_sampling(50257, do_sample=False, top_k=100).top_k  # the largest logit needs none
    """
    check_type(do_sample, bool, "do_sample")
    scale = _number("temperature", temperature, 0.0, lambda value: value >= 0, "0 or more; 0 takes the likeliest token")
    share = _number(
        "top_p", 1.0 if top_p is None else top_p, 1.0, lambda value: 0 < value <= 1, "above 0 and up to 1; 1 keeps all"
    )
    k, k_limit = _read_top_k(top_k, d_vocab)
    freq = _number("freq_penalty", freq_penalty, 0.0, lambda _: True, "finite; 0 is off")
    repetition = _number(
        "repetition_penalty", repetition_penalty, 1.0, lambda value: value > 0, "above 0; 1 is off, 1.2 is usual"
    )
    if scale is None or not do_sample:
        return Sampling(None, None, None, freq, repetition)
    return Sampling(scale, k, share, freq, repetition, k_limit)


def _number(name: str, value: Any, off: float, allowed: Callable[[float], bool], expected: str) -> Any:
    """Returns the value as a float32 scalar, or ``None`` if it changes nothing."""
    if isinstance(value, Tracer) and value.ndim == 0:
        return value.astype(jnp.float32)
    if isinstance(value, bool | str) or np.ndim(value) != 0 or value is None:
        raise InputError(f"{name} takes one number, {expected}; got {value!r}.")
    with np.errstate(over="ignore", under="ignore"):
        number = np.asarray(value, np.float32)
    if not (math.isfinite(number) and allowed(float(number))):
        raise InputError(f"{name}={value!r} is out of range. It takes a number, {expected}.")
    return None if number == off else number


def _read_top_k(top_k: Any, d_vocab: int) -> tuple[Any, int]:
    if top_k is None:
        return None, 0
    if isinstance(top_k, Tracer) and top_k.ndim == 0 and jnp.issubdtype(top_k.dtype, jnp.integer):
        return jnp.clip(top_k.astype(jnp.int32), 1, d_vocab), 0
    try:
        count = 0 if isinstance(top_k, bool) else operator.index(top_k)
    except TypeError:
        count = 0
    if count < 1:
        raise InputError(
            f"top_k={top_k!r} is not a number of tokens. It takes an integer from 1, or None to keep all tokens."
        )
    count = min(count, d_vocab)
    return np.asarray(count, np.int32), max(_LEAST_LIMIT, power_of_two(count))


def next_tokens(
    logits: Float[Array, "batch d_vocab"],
    sampling: Sampling,
    counts: Int[Array, "batch d_vocab"] | None,
    seen: Bool[Array, "batch d_vocab"] | None,
    keys: jax.Array | None,
) -> Int[Array, "batch"]:
    """Chooses one token for each row; made to be traced into a decode loop.

    Args:
        logits: logits of the next token, any float dtype; computation is in float32.
        sampling: how to choose. Recompiles when a step is turned on or off or ``k_limit`` changes.
        counts: how often each token occurred in the row; needed for the frequency penalty only.
        seen: whether each token occurred in the row; needed for the repetition penalty only.
        keys: one typed key a row, ``[batch]``; not needed for greedy choices. A row's draw depends on its own logits
            and its own key.

    Returns:
        Token ids, int32.

    Raises:
        InputError: a step that is on lacks its argument.
    """
    for step, name, needed in (
        (sampling.freq_penalty, "counts", counts),
        (sampling.repetition_penalty, "seen", seen),
        (sampling.temperature, "keys", keys),
    ):
        if step is not None and needed is None:
            raise InputError(f"next_tokens needs {name}= for these settings and got None.")
    operands = (
        logits,
        None if sampling.freq_penalty is None else counts,
        None if sampling.repetition_penalty is None else seen,
        None if sampling.temperature is None else keys,
    )
    choose = functools.partial(_next_token, sampling)
    if (sampling.top_k is None and sampling.top_p is None) or sampling.temperature is None or _few_stay(sampling):
        return jax.vmap(choose)(operands)
    # Bisection reads a row of logits 32 times: on a CPU, row by row, it stays in the cache.
    return jax.lax.platform_dependent(operands, cpu=functools.partial(jax.lax.map, choose), default=jax.vmap(choose))


def _few_stay(sampling: Sampling) -> bool:
    """Whether top-k keeps so few tokens that listing them is fastest."""
    return sampling.top_k is not None and 0 < sampling.k_limit <= _MOST_LIMIT


def _next_token(sampling: Sampling, row: tuple[Any, ...]) -> jax.Array:
    logits, counts, seen, key = row
    scores = _scores(logits, counts, seen, sampling)
    if sampling.temperature is None:
        return jax.lax.argmax(scores, 0, jnp.int32)
    return draw(_weights(scores, sampling), key)


def _scores(
    logits: Float[Array, "d_vocab"],
    counts: Int[Array, "d_vocab"] | None,
    seen: Bool[Array, "d_vocab"] | None,
    sampling: Sampling,
) -> Float[Array, "d_vocab"]:
    """Returns the logits after the penalties and the temperature, float32."""
    scores = logits.astype(jnp.float32)
    if sampling.repetition_penalty is not None and seen is not None:
        penalty = sampling.repetition_penalty
        scores = jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)
    if sampling.temperature is not None:
        scores = scores / jnp.clip(sampling.temperature, 1e-30, 1e30)
    if sampling.freq_penalty is not None and counts is not None:
        scores = scores - sampling.freq_penalty * counts.astype(jnp.float32)
    return scores


def _weights(scores: Float[Array, "d_vocab"], sampling: Sampling) -> Float[Array, "d_vocab"]:
    """Returns unnormalised probabilities, 0 for tokens that top-k or top-p drop."""
    # The barrier keeps XLA from computing a score twice with different rounding: scores are compared for equality.
    scores = jax.lax.optimization_barrier(jnp.minimum(scores, np.finfo(np.float32).max))
    best = jnp.maximum(scores.max(), np.finfo(np.float32).min)  # finite even if no token is allowed
    weights = jnp.exp(scores - best)
    values, masses = scores, weights
    if sampling.top_k is not None and _few_stay(sampling):
        values = jax.lax.top_k(scores, min(sampling.k_limit, len(scores)))[0]
        least = values[jnp.clip(sampling.top_k, 1, len(values)) - 1]
        weights = jnp.where(scores >= least, weights, 0)
        # Tokens that tie with the k-th are all kept; those among ``values`` carry the mass of all of them.
        tied = values == least
        each = (scores == least).sum().astype(jnp.float32) / tied.sum().astype(jnp.float32)
        masses = jnp.where(values < least, 0, jnp.exp(values - best) * jnp.where(tied, each, 1))
    elif sampling.top_k is not None:
        least = least_kept(scores, jnp.ones_like(scores), sampling.top_k.astype(jnp.float32))
        masses = weights = jnp.where(scores >= least, weights, 0)
    if sampling.top_p is None:
        return weights
    wanted = sampling.top_p * masses.sum()
    least = least_kept(values, masses, wanted)
    lacking = wanted - jnp.where(values > least, masses, 0).sum()
    ties = scores == least
    share = jnp.maximum(jnp.exp(least - best), np.finfo(np.float32).tiny)
    kept = jnp.clip(jnp.ceil(lacking / share), 1, ties.sum().astype(jnp.float32)).astype(jnp.int32)
    among = jnp.arange(len(scores), dtype=jnp.int32) <= nth_true(ties, kept)
    return jnp.where((scores > least) | (ties & among), weights, 0)


def count_tokens(
    tokens: Int[Array, "batch pos"], d_vocab: int, mask: Bool[Array, "batch pos"] | None = None
) -> Int[Array, "batch d_vocab"]:
    """Counts how often each token of the vocabulary occurs in each row, where ``mask`` is ``True``.

    >>> count_tokens(jnp.array([[2, 0, 2]]), 4)
    Array([[1, 0, 2, 0]], dtype=int32)
    """
    rows = jnp.arange(len(tokens), dtype=jnp.int32)[:, None]
    ones = jnp.ones(tokens.shape, jnp.int32) if mask is None else mask.astype(jnp.int32)
    return jnp.zeros((len(tokens), d_vocab), jnp.int32).at[rows, tokens].add(ones)


def sample_logits(
    final_logits: Any,
    top_k: Any = None,
    top_p: Any = None,
    temperature: Any = 1.0,
    freq_penalty: Any = 0.0,
    repetition_penalty: Any = 1.0,
    tokens: Any = None,
    *,
    key: jax.Array | None = None,
    seed: int | None = None,
) -> Int[Array, "batch"] | Int[Array, ""]:
    """Chooses the next token from logits, as TransformerLens's ``sample_logits`` does.

    Args:
        final_logits: ``[batch, d_vocab]`` or ``[d_vocab]``, as ``model(tokens)[:, -1]`` gives them.
        top_k, top_p, temperature, freq_penalty, repetition_penalty: as in :func:`read_sampling`.
        tokens: the text so far, ``[batch, pos]`` (``[pos]`` for one row of logits); a penalty needs it.
        key: a key of ``jax.random``; the same key draws the same tokens. Split it for the next draw.
        seed: an integer instead of a key. With neither, seed 0 is used: every call draws alike.

    Returns:
        Token ids ``[batch]``, int32; a scalar for one row of logits. Under trace, -1 where logits are NaN.

    Raises:
        InputError: an argument is out of range or contradicts another, or logits are NaN.

    >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))
    >>> sample_logits(logits, temperature=0)
    Array([0, 2], dtype=int32)
    >>> bool((sample_logits(logits, top_k=2, seed=1) == sample_logits(logits, top_k=2, key=jax.random.key(1))).all())
    True
    """
    logits = jnp.asarray(final_logits)
    if logits.ndim not in (1, 2) or logits.size == 0 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise InputError(
            "sample_logits takes logits [batch, d_vocab] or [d_vocab], floating point, such as model(tokens)[:, -1]; "
            f"got shape {logits.shape}, dtype {logits.dtype}."
        )
    rows = logits if logits.ndim == 2 else logits[None]
    sampling = read_sampling(
        rows.shape[1],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        freq_penalty=freq_penalty,
        repetition_penalty=repetition_penalty,
    )
    penalised = sampling.freq_penalty is not None or sampling.repetition_penalty is not None
    text = _read_text(tokens, logits.shape) if penalised else None
    chosen = _sample(rows, sampling, text, read_key(key, seed))
    if not isinstance(chosen, Tracer) and (np.asarray(chosen) < 0).any():
        raise InputError(
            f"Row {int(np.argmax(np.asarray(chosen) < 0))} of the logits holds nothing to choose by: NaN, or -inf for "
            "every token."
        )
    return chosen if logits.ndim == 2 else chosen[0]


@jax.jit
def _sample(logits: jax.Array, sampling: Sampling, tokens: jax.Array | None, key: jax.Array) -> jax.Array:
    counts = None if tokens is None else count_tokens(tokens, logits.shape[1])
    seen = None if counts is None else counts > 0
    chosen = next_tokens(logits, sampling, counts, seen, row_keys(key, len(logits)))
    return jnp.where(logits.max(axis=1) > -jnp.inf, chosen, -1)  # False for NaN too


def row_keys(key: jax.Array, batch: int) -> jax.Array:
    """Returns a key for each row, ``[batch]``: a row's draws do not depend on how many rows there are."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(batch, dtype=np.uint32))


def _read_text(tokens: Any, logits_shape: tuple[int, ...]) -> jax.Array:
    """Returns the text whose tokens the penalties count, as int32 ``[batch, pos]``."""
    if tokens is None:
        raise InputError("A frequency or repetition penalty needs the text so far: pass tokens=, [batch, pos].")
    text = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    *batch, d_vocab = logits_shape
    if text.ndim != len(batch) + 1 or list(text.shape[:-1]) != batch or not jnp.issubdtype(text.dtype, jnp.integer):
        expected = f"[{batch[0]}, pos]" if batch else "[pos]"
        raise InputError(
            f"tokens= takes token ids {expected} for logits of shape {list(logits_shape)}; got shape "
            f"{list(text.shape)}, dtype {text.dtype}."
        )
    if not isinstance(text, Tracer) and text.size and not 0 <= int(text.min()) <= int(text.max()) < d_vocab:
        raise InputError(f"tokens= holds ids outside the vocabulary of the logits, 0 to {d_vocab - 1}.")
    return jnp.asarray(text if batch else text[None]).astype(jnp.int32)


def read_key(key: Any, seed: Any) -> jax.Array:
    """Returns the typed key that ``key=`` or ``seed=`` stands for."""
    if key is not None and seed is not None:
        raise InputError(
            "Got both key= and seed=. Pass one of them, not both: seed=0 stands for key=jax.random.key(0)."
        )
    if key is None:
        if not isinstance(seed, Tracer | int | np.integer | None) or isinstance(seed, bool):
            raise InputError(f"seed takes an integer, got {seed!r}.")
        return jax.random.key(0 if seed is None else seed)
    if isinstance(key, jax.Array):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
            return key
        if key.dtype == jnp.uint32 and key.ndim == 1:
            return jax.random.wrap_key_data(key)
    raise InputError(f"key takes one jax.random.key(...), got {key!r}. For an integer pass seed=.")
