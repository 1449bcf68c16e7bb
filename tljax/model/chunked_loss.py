"""The loss of a residual stream, unembedded some positions at a time: the logits of all are never in memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tljax.memory import WORKING_BYTES
from tljax.model.losses import check_labels, cross_entropies, mean_of_counted, next_tokens
from tljax.modules.embedding import HeadStage
from tljax.numerics import matmul_precision
from tljax.typing import Params

CPU_BYTES = 26 * 2**20
"""Most bytes of logits at once on a CPU: products as fast as of all of them, and little memory."""


@functools.partial(jax.jit, static_argnames=("module", "per_token"))
def loss_of_stream(
    params: Params, residual: jax.Array, tokens: Any, attention_mask: Any, *, module: HeadStage, per_token: bool
) -> jax.Array:
    """Computes :func:`~tljax.model.losses.lm_cross_entropy_loss` of the final residual stream.

    A backward pass unembeds each chunk of positions again, instead of keeping its logits.

    Args:
        params: ``ln_final`` and ``unembed``.
        residual: ``[batch, pos, d_model]``, after the last block.
        tokens, attention_mask, per_token: as there.
        module: the final norm and unembedding.

    Returns:
        The mean, or the loss of each token ``[batch, pos - 1]``.
    """
    vocab = module.cfg.d_vocab_out
    batch, pos, width = residual.shape
    check_labels(jax.ShapeDtypeStruct((batch, pos, vocab), residual.dtype), tokens)
    following, counted = next_tokens(tokens, attention_mask, vocab)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_chunk(params: Params, stream: jax.Array, following: jax.Array) -> jax.Array:
        logits: Any = module.apply({"params": params}, stream)
        return cross_entropies(logits, following)

    scored = pos - 1
    size = chunk_of_positions(batch, vocab, residual.dtype.itemsize)
    with matmul_precision(module.cfg):
        if size >= scored:
            losses = of_chunk(params, residual[:, :-1], following)
        else:
            count = -(-scored // size)
            extra = count * size - scored
            stream = jnp.pad(residual[:, :-1], ((0, 0), (0, extra), (0, 0)), mode="edge")
            stream = jnp.moveaxis(stream.reshape(batch, count, size, width), 1, 0)
            labels = jnp.pad(following, ((0, 0), (0, extra))).reshape(batch, count, size).swapaxes(0, 1)
            losses = jax.lax.map(lambda chunk: of_chunk(params, *chunk), (stream, labels))
            losses = losses.swapaxes(0, 1).reshape(batch, -1)[:, :scored]
    losses = jnp.where(counted, losses, 0)
    return losses if per_token else mean_of_counted(losses, counted)


def chunk_of_positions(batch: int, vocab: int, itemsize: int) -> int:
    """Returns how many positions of each prompt are unembedded at once."""
    fit = CPU_BYTES if jax.default_backend() == "cpu" else WORKING_BYTES
    return max(1, fit // (batch * vocab * itemsize))
