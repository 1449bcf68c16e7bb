"""Training batches as a function of the step, and the checks on each batch."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tljax.config import HookedTransformerConfig
from tljax.errors import InputError

Batch = Any
"""Token ids ``[batch, pos]``, or ``(ids, weights)`` with ``weights [batch, pos - 1]`` for each predicted token."""

BatchFunction = Callable[[int], Batch]


def rows_of(tokens: np.ndarray, batch_size: int, seed: int) -> BatchFunction:
    """Returns the batches of a data set held in memory: every row once an epoch, each epoch in its own order.

    Args:
        tokens: ids, ``[rows, pos]``.
        batch_size: rows in a batch. Rows that do not fill a batch sit out that epoch.
        seed: seed of the shuffling. The batch of a step depends on the seed and the step alone.

    Raises:
        InputError: there are fewer rows than ``batch_size``.
    """
    per_epoch = len(tokens) // batch_size
    if per_epoch < 1:
        raise InputError(f"batch_size={batch_size} is more than the {len(tokens)} rows given. Use a smaller one.")

    def batch(step: int) -> np.ndarray:
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(tokens))
        return tokens[order[place * batch_size : (place + 1) * batch_size]]

    return batch


def batch_function(batches: Any, batch_size: int, seed: int) -> BatchFunction:
    """Returns ``batches`` itself if it is a function of the step, or the batches of an array of rows.

    Raises:
        InputError: it is neither.
    """
    if callable(batches):
        return batches
    if np.ndim(batches) != 2:
        raise InputError(
            "batches must be a function from the step to token ids [batch, pos], or an array of token ids "
            f"[rows, pos], got {type(batches).__name__} with {np.ndim(batches)} dimensions. A generator cannot be "
            "resumed: make batches from the step's number instead, as in lambda step: make(seed, step)."
        )
    return rows_of(np.asarray(batches), batch_size, seed)


def check_batch(batch: Batch, cfg: HookedTransformerConfig, step: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Checks a batch and returns it as ``(ids int32, weights float32 or None)``.

    Raises:
        InputError: wrong rank, dtype or length, an id out of range, weights of another shape or all zero.
    """
    tokens, weights = batch if isinstance(batch, tuple) else (batch, None)
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[0] < 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(
            f"The batch of step {step} must be integer token ids [batch, pos], got {tokens.dtype}{list(tokens.shape)}."
        )
    if not 2 <= tokens.shape[1] <= cfg.n_ctx:
        raise InputError(
            f"The batch of step {step} has rows of {tokens.shape[1]} tokens. A row needs at least 2 (one to predict) "
            f"and at most n_ctx={cfg.n_ctx}."
        )
    if tokens.min() < 0 or tokens.max() >= cfg.d_vocab:
        wrong = tokens[(tokens < 0) | (tokens >= cfg.d_vocab)][0]
        raise InputError(f"The batch of step {step} has token id {wrong}; ids run from 0 to {cfg.d_vocab - 1}.")
    if weights is None:
        return tokens.astype(np.int32), None
    weights = np.asarray(weights, np.float32)
    if weights.shape != (tokens.shape[0], tokens.shape[1] - 1) or not weights.sum() > 0:
        raise InputError(
            f"The weights of step {step} must be [batch, pos - 1] = {[tokens.shape[0], tokens.shape[1] - 1]}, one for "
            f"each predicted token and not all zero, got {list(weights.shape)} with sum {weights.sum():g}."
        )
    return tokens.astype(np.int32), weights
