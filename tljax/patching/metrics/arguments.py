"""Checks of a metric's arguments, and reads of logits at the positions and tokens that they name."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tljax.checks import fits_int32
from tljax.errors import InputError
from tljax.numerics import widened
from tljax.patching.metrics.lazy_logits import LazyLogits
from tljax.patching.metrics.reads import check_indices
from tljax.text import positions
from tljax.text.batch import Batch
from tljax.text.positions import read_mask


def token_ids(value: Any, owner: str) -> Any:
    """Checks token ids and converts them to int32 on the host (tracers stay tracers)."""
    if isinstance(value, Tracer) and jnp.issubdtype(value.dtype, jnp.integer):
        return value.astype(jnp.int32)
    array = np.asarray(value)
    if array.dtype.kind not in "iu":
        example = str(array.flat[0]) if array.dtype.kind == "U" and array.size else " word"
        raise InputError(
            f"{owner} got {value!r}; it takes token ids: an integer, or one for each prompt. "
            f"model.to_single_token({example!r}) gives the id of a word."
        )
    if not fits_int32(array):
        raise InputError(f"{owner} got {value!r}: no token has such an id, they are below {2**31}.")
    return array.astype(np.int32)


def position(pos: Any, owner: str) -> Any:
    if isinstance(pos, Tracer) and pos.ndim == 1 and jnp.issubdtype(pos.dtype, jnp.integer):
        return pos.astype(jnp.int32)
    array = np.asarray(pos)
    if array.dtype.kind not in "iu" or array.ndim > 1:
        raise InputError(f"{owner}(pos=...) got {pos!r}; it takes a position, or one for each prompt [batch].")
    if not fits_int32(array):
        raise InputError(f"{owner}(pos=...) got {pos!r}: no prompt has such a position.")
    return array.astype(np.int32) if array.ndim else int(array)


def places_in_text(pos: Any, attention_mask: Any, owner: str) -> Any:
    """Converts positions in each prompt's text to positions in the padded array, ``[batch]``."""
    mask = read_mask(mask_in(attention_mask))
    if mask.ndim != 2 or (not isinstance(pos, int) and len(pos) != len(mask)):
        raise InputError(
            f"{owner} got a mask of shape {tuple(mask.shape)}, with pos={pos}: it is [batch, pos], as the prompts are, "
            "with one position for all, or one for each."
        )
    numbers = np.full((len(mask), 1), pos) if isinstance(pos, int) else pos[:, None]
    places, there = positions.find(mask, numbers)
    if not isinstance(there, Tracer) and not np.asarray(there).all():
        row = int(np.flatnonzero(~np.asarray(there))[0])
        wrong = row, int(np.asarray(numbers)[row, 0]), int(mask[row].sum())
        raise InputError(f"{owner}(pos=...): {positions.no_such_position(*wrong)}")
    return places[:, 0]


def mask_in(attention_mask: Any) -> Any:
    return attention_mask.mask if isinstance(attention_mask, Batch) else attention_mask


def moves(pos: Any, attention_mask: Any, owner: str) -> bool:
    """Whether padding moves a position of the text to another one in the array, in any prompt."""
    places = np.asarray(places_in_text(pos, attention_mask, owner))
    return bool((places != np.asarray(pos) % np.shape(mask_in(attention_mask))[1]).any())


def sizes(logits: Any, owner: str) -> tuple[int, int]:
    """Returns the number of prompts and the size of the vocabulary."""
    if logits.ndim != 3:
        raise InputError(
            f"{owner} got logits of {logits.ndim} axes; it takes [batch, pos, d_vocab], as model(tokens) gives them."
        )
    return len(logits), logits.shape[2]


def each_prompt(ids: Any, batch: int, d_vocab: int, owner: str) -> Any:
    """Checks token ids and returns them as ``[batch, k]``."""
    if not isinstance(ids, Tracer):
        check_indices(ids, d_vocab, "token")
        if np.size(ids) and int(np.min(ids)) < 0:
            raise InputError(f"{owner} got the token id {int(np.min(ids))}; ids run from 0 to {d_vocab - 1}.")
    if ids.ndim == 0:
        return jnp.broadcast_to(ids, (batch, 1)) if isinstance(ids, jax.Array) else np.broadcast_to(ids, (batch, 1))
    if ids.ndim > 2 or len(ids) != batch:
        raise InputError(
            f"{owner} got token ids of shape {tuple(ids.shape)} for {batch} prompts: give one id, one for each prompt "
            f"[{batch}], or several for each prompt [{batch}, k]."
        )
    return ids if ids.ndim == 2 else ids[:, None]


def check_pos(logits: Any, pos: Any, owner: str) -> None:
    """Raises InputError if a position does not exist; lazy logits check that themselves."""
    if not isinstance(pos, int) and len(pos) != len(logits):
        raise InputError(
            f"{owner} got {len(pos)} positions for {len(logits)} prompts: give one for all, or one for each."
        )
    if not isinstance(logits, LazyLogits):
        check_indices(pos, logits.shape[1], "position")


def wide(array: Any) -> jax.Array:
    """Converts an array to floats of at least 32 bits."""
    array = jnp.asarray(array)
    return array.astype(widened(array.dtype) if jnp.issubdtype(array.dtype, jnp.floating) else jnp.float32)


def picked_logits(logits: Any, ids: Any, pos: Any, owner: str) -> jax.Array:
    """Returns the logits of ``ids`` at ``pos``, averaged over the ids of each prompt, ``[batch]``."""
    batch, d_vocab = sizes(logits, owner)
    ids = each_prompt(ids, batch, d_vocab, owner)
    check_pos(logits, pos, owner)
    rows = np.arange(batch)[:, None]
    picked = wide(logits[rows, pos if isinstance(pos, int) else pos[:, None], ids])
    return _at_known_positions(_where_known(picked, ids, 0, d_vocab), logits, pos).mean(axis=-1)


def rows_at(logits: Any, pos: Any, owner: str) -> jax.Array:
    """Returns all logits at ``pos``, ``[batch, d_vocab]``."""
    batch, _ = sizes(logits, owner)
    check_pos(logits, pos, owner)
    if isinstance(pos, int):
        return wide(logits[:, pos])
    return _at_known_positions(wide(logits[np.arange(batch), pos]), logits, pos)


def picked_from_rows(rows: jax.Array, ids: Any) -> jax.Array:
    return _where_known(jnp.take_along_axis(rows, jnp.asarray(ids), axis=-1), ids, 0, rows.shape[-1])


def _at_known_positions(picked: jax.Array, logits: Any, pos: Any) -> jax.Array:
    if isinstance(pos, int) or isinstance(logits, LazyLogits):  # lazy logits are of positions that were looked at
        return picked
    return _where_known(picked, pos[:, None], -logits.shape[1], logits.shape[1])


def _where_known(picked: jax.Array, numbers: Any, low: int, high: int) -> jax.Array:
    """Puts NaN where a traced index, which could not be checked, is out of range: JAX would clamp it."""
    if not isinstance(numbers, Tracer):
        return picked
    return jnp.where(jnp.broadcast_to((numbers >= low) & (numbers < high), picked.shape), picked, jnp.nan)


def mask_of(mask: Any, shape: tuple[int, ...]) -> jax.Array:
    """Checks an attention mask and returns it as booleans ``[batch, pos]``."""
    if mask.shape != shape:
        raise InputError(f"The attention mask has shape {tuple(mask.shape)}; these prompts need {shape}.")
    return jnp.asarray(read_mask(mask))


def mean_where(values: jax.Array, counted: jax.Array | None) -> jax.Array:
    """Returns the mean over the positions that count, ``[batch]``."""
    if counted is None:
        return values.mean(axis=-1)
    return jnp.where(counted, values, 0).sum(axis=-1) / counted.sum(axis=-1).astype(values.dtype)
