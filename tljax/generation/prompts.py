"""Reads the prompts that generation continues, and checks that the model has room for what follows."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from tljax.checks import is_traced, whole
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.text.batch import Batch
from tljax.text.chat import conversations
from tljax.text.inputs import prepare, texts_in
from tljax.text.padding import move_left
from tljax.text.positions import read_mask
from tljax.text.tokenizer import check_padding_side
from tljax.text.warned import warn_padded_right
from tljax.typing import PaddingSide

if TYPE_CHECKING:
    from tljax.model.hooked_transformer import HookedTransformer
    from tljax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts laid out for generation: padding, if any, is on the left.

    Attributes:
        kind: ``"str"``, ``"list"`` of strings, ``"tokens"`` or ``"embeds"``.
        value: token ids ``[batch, pos]``, or embeddings ``[batch, pos, d_model]``.
        mask: ``[batch, pos]``, ``False`` at padding.
        added_bos: whether texts were given a BOS token.
    """

    kind: str
    value: Any
    mask: np.ndarray
    added_bos: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.mask.shape[0], self.mask.shape[1]


def read_prompts(
    model: "HookedTransformer",
    input: Any,
    prepend_bos: bool | None,
    padding_side: PaddingSide | None,
    attention_mask: Any,
) -> Prompts:
    """Reads and checks the prompts to continue.

    Raises:
        InputError: not text, tokens or embeddings; a prompt without tokens; a mask that does not fit or has holes.

    Warns:
        PaddingWarning: some rows of a token array end in PAD, and no mask says whether that is padding.
    """
    cfg = model.cfg
    check_padding_side(padding_side)
    if is_traced(input):
        raise InputError("generate chooses tokens on concrete prompts: call it outside jax.jit, jax.grad and jax.vmap.")
    if cfg.attention_dir != "causal":
        raise InputError("A bidirectional model does not generate: its tokens depend on those that follow.")
    if getattr(input, "ndim", 0) == 3:
        embeds = jnp.asarray(input)
        prepare(cfg, None, embeds, start_at_layer=0)
        return Prompts("embeds", embeds.astype(cfg.jnp_dtype), _mask(attention_mask, embeds.shape[:2]), False)
    texts, chats = texts_in(input), conversations(input)
    if texts is None and chats is None and not _is_ragged(input):
        prepared = prepare(cfg, model._tokenizer, input, padding_side=padding_side, attention_mask=attention_mask)
        value, mask = np.asarray(prepared.value), prepared.token_mask
        if mask is None and attention_mask is None:
            _warn_if_padded_right(model._tokenizer, value)
        mask = np.ones(value.shape, bool) if mask is None else np.asarray(mask)
        return Prompts("tokens", *_padded_left(value, mask), False)
    bos = cfg.default_prepend_bos if prepend_bos is None else prepend_bos
    if texts is not None and not bos and "" in texts:
        raise InputError("An empty prompt needs a BOS token to start from: pass prepend_bos=True, or some text.")
    batch = model.to_batch(input, prepend_bos, "left")
    mask = np.asarray(batch.mask)
    if attention_mask is not None:
        shown = _mask(attention_mask, mask.shape)
        if (shown & ~mask).any():
            row = int(np.flatnonzero((shown & ~mask).any(axis=1))[0])
            raise InputError(
                f"attention_mask shows padding of prompt {row} as text. Prompts of {mask.sum(1).tolist()} tokens are "
                f"padded on the left to {mask.shape[1]}: leave the mask out, or hide what stands before them."
            )
        mask = shown
    single = isinstance(input, str) or (chats is not None and len(chats) == 1)
    kind = "tokens" if texts is None and chats is None else "str" if single else "list"
    return Prompts(kind, *_padded_left(np.asarray(batch.tokens), mask), texts is not None and bos)


def _is_ragged(input: Any) -> bool:
    if isinstance(input, Batch):
        return True
    return isinstance(input, list | tuple) and len({len(row) for row in input if np.ndim(row) == 1}) > 1


def _warn_if_padded_right(tokenizer: "Tokenizer | None", tokens: np.ndarray) -> None:
    if tokenizer is None or tokenizer.pad_token_id is None:
        return
    ends_in_pad = tokens[:, -1] == tokenizer.pad_token_id
    if ends_in_pad.any() and not ends_in_pad.all():
        warn_padded_right(int(np.flatnonzero(ends_in_pad)[0]))


def _mask(mask: Any, shape: Sequence[int]) -> np.ndarray:
    if mask is None:
        return np.ones(tuple(shape), bool)
    array = np.atleast_2d(read_mask(mask))
    if array.shape != tuple(shape) or not (np.diff(array.astype(int), axis=1) >= 0).all():
        raise InputError(
            f"attention_mask has shape {array.shape} for embeddings {tuple(shape)}: it needs one entry for each "
            "position, with padding on the left."
        )
    return array


def _padded_left(value: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows with their padding moved to the left."""
    edges = np.abs(np.diff(mask.astype(int), axis=1)).sum(axis=1)
    if not mask.any(axis=1).all():
        row = int(np.flatnonzero(~mask.any(axis=1))[0])
        raise InputError(f"Prompt {row} holds only padding. Give it at least one token, such as BOS.")
    if (edges > 1).any():
        row = int(np.flatnonzero(edges > 1)[0])
        raise InputError(
            f"The attention_mask of prompt {row} has a gap: generation needs all of its padding at one end."
        )
    return move_left(value, mask)


def check_switch(cfg: HookedTransformerConfig, prompts: Prompts, max_new_tokens: int) -> None:
    """Raises InputError if a text of a long-rope model would outgrow its short factors while its keys are kept."""
    if not cfg.uses_longrope:
        return
    switch, lengths = cfg.longrope_original_max_position_embeddings, prompts.mask.sum(axis=1)
    room = switch - lengths + 1  # the last new token never runs
    crossing = (lengths <= switch) & (max_new_tokens > room)
    if crossing.any():
        row = int(np.flatnonzero(crossing)[0])
        raise InputError(
            f"Prompt {row} has {lengths[row]} tokens and max_new_tokens={max_new_tokens}: beyond {switch} tokens this "
            "model rotates the whole text by other frequencies, and the keys in the cache would be those of before. "
            f"Ask for at most {int(room[crossing].min())}, or pass use_past_kv_cache=False."
        )


def check_room(cfg: HookedTransformerConfig, prompts: Prompts, max_new_tokens: int, runs_last: bool = False) -> None:
    """Raises InputError unless ``max_new_tokens`` is a positive number and the text fits into the model's context.

    The last new token is chosen but never run, so it needs no position unless ``runs_last``.
    """
    whole(max_new_tokens, "max_new_tokens", at_least=1)
    length = prompts.shape[1]
    runs = length + max_new_tokens - (not runs_last)
    if runs > cfg.n_ctx:
        over = runs - cfg.n_ctx
        shorten = f", or drop the first {over} tokens of the prompt" if over < length else ""
        raise InputError(
            f"The prompt has {length} tokens and max_new_tokens={max_new_tokens} more would pass this model's "
            f"n_ctx={cfg.n_ctx}. Ask for at most {cfg.n_ctx - length + (not runs_last)}{shorten}."
        )
