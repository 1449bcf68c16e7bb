"""Resampling statistics over prompts, for many sites at once and in bounded memory."""

from typing import Any, Literal, get_args

import numpy as np

from tljax.checks import whole
from tljax.errors import InputError

Statistic = Literal["mean", "median"]
Alternative = Literal["two-sided", "greater", "less"]

MAX_EXACT = 12
"""Most prompts for which a permutation test tries all ``2 ** prompts`` sign patterns."""

_ENTRIES = 4_000_000
"""Most numbers held in memory at once (8 bytes each)."""


def bootstrap_interval(
    samples: np.ndarray, *, confidence: float, n_resamples: int, seed: int, statistic: str
) -> tuple[np.ndarray, np.ndarray]:
    """Computes a percentile bootstrap interval of a statistic over the last axis.

    Every site sees the same resamples of the prompts.

    Args:
        samples: ``[..., prompt]``.
        confidence: share of the resampled statistics that the interval holds, in (0, 1).
        n_resamples: how many times the prompts are drawn with replacement.
        seed: seed of the draws.
        statistic: ``"mean"`` or ``"median"``.

    Returns:
        Lower and upper ends ``[...]``.

    Raises:
        InputError: an argument out of range, or no prompts.
    """
    _check(statistic, Statistic, "statistic")
    if not 0 < confidence < 1:
        raise InputError(f"confidence is a share between 0 and 1, such as 0.95; got {confidence}.")
    _check_count(n_resamples, "n_resamples")
    flat = np.asarray(samples, np.float64).reshape(-1, samples.shape[-1])
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)
    sites = max(1, _ENTRIES // n_resamples)
    parts = [
        np.quantile(_resampled(flat[start : start + sites], statistic, n_resamples, seed), tails, axis=0)
        for start in range(0, len(flat), sites)
    ]
    low, high = np.concatenate(parts, axis=1).reshape(2, *samples.shape[:-1])
    return low, high


def resampling_weights(n: int, *, n_resamples: int, seed: int, clusters: Any = None) -> np.ndarray:
    """Draws prompts, or whole clusters of them, with replacement.

    Args:
        n: number of prompts.
        n_resamples: how many times to draw.
        seed: seed of the draws.
        clusters: a number for each prompt ``[n]``; prompts of one number (such as one template's) are drawn together.

    Returns:
        How often each prompt was drawn, as a share of its resample, ``[n_resamples, n]``; rows sum to one.

    Raises:
        InputError: an argument out of range, or fewer than two prompts or clusters.
    """
    _check_count(n_resamples, "n_resamples")
    ids = np.arange(n) if clusters is None else np.asarray(clusters)
    if ids.shape != (n,):
        raise InputError(f"clusters= has shape {ids.shape}; give one number for each of the {n} prompts.")
    _, of_prompt = np.unique(ids, return_inverse=True)
    count = int(of_prompt.max(initial=-1)) + 1
    if count < 2:
        raise InputError(f"Resampling needs at least two {'prompts' if clusters is None else 'clusters'}; got {count}.")
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=n_resamples)
    weights = drawn[:, of_prompt].astype(np.float64)
    return weights / weights.sum(axis=1, keepdims=True)


def _resampled(flat: np.ndarray, statistic: str, n_resamples: int, seed: int) -> np.ndarray:
    """Computes the statistic on resamples of ``flat`` ``[site, prompt]``, as ``[resample, site]``."""
    generator = np.random.default_rng(seed)
    sites, prompts = flat.shape
    at_once = max(1, _ENTRIES // (prompts * (sites if statistic == "median" else 1)))
    results = np.empty((n_resamples, sites))
    for start in range(0, n_resamples, at_once):
        count = min(at_once, n_resamples - start)
        drawn = generator.integers(0, prompts, (count, prompts))
        if statistic == "median":
            results[start : start + count] = np.median(flat[:, drawn], axis=2).T
        else:
            shifted = (drawn + prompts * np.arange(count)[:, None]).ravel()
            times_drawn = np.bincount(shifted, minlength=count * prompts).reshape(count, prompts)
            results[start : start + count] = times_drawn @ flat.T / prompts
    return results


def sign_flip_pvalue(effects: np.ndarray, *, n_permutations: int, seed: int, alternative: str) -> np.ndarray:
    """Tests whether the mean effect is zero, by flipping the signs of prompts' effects.

    If a patch does nothing on average, each prompt's effect is as likely as its negative; the p-value is the share of
    sign patterns whose mean effect is at least as extreme as the observed one. With up to :data:`MAX_EXACT` prompts all
    patterns are tried (an exact test); with more, random patterns and the observed one.

    Args:
        effects: ``[..., prompt]``.
        n_permutations: random patterns drawn when there are too many to try them all.
        seed: seed of the random patterns.
        alternative: ``"two-sided"``, or that the mean effect is ``"greater"`` or ``"less"`` than zero.

    Returns:
        p-values ``[...]``, NaN where an effect is.

    Raises:
        InputError: an argument out of range.
    """
    _check(alternative, Alternative, "alternative")
    _check_count(n_permutations, "n_permutations")
    flat = np.asarray(effects, np.float64).reshape(-1, effects.shape[-1])
    prompts = flat.shape[1]
    exact = prompts <= MAX_EXACT
    patterns = 2**prompts if exact else n_permutations
    generator = np.random.default_rng(seed)
    hits = np.zeros(len(flat))
    at_once = max(1, _ENTRIES // max(prompts, min(len(flat), 4096)))
    for start in range(0, patterns, at_once):
        numbers = np.arange(start, min(start + at_once, patterns))
        if exact:
            signs = 1.0 - 2.0 * ((numbers[:, None] >> np.arange(prompts)) & 1)
        else:
            signs = 2.0 * generator.integers(0, 2, (len(numbers), prompts)) - 1.0
        for site in range(0, len(flat), 4096):
            hits[site : site + 4096] += _count_extreme(signs, flat[site : site + 4096], alternative)
    share = hits / patterns if exact else (hits + 1) / (patterns + 1)
    return np.where(np.isnan(flat).any(axis=1), np.nan, share).reshape(effects.shape[:-1])


def _count_extreme(signs: np.ndarray, flat: np.ndarray, alternative: str) -> np.ndarray:
    """Counts for each site of ``flat`` ``[site, prompt]`` the patterns at least as extreme as the observed one."""
    null = signs @ flat.T / flat.shape[1]
    observed = flat.mean(axis=1)
    slack = 1e-6 * np.abs(flat).mean(axis=1)  # metrics are single precision: equal up to its rounding is a tie
    if alternative == "two-sided":
        null, observed = np.abs(null), np.abs(observed)
    extreme = null <= observed + slack if alternative == "less" else null >= observed - slack
    return extreme.sum(axis=0)


def _check(value: str, options: object, name: str) -> None:
    if value not in (known := get_args(options)):
        raise InputError(f"{name} is one of {', '.join(map(repr, known))}; got {value!r}.")


def _check_count(value: int, name: str) -> None:
    if whole(value, name) < 1:
        raise InputError(f"{name} must be at least 1, got {value}.")
