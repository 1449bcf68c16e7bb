"""The loss of a residual stream, unembedded some positions at a time: the logits of all are never in memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tljax.model.losses import check_labels, cross_entropies, mean_of_counted, next_tokens
from tljax.modules.readout import Readout, by_positions


@functools.partial(jax.jit, static_argnames="per_token")
def loss_of_stream(
    readout: Readout, residual: jax.Array, tokens: Any, attention_mask: Any, *, per_token: bool
) -> jax.Array:
    """Computes :func:`~tljax.model.losses.lm_cross_entropy_loss` of the final residual stream.

    A backward pass unembeds each chunk of positions again, instead of keeping its logits.

    Args:
        readout: the final norm and unembedding.
        residual: ``[batch, pos, d_model]``, after the last block.
        tokens, attention_mask, per_token: as there.

    Returns:
        The mean, or the loss of each token ``[batch, pos - 1]``.
    """
    vocab = readout.module.cfg.d_vocab_out
    check_labels(jax.ShapeDtypeStruct((*residual.shape[:2], vocab), residual.dtype), tokens)
    following, counted = next_tokens(tokens, attention_mask, vocab)
    losses = by_positions(token_losses, readout, residual[:, :-1], following).astype(residual.dtype)
    losses = jnp.where(counted, losses, 0)
    return losses if per_token else mean_of_counted(losses, counted)


def token_losses(readout: Readout, stream: jax.Array, following: jax.Array) -> jax.Array:
    """Computes the cross entropy ``[batch, pos]`` of the token after each position of a stream."""
    return cross_entropies(readout.logits(stream), following)
