"""Language-model loss and accuracy, as TransformerLens defines them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def _pair_mask(attention_mask: jax.Array) -> jax.Array:
    """Positions where both the token and the one it predicts are text, ``[batch, pos - 1]``."""
    visible = attention_mask.astype(bool)
    return visible[:, :-1] & visible[:, 1:]


def lm_cross_entropy_loss(
    logits: Float[Array, "batch pos d_vocab"],
    tokens: Int[Array, "batch pos"],
    attention_mask: Int[Array, "batch pos"] | Bool[Array, "batch pos"] | None = None,
    per_token: bool = False,
) -> Float[Array, ""] | Float[Array, "batch pos_minus_1"]:
    """Cross entropy of each next token, in nats.

    Args:
        logits: ``[batch, pos, d_vocab]``.
        tokens: ``[batch, pos]``; position ``p`` is scored on predicting token ``p + 1``.
        attention_mask: ``[batch, pos]``, 0 at padding; pairs that touch padding do not count.
        per_token: return ``[batch, pos - 1]`` (0 where masked) instead of the mean.

    Returns:
        The mean over counted pairs, or the loss of each.
    """
    log_probs = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    losses = -jnp.take_along_axis(log_probs, tokens[:, 1:, None].astype(jnp.int32), axis=-1)[..., 0]
    if attention_mask is None:
        return losses if per_token else losses.mean()
    counted = _pair_mask(attention_mask)
    losses = jnp.where(counted, losses, 0)
    return losses if per_token else losses.sum() / counted.sum().astype(losses.dtype)


def lm_accuracy(
    logits: Float[Array, "batch pos d_vocab"], tokens: Int[Array, "batch pos"], per_token: bool = False
) -> Float[Array, ""] | Bool[Array, "batch pos_minus_1"]:
    """How often the most likely next token is the true one; ``per_token`` returns the hits ``[batch, pos - 1]``."""
    hits = logits[:, :-1].argmax(axis=-1) == tokens[:, 1:]
    return hits if per_token else hits.mean()
