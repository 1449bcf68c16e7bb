"""Turns what a user passes to a model (text, lists of text, token ids, a residual stream) into checked arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import is_traced, typed, whole
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.text.batch import Batch
from tljax.text.positions import count_positions, read_mask
from tljax.text.tokenizer import Tokenizer, check_padding_side
from tljax.text.tokens import get_attention_mask, to_tokens
from tljax.typing import PaddingSide

LayerBounds = tuple[int | None, int | None]
"""The first layer to run and the layer to stop before; ``None`` means from the input, or to the output."""


@dataclasses.dataclass(frozen=True)
class ModelInput:
    """A checked input.

    Attributes:
        value: token ids ``[batch, pos]`` or residual stream ``[batch, pos, d_model]``.
        tokens: token ids, if known (the loss needs them).
        positions: ``[batch, pos]`` position of each token; ``None`` means 0, 1, 2, …
        token_mask: ``[batch, pos]``, ``False`` at keys that attention must not see; ``None`` means it may see all.
        text: ``[batch, pos]``, ``False`` at padding, which the loss and positions leave out; ``None`` means no padding.
    """

    value: jax.Array | np.ndarray
    tokens: jax.Array | np.ndarray | None
    positions: jax.Array | None = None
    token_mask: jax.Array | None = None
    text: jax.Array | None = None

    @property
    def batch_and_pos(self) -> tuple[int, int]:
        """Batch size and sequence length."""
        return self.value.shape[0], self.value.shape[1]


def texts_in(prompts: Any) -> list[Any] | None:
    """Returns the texts of prompts that are a string, or a list with a string in it; ``None`` for other prompts."""
    if isinstance(prompts, str):
        return [prompts]
    return list(prompts) if isinstance(prompts, list | tuple) and any(isinstance(p, str) for p in prompts) else None


@typed
def prepare(
    cfg: HookedTransformerConfig,
    tokenizer: Tokenizer | None,
    input: Any,
    *,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
    attention_mask: Any = None,
    tokens: Any = None,
    start_at_layer: int | None = None,
) -> ModelInput:
    """Checks an input and works out positions and masks.

    A :class:`~tljax.text.batch.Batch` brings its own mask and positions, and both are used whatever its padding side.

    Raises:
        InputError: wrong type or shape, a token id outside the vocabulary, a sequence longer than ``n_ctx``, text
            without a tokenizer, a mask that does not match.
    """
    if isinstance(input, Batch) or isinstance(tokens, Batch):
        _check_batch(tokens if isinstance(tokens, Batch) else input, attention_mask, padding_side)
    check_padding_side(padding_side)
    if prepend_bos and start_at_layer is None:
        _check_bos(tokenizer, input)
    prepend_bos = cfg.default_prepend_bos if prepend_bos is None else prepend_bos
    if start_at_layer is not None:
        return _prepare_residual(cfg, input, tokens, attention_mask)
    if isinstance(input, Batch):
        return _prepare_batch(cfg, input)
    mask = None
    if texts_in(input) is not None:
        if tokenizer is None:
            raise InputError(
                "The input is text and this model has no tokenizer. Pass token ids, or attach a tokenizer with "
                "model = model.set_tokenizer(tokenizer)."
            )
        ids = to_tokens(
            tokenizer,
            input,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            truncate=False,
        )
        check_length(cfg, ids.shape[1], is_text=True)
        mask = get_attention_mask(tokenizer, ids, prepend_bos, padding_side)
        input = ids
    ids = check_tokens(cfg, input)
    side = padding_side or (tokenizer.padding_side if tokenizer else "right")
    if attention_mask is not None:
        mask = _check_mask(attention_mask, ids.shape)
    elif mask is None and side == "left" and tokenizer is not None:
        mask = get_attention_mask(tokenizer, ids, prepend_bos, side)
    if mask is not None and not is_traced(mask) and bool(np.all(np.asarray(mask))):
        mask = None
    used = attention_mask is not None or side == "left" or cfg.attention_dir == "bidirectional" or cfg.uses_longrope
    text = None if mask is None else jnp.asarray(mask).astype(bool)
    return ModelInput(ids, ids, *(_placed(text) if used else (None, None)), text)


def _check_bos(tokenizer: Tokenizer | None, input: Any) -> None:
    """Refuses ``prepend_bos=True`` for token ids that do not start with BOS: only texts get one."""
    tokens = input.tokens if isinstance(input, Batch) else input
    if is_traced(tokens) or texts_in(tokens) is not None or tokenizer is None or tokenizer.bos_token_id is None:
        return
    try:
        rows = np.atleast_2d(np.asarray(tokens))
    except ValueError:
        return  # check_tokens says what is wrong
    if rows.size and np.issubdtype(rows.dtype, np.integer) and not (rows == tokenizer.bos_token_id).any(axis=1).all():
        raise InputError(
            "prepend_bos=True came with token ids that do not start with BOS: only texts get one. Pass the text, or "
            f"put the id in front yourself (BOS is {tokenizer.bos_token_id})."
        )


def _placed(mask: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns positions counted from the first visible token, and the mask itself."""
    return (None, None) if mask is None else (count_positions(mask), mask)


def _check_batch(batch: Batch, attention_mask: Any, padding_side: PaddingSide | None) -> None:
    if attention_mask is not None:
        raise InputError(
            "attention_mask= came together with a Batch, which has a mask of its own. Leave attention_mask= out, or "
            "make the Batch from it: Batch.from_mask(tokens, attention_mask)."
        )
    if padding_side is not None and padding_side != batch.padding_side:
        raise InputError(
            f"padding_side={padding_side!r} came together with a Batch padded {batch.padding_side}. Leave it out, or "
            f"pad anew: model.to_batch(batch, padding_side={padding_side!r})."
        )
    batch.check()


def _prepare_batch(cfg: HookedTransformerConfig, batch: Batch) -> ModelInput:
    ids = check_tokens(cfg, batch.tokens)
    if not is_traced(batch.mask) and bool(np.all(np.asarray(batch.mask))):
        return ModelInput(ids, ids)
    mask = jnp.asarray(batch.mask)
    return ModelInput(ids, ids, jnp.asarray(batch.positions), mask, mask)


def check_tokens(cfg: HookedTransformerConfig, tokens: Any) -> Any:
    """Returns token ids as int32 ``[batch, pos]``; a single sequence gets a batch axis.

    Raises:
        InputError: not integers, not one or two dimensions, empty, too long, or an id outside the vocabulary.
    """
    if is_traced(tokens) or isinstance(tokens, jax.Array):
        ids = tokens
    else:
        try:
            ids = np.asarray(tokens)
        except ValueError as error:
            raise InputError(
                "The token lists have different lengths. Pad them, or pass text and let to_tokens pad."
            ) from error
    if ids.size == 0:
        raise InputError(
            f"The input holds no tokens (shape {tuple(ids.shape)}). Pass at least one, such as a BOS token."
        )
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        hint = (
            " To feed a residual stream, also pass start_at_layer=." if jnp.issubdtype(ids.dtype, jnp.floating) else ""
        )
        raise InputError(f"Token ids must be integers, got dtype {ids.dtype}.{hint}")
    if ids.ndim not in (1, 2):
        raise InputError(f"Token ids must have shape [pos] or [batch, pos], got {tuple(ids.shape)}.")
    if ids.ndim == 1:
        ids = ids[None]
    check_length(cfg, ids.shape[1])
    return check_ids(cfg, ids)


def check_ids(cfg: HookedTransformerConfig, ids: Any, where: str = "") -> Any:
    """Returns token ids ``[..., pos]`` as int32; ``where`` is added to the position in the error.

    Raises:
        InputError: one of them is outside the vocabulary.
    """
    if not is_traced(ids):
        host = np.atleast_1d(np.asarray(ids))
        outside = (host < 0) | (host >= cfg.d_vocab)
        if outside.any():
            at = tuple(np.argwhere(outside)[0])
            place = f"batch {at[0]}, position {at[1]}" if len(at) == 2 else f"position {', '.join(map(str, at))}"
            raise InputError(
                f"Token id {int(host[at])} at {place}{where} is outside the vocabulary (0 to {cfg.d_vocab - 1}). Were "
                "these tokens made with another model's tokenizer?"
            )
    return ids.astype(jnp.int32)


def check_length(cfg: HookedTransformerConfig, length: int, is_text: bool = False) -> None:
    """Raises InputError if a sequence is longer than the model's context."""
    if length > cfg.n_ctx:
        cut = f"cut it on purpose (model.to_tokens(text) keeps its first {cfg.n_ctx} tokens), " if is_text else ""
        raise InputError(
            f"The {'text' if is_text else 'sequence'} has {length} tokens; this model takes at most n_ctx={cfg.n_ctx}. "
            f"Shorten it, {cut}split it into windows, or (rotary models) load with a larger n_ctx=."
        )


def _check_mask(mask: Any, shape: tuple[int, ...]) -> jax.Array:
    array = read_mask(mask)
    if array.ndim == 1:
        array = array[None]
    if tuple(array.shape) != tuple(shape):
        raise InputError(f"attention_mask has shape {tuple(array.shape)}; the tokens have shape {tuple(shape)}.")
    return jnp.asarray(array)


def _prepare_residual(cfg: HookedTransformerConfig, residual: Any, tokens: Any, attention_mask: Any) -> ModelInput:
    if isinstance(residual, str | list | tuple | Batch):
        raise InputError(
            "start_at_layer= needs the residual stream entering that layer, an array [batch, pos, d_model], such as "
            f"cache['resid_pre', layer]; got {type(residual).__name__}."
        )
    array = jnp.asarray(residual)
    if array.ndim != 3 or array.shape[-1] != cfg.d_model or not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(
            f"With start_at_layer= the input is the residual stream [batch, pos, {cfg.d_model}], floating point; got "
            f"shape {tuple(array.shape)}, dtype {array.dtype}."
        )
    check_length(cfg, array.shape[1])
    if isinstance(tokens, Batch):
        tokens, attention_mask = tokens.tokens, tokens.mask
    ids = None if tokens is None else check_tokens(cfg, tokens)
    if ids is not None and tuple(ids.shape) != tuple(array.shape[:2]):
        raise InputError(f"tokens has shape {tuple(ids.shape)}; the residual stream has {tuple(array.shape[:2])}.")
    mask = None if attention_mask is None else _check_mask(attention_mask, array.shape[:2])
    text = None if mask is None else mask.astype(bool)
    return ModelInput(array.astype(cfg.jnp_dtype), ids, *_placed(text), text)


def layer_bounds(cfg: HookedTransformerConfig, start_at_layer: int | None, stop_at_layer: int | None) -> LayerBounds:
    """Returns the bounds as non-negative layer numbers.

    Raises:
        InputError: a bound is out of range, or start comes after stop.
    """

    def positive(name: str, layer: int | None, last: int) -> int | None:
        if layer is None:
            return None
        if not -cfg.n_layers <= whole(layer, name) <= last:
            raise InputError(f"{name}={layer} is out of range: the model has {cfg.n_layers} layers.")
        return layer + cfg.n_layers if layer < 0 else layer

    start = positive("start_at_layer", start_at_layer, cfg.n_layers)
    stop = positive("stop_at_layer", stop_at_layer, cfg.n_layers)
    if start is not None and stop is not None and start > stop:
        raise InputError(f"start_at_layer={start} comes after stop_at_layer={stop} (which is exclusive).")
    return start, stop
