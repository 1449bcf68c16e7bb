"""Induction heads: heads that, at a token seen before, attend to what followed it (Olsson et al. 2022)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tljax.checks import typed, whole
from tljax.errors import InputError
from tljax.model.hooked_transformer import HookedTransformer


@typed
def repeated_random_tokens(
    model: HookedTransformer,
    length: int,
    batch_size: int,
    seed: int = 0,
    low: int | None = None,
    high: int | None = None,
) -> np.ndarray:
    """Returns repeated random tokens, ``[batch, 1 + 2 * length]`` with BOS first (``2 * length`` if there is none).

    Args:
        model: gives the vocabulary, the BOS token and the context length.
        length: tokens in one copy.
        batch_size: number of sequences.
        seed: random seed.
        low, high: bounds of the token ids drawn, ``low <= id < high``.

    Raises:
        InputError: two copies do not fit the context, or the bounds leave no ids to draw.
    """
    whole(length, "length", at_least=1)
    whole(batch_size, "batch_size", at_least=1)
    first, end = low or 0, model.cfg.d_vocab if high is None else high
    if not 0 <= first < end <= model.cfg.d_vocab:
        raise InputError(f"low={first}, high={end}: ids are drawn with 0 <= low <= id < high <= {model.cfg.d_vocab}.")
    tokenizer = model._tokenizer
    bos = None if tokenizer is None else tokenizer.bos_token_id
    total = 2 * length + (bos is not None)
    if total > model.cfg.n_ctx:
        raise InputError(
            f"Two copies of {length} tokens need {total} positions; the model has n_ctx={model.cfg.n_ctx}."
        )
    special: set[Any] = set() if tokenizer is None else {bos, tokenizer.eos_token_id, tokenizer.pad_token_id}
    ids = np.array([n for n in range(first, end) if n not in special], np.int32)
    if not len(ids):
        raise InputError(f"low={first}, high={end}: between them are special tokens alone.")
    rng = np.random.default_rng(seed)
    once = ids[rng.integers(0, len(ids), (batch_size, length))]
    front = np.full((batch_size, 1), bos, np.int32) if bos is not None else np.zeros((batch_size, 0), np.int32)
    return np.concatenate([front, once, once], axis=1)


@typed
def induction_scores(
    model: HookedTransformer, length: int = 20, batch_size: int = 8, seed: int = 0, tokens: Any = None
) -> Float[Array, "layer head"]:
    """Computes how strongly each head attends from the second copy of a token to the token after its first copy.

    Args:
        model, length, batch_size, seed: as in :func:`repeated_random_tokens`.
        tokens: sequences to use instead, ending in two copies of ``length`` tokens.

    Returns:
        Mean attention ``[layer, head]``, between 0 and 1.
    """
    ids = repeated_random_tokens(model, length, batch_size, seed) if tokens is None else np.asarray(tokens)
    queries = second_copy(ids, length)
    return mean_attention(model, ids, {"induction": (queries, queries - length + 1)})["induction"]


def second_copy(ids: np.ndarray, length: int) -> np.ndarray:
    """Returns the positions of the second copy in ids ``[batch, pos]`` that end in two copies of ``length`` tokens.

    Raises:
        InputError: the ids do not end in two copies.
    """
    if ids.ndim != 2 or length < 1 or ids.shape[1] < 2 * length:
        raise InputError(
            f"Two copies of length={length} tokens are needed at the end of ids [batch, pos]; got shape {ids.shape}."
        )
    if (ids[:, -length:] != ids[:, -2 * length : -length]).any():
        raise InputError(f"The last {length} tokens do not repeat the {length} before them: give the length of a copy.")
    return np.arange(ids.shape[1] - length, ids.shape[1])


def mean_attention(
    model: HookedTransformer, ids: np.ndarray, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, Float[Array, "layer head"]]:
    """Averages every head's attention over pairs of positions, for several sets of pairs in one run.

    Args:
        model: the model.
        ids: token ids ``[batch, pos]``.
        pairs: maps the name of a set to its query positions and key positions, each ``[pair]``.

    Returns:
        The mean attention ``[layer, head]`` of each set, by name.
    """
    _, cache = model.run_with_cache(ids, return_type=None, names_filter=lambda name: name.endswith("hook_pattern"))
    return _mean_attention([cache["pattern", layer] for layer in range(model.cfg.n_layers)], dict(pairs))


@jax.jit
def _mean_attention(patterns: list[jax.Array], pairs: dict[str, tuple[Any, Any]]) -> dict[str, jax.Array]:
    return {
        name: jnp.stack([pattern[:, :, queries, keys].mean(axis=(0, 2)) for pattern in patterns])
        for name, (queries, keys) in pairs.items()
    }


@typed
def heads_above(scores: jax.Array, threshold: float = 0.3) -> list[tuple[int, int, float]]:
    """Returns the heads whose score is above ``threshold`` as ``(layer, head, score)``, largest first."""
    above = np.argwhere(np.asarray(scores) > threshold).tolist()
    found = [(layer, head, float(scores[layer, head])) for layer, head in above]
    return sorted(found, key=lambda item: -item[2])
