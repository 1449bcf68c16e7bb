"""Scores of all heads at once for the attention patterns of Olsson et al. 2022, on repeated random tokens."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from tljax.analysis.induction import mean_attention, repeated_random_tokens, second_copy
from tljax.checks import typed
from tljax.errors import InputError
from tljax.model.hooked_transformer import HookedTransformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadScores:
    """Mean attention ``[layer, head]``, between 0 and 1, along each of three patterns; a pytree.

    Attributes:
        previous_token: to the token before.
        duplicate_token: from the second copy of a token to the first.
        induction: from the second copy of a token to what followed the first.
    """

    previous_token: Float[Array, "layer head"]
    duplicate_token: Float[Array, "layer head"]
    induction: Float[Array, "layer head"]


@typed
def head_scores(
    model: HookedTransformer, length: int = 20, batch_size: int = 8, seed: int = 0, tokens: Any = None
) -> HeadScores:
    """Computes all three scores of every head, in one run and one compiled reduction.

    Args:
        model, length, batch_size, seed: as in :func:`~tljax.analysis.repeated_random_tokens`.
        tokens: sequences ``[batch, pos]`` to use instead, ending in two copies of ``length`` tokens.

    Raises:
        InputError: the copies do not fit the context, or ``tokens`` do not end in two of them.
    """
    ids = repeated_random_tokens(model, length, batch_size, seed) if tokens is None else np.asarray(tokens)
    queries = second_copy(ids, length)
    pairs = {
        "previous_token": _to_previous(ids),
        "duplicate_token": (queries, queries - length),
        "induction": (queries, queries - length + 1),
    }
    return HeadScores(**mean_attention(model, ids, pairs))


@typed
def previous_token_scores(
    model: HookedTransformer, length: int = 20, batch_size: int = 8, seed: int = 0, tokens: Any = None
) -> Float[Array, "layer head"]:
    """Computes how strongly each head attends to the token before.

    Attention to the very first token is left out, because idle heads attend there.

    Args:
        model, length, batch_size, seed: as in :func:`~tljax.analysis.repeated_random_tokens`.
        tokens: any sequences ``[batch, pos]`` to use instead.
    """
    ids = repeated_random_tokens(model, length, batch_size, seed) if tokens is None else np.asarray(tokens)
    return mean_attention(model, ids, {"previous_token": _to_previous(ids)})["previous_token"]


@typed
def duplicate_token_scores(
    model: HookedTransformer, length: int = 20, batch_size: int = 8, seed: int = 0, tokens: Any = None
) -> Float[Array, "layer head"]:
    """Computes attention from the second copy of a token to the first; arguments as for :func:`head_scores`."""
    ids = repeated_random_tokens(model, length, batch_size, seed) if tokens is None else np.asarray(tokens)
    queries = second_copy(ids, length)
    return mean_attention(model, ids, {"duplicate_token": (queries, queries - length)})["duplicate_token"]


def _to_previous(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if ids.ndim != 2 or ids.shape[1] < 3:
        raise InputError(f"Sequences [batch, pos] of three tokens or more are needed; got shape {ids.shape}.")
    queries = np.arange(2, ids.shape[1])
    return queries, queries - 1
