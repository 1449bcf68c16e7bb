"""Language-model loss and accuracy, as TransformerLens defines them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from tljax.errors import InputError
from tljax.numerics import widened
from tljax.text.positions import read_mask

IGNORED = -100
"""A label that does not count, as in PyTorch and Hugging Face."""


def check_labels(logits: Any, tokens: Any) -> None:
    """Checks that ``tokens`` are valid labels for ``logits``; of traced tokens, only the shape and dtype.

    Raises:
        InputError: their shapes do not match, or an id is neither in the vocabulary nor -100 (not counted).
    """
    shapes = tuple(np.shape(logits)), tuple(np.shape(tokens))
    if len(shapes[0]) != 3 or shapes[0][:2] != shapes[1] or shapes[1][1] < 2:
        raise InputError(
            f"The logits have shape {shapes[0]} and the tokens {shapes[1]}: give logits [batch, pos, d_vocab] and the "
            "tokens of the same run [batch, pos], at least two a prompt; position p is scored on token p + 1."
        )
    dtype = jnp.result_type(tokens)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise InputError(f"Tokens to score must be integer ids, got dtype {dtype}.")
    if isinstance(tokens, Tracer):
        return
    following = np.asarray(tokens)[:, 1:]
    wrong = following[((following < 0) | (following >= shapes[0][2])) & (following != IGNORED)]
    if wrong.size:
        raise InputError(
            f"There is no token {int(wrong[0])} to score: ids run from 0 to {shapes[0][2] - 1}, and {IGNORED} marks a "
            "label that does not count."
        )


def next_tokens(tokens: Any, attention_mask: Any, d_vocab: int) -> tuple[jax.Array, jax.Array]:
    """Returns the token that each position is scored on, and whether it counts.

    Args:
        tokens: ``[batch, pos]``.
        attention_mask: booleans ``[batch, pos]``, or ``None``.
        d_vocab: size of the vocabulary.

    Returns:
        Ids ``[batch, pos - 1]`` and booleans of the same shape. Ids of -100 become 0. Ids outside the vocabulary
        (possible only under trace) become ``d_vocab``, which ``take_along_axis`` fills with NaN.
    """
    following = jnp.asarray(tokens)[:, 1:].astype(jnp.int32)
    ignored = following == IGNORED
    counted = ~ignored
    if attention_mask is not None:
        visible = jnp.asarray(attention_mask)
        counted = counted & visible[:, :-1] & visible[:, 1:]
    exists = (following >= 0) & (following < d_vocab)
    return jnp.where(exists, following, jnp.where(ignored, 0, d_vocab)), counted


def lm_cross_entropy_loss(
    logits: Float[Array, "batch pos d_vocab"],
    tokens: Int[Array, "batch pos"],
    attention_mask: Int[Array, "batch pos"] | Bool[Array, "batch pos"] | None = None,
    per_token: bool = False,
) -> Float[Array, ""] | Float[Array, "batch pos_minus_1"]:
    """Computes the cross entropy of each next token, in nats.

    Args:
        logits: ``[batch, pos, d_vocab]``.
        tokens: ``[batch, pos]``; position ``p`` is scored on predicting token ``p + 1``, unless that is -100, the usual
            mark of a label that does not count.
        attention_mask: ``[batch, pos]``, 0 at padding; pairs that touch padding do not count.
        per_token: return ``[batch, pos - 1]`` (0 where not counted) instead of the mean.

    Returns:
        The mean over counted pairs, or the loss of each.

    Raises:
        InputError: logits and tokens do not match, or a token is not a valid id; under trace its loss is NaN instead.
    """
    check_labels(logits, tokens)
    mask = None if attention_mask is None else read_mask(attention_mask)
    following, counted = next_tokens(tokens, mask, logits.shape[-1])
    losses = jnp.where(counted, cross_entropies(logits[:, :-1], following).astype(logits.dtype), 0)
    return losses if per_token else mean_of_counted(losses, counted)


def log_probabilities(logits: jax.Array) -> jax.Array:
    """Returns log-probabilities over the last axis, in float32 or wider."""
    return jax.nn.log_softmax(logits.astype(widened(logits.dtype)))


def divergences(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Computes ``KL(p || q)`` in nats over the last axis of log-probabilities; what ``p`` excludes adds nothing."""
    return jnp.where(log_p == -jnp.inf, 0, jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def cross_entropies(logits: jax.Array, following: jax.Array) -> jax.Array:
    """Computes the cross entropy of each token ``[batch, pos]``, in float32 or wider.

    No array of the logits' size is made: only reductions over the vocabulary, and the logits of the tokens.

    Args:
        logits: ``[batch, pos, d_vocab]``.
        following: ids ``[batch, pos]``; NaN where there is no such token.
    """
    wide = widened(logits.dtype)
    chosen = jnp.take_along_axis(logits, following[..., None], axis=-1, mode="fill")[..., 0]
    return jax.nn.logsumexp(logits.astype(wide), axis=-1) - chosen.astype(wide)


def mean_of_counted(losses: jax.Array, counted: jax.Array) -> jax.Array:
    """Returns the mean of the losses that count, given that the others are zero."""
    return losses.sum() / counted.sum().astype(losses.dtype)


def lm_accuracy(
    logits: Float[Array, "batch pos d_vocab"], tokens: Int[Array, "batch pos"], per_token: bool = False
) -> Float[Array, ""] | Bool[Array, "batch pos_minus_1"]:
    """Computes how often the most likely next token is right; ``per_token`` returns the hits ``[batch, pos - 1]``.

    Labels of -100 do not count.
    """
    check_labels(logits, tokens)
    hits = logits[:, :-1].argmax(axis=-1) == tokens[:, 1:]
    return hits if per_token else hits.mean(where=jnp.asarray(tokens)[:, 1:] != IGNORED)
