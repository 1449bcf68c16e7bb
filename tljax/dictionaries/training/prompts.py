"""Prompts as batches of tokens that are a function of the step, for training that runs the model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from tljax.errors import InputError
from tljax.model.hooked_transformer import HookedTransformer
from tljax.modules.context import AttentionContext
from tljax.sizes import prompt_length
from tljax.text.inputs import check_tokens
from tljax.text.padding import pad_axis
from tljax.text.positions import count_positions
from tljax.train.batches import rows_of


class TokenBatch(NamedTuple):
    """Tokens of one step.

    Attributes:
        tokens: ids, ``[batch, pos]``.
        context: their positions and padding.
        text: which are text and not padding, ``[batch, pos]``.
        counts: which of these the dictionary reconstructs and the loss counts.
    """

    tokens: Any
    context: AttentionContext
    text: Any
    counts: Any


def token_batches(
    model: HookedTransformer,
    prompts: Any,
    batch_size: int,
    seed: int,
    excluded: tuple[int, ...],
    prepend_bos: bool | None,
) -> Callable[[int], TokenBatch]:
    """Returns batches of tokens as a function of the step.

    Args:
        model: the model that reads them.
        prompts: prompts in any form, shuffled anew in each epoch; or a function from the step to some.
        batch_size: prompts in a batch, if ``prompts`` is no function.
        seed: of the shuffling.
        excluded: ids of tokens that do not count.
        prepend_bos: whether texts get a BOS token.

    Raises:
        InputError: there are fewer prompts than ``batch_size``; or, by the function, a batch has no token that counts.
    """
    if callable(prompts):

        def given(step: int) -> TokenBatch:
            batch = model.to_batch(prompts(step), prepend_bos, "right")
            length = prompt_length(batch.tokens.shape[1], model.cfg.n_ctx)  # few lengths, to compile few programs
            tokens, text = (pad_axis(np.asarray(one), length) for one in (batch.tokens, batch.mask))
            return _token_batch(model, tokens, text, excluded, step, masked=not text.all())

        return given
    whole = model.to_batch(prompts, prepend_bos, "right")
    tokens, text = np.asarray(whole.tokens), np.asarray(whole.mask)
    choose, masked = rows_of(np.arange(len(tokens)), batch_size, seed), not text.all()

    def chosen(step: int) -> TokenBatch:
        rows = choose(step)
        return _token_batch(model, tokens[rows], text[rows], excluded, step, masked)

    return chosen


def _token_batch(
    model: HookedTransformer, tokens: np.ndarray, text: np.ndarray, excluded: tuple[int, ...], step: int, masked: bool
) -> TokenBatch:
    """Returns a batch; ``masked``: attention is told what is padding."""
    counts = text & ~np.isin(tokens, excluded)
    if not counts.any():
        raise InputError(
            f"All {int(text.sum())} tokens of the batch of step {step} are excluded: nothing is left to train on. "
            "Exclude fewer, or give longer prompts."
        )
    context = AttentionContext()
    if masked:
        positions, mask = jax.device_put((count_positions(text), text))
        context = AttentionContext(positions, mask, text=mask)
    return TokenBatch(check_tokens(model.cfg, tokens), context, text, counts)
