"""Reads of the logits: what was asked for, and the part of the unembedding that answers it."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tljax.config import HookedTransformerConfig
from tljax.errors import InputError, TljaxError
from tljax.modules.embedding import final_norm, finish_logits
from tljax.numerics import matmul_precision
from tljax.typing import Params

Parts = tuple[Any, Any, Any]
"""A read of ``[batch, pos, d_vocab]``: for each axis a number, a ``range``, or an array of indices."""

_REMEDIES = {
    "position": "Positions count from 0, and -1 is the last: compare model.to_str_tokens(prompt).",
    "token": "model.to_single_token(' word') gives the id of a token.",
    "prompt": "The first axis of the logits is the batch.",
}


class PositionNotKept(TljaxError, IndexError):
    """A metric read a position whose residual stream was not kept."""


def check_indices(indices: Any, size: int, what: str) -> None:
    """Raises InputError if an index is out of range, which JAX would clamp without a word.

    Args:
        indices: a number or an array of them; tracers are let through.
        size: length of the axis.
        what: ``"prompt"``, ``"position"`` or ``"token"``.
    """
    if isinstance(indices, Tracer):
        return
    array = np.asarray(indices)
    wrong = array[(array < -size) | (array >= size)]
    if wrong.size:
        raise InputError(
            f"There is no {what} {int(wrong.flat[0])} in these logits: they have {size} {what}s, so the last is "
            f"{size - 1}. {_REMEDIES[what]}"
        )


@dataclasses.dataclass(eq=False)
class Reads:
    """What a metric read of a :class:`LazyLogits`.

    Attributes:
        parts: each distinct read whose indices were known, by its key.
        unfollowed: something was read whose position is not known, so it may have been any.
        compiled: the logits went into a compiled function, which reads them unseen.
        length_asked: the number of positions was asked for.
        offsets: negative numbers that positions were named by.
        absolute: a position was named by something other than a negative number.
    """

    parts: dict[Any, Parts] = dataclasses.field(default_factory=dict)
    unfollowed: bool = False
    compiled: bool = False
    length_asked: bool = False
    offsets: set[int] = dataclasses.field(default_factory=set)
    absolute: bool = False
    _elsewhere: set[int] = dataclasses.field(default_factory=set)

    @property
    def positions(self) -> tuple[int, ...] | None:
        """The positions read, sorted; ``None`` if it may have been any."""
        if self.unfollowed:
            return None
        return tuple(sorted(self._elsewhere.union(*(np.ravel(pos).tolist() for _, pos, _ in self.parts.values()))))

    @property
    def offset(self) -> int | None:
        """The one negative number that named the position, if nothing read depends on how many positions there are."""
        alone = len(self.offsets) == 1 and not (self.absolute or self.length_asked or self.unfollowed)
        return next(iter(self.offsets)) if alone else None

    @property
    def elements(self) -> int:
        """How many logits were read."""
        return sum(map(_count, self.parts.values()))

    def whole_rows(self, d_vocab: int) -> bool:
        """Whether all of a position's logits were read."""
        return any(isinstance(tokens, range) and len(tokens) == d_vocab for _, _, tokens in self.parts.values())

    def record(self, key: Any, parts: Parts) -> None:
        """Notes a read; ``key`` is ``None`` where an index is a tracer."""
        if key is not None:
            self.parts[key] = parts
        elif isinstance(parts[1], Tracer):
            self.unfollowed = True
        else:
            self._elsewhere.update(np.ravel(parts[1]).tolist())


def _count(parts: Parts) -> int:
    ranges = [len(part) for part in parts if isinstance(part, range)]
    picks = np.broadcast_shapes(*(np.shape(part) for part in parts if not isinstance(part, range)))
    return math.prod((*ranges, *picks))


def read_key(parts: Parts) -> Any:
    """A hashable name of a read, or ``None`` if an index is a tracer."""
    if any(isinstance(part, Tracer) for part in parts):
        return None
    return tuple((part.shape, part.tobytes()) if isinstance(part, np.ndarray) else part for part in parts)


def locate(parts: Parts, kept: int | None, trusted: bool = False) -> Parts:
    """The same read of a residual stream that holds only position ``kept``.

    Args:
        parts: a read of all positions.
        kept: the position, or ``None`` if all are there.
        trusted: whether a tracer may be taken for ``kept``.

    Raises:
        PositionNotKept: it reads another position.
    """
    if kept is None:
        return parts
    batch, pos, token = parts
    if isinstance(pos, Tracer):
        if trusted:
            return batch, jnp.zeros_like(pos), token
        raise PositionNotKept(f"The metric read a position that it computes, and only {kept} was kept.")
    if any(p != kept for p in np.ravel(pos)):
        raise PositionNotKept(f"The metric read other positions than {kept}, the only one that was kept.")
    if isinstance(pos, range):
        return batch, range(len(pos)), token
    return batch, 0 if isinstance(pos, int) else np.zeros_like(pos), token


def unembed(cfg: HookedTransformerConfig, params: Params, residual: Any, parts: Parts, each: bool = False) -> jax.Array:
    """Final norm and unembedding of some positions, to some tokens.

    Recompiles for other ranges and other shapes of index arrays, never for other indices.

    Args:
        cfg: the model's config.
        params: ``ln_final`` and ``unembed``.
        residual: final residual stream ``[batch, pos, d_model]``; with ``each`` a stack of them ``[row, ...]``.
        parts: what to read.
        each: do it for each row.

    Returns:
        What ``logits[parts]`` would hold, by NumPy's rules; with ``each``, one for each row.
    """
    if isinstance(residual, np.ndarray) and isinstance(parts[1], int):
        # cut on the host, so that runs of different lengths share the program
        residual = residual[..., parts[1] : parts[1] + 1, :]
        parts = (parts[0], 0, parts[2])
    ranges = tuple(part if isinstance(part, range) else None for part in parts)
    picks = tuple(_as_pick(part) for part in parts if not isinstance(part, range))
    run = _unembed_each if each else _unembed_one
    return run(cfg, ranges, params, residual, picks)


def _as_pick(part: Any) -> Any:
    return part if isinstance(part, jax.Array) else np.asarray(part, np.int32)


def _unembed(
    cfg: HookedTransformerConfig,
    ranges: tuple[range | None, ...],
    params: Params,
    residual: Any,
    picks: tuple[Any, ...],
) -> jax.Array:
    remaining = iter(picks)
    indices: list[Any] = [next(remaining) if r is None else _as_slice(r) for r in ranges]
    batch, pos, token = indices
    free = [axis for axis in (0, 1) if ranges[axis] is not None]
    residual = jnp.asarray(residual)
    if len(free) == 1:
        rows = residual[batch][:, pos] if free == [0] else residual[:, pos][batch]
    else:
        rows = residual[batch, pos]
    unembed = params["unembed"]
    weight, bias = unembed["W_U"][:, token], unembed["b_U"][token]
    with matmul_precision(cfg):
        rows: Any = final_norm(cfg).apply({"params": params.get("ln_final", {})}, rows)
        if "W_proj" in unembed:
            rows = rows @ unembed["W_proj"]
        if ranges[2] is not None:
            logits = jnp.einsum("...d,dv->...v", rows, weight)
        else:
            rows = jnp.moveaxis(rows, -2, 0) if free == [1] else rows
            logits = _paired(rows, jnp.moveaxis(weight, 0, -1), len(free))
        logits = logits + _padded(bias, logits.ndim)
    if free == [1] and ranges[2] is None and max(batch.ndim, token.ndim):
        # indices on both sides of a slice: NumPy puts their axes first
        logits = jnp.moveaxis(logits, 0, -1)
    return finish_logits(cfg, logits)


_unembed_one = jax.jit(_unembed, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _unembed_each(cfg: Any, ranges: Any, params: Params, residual: Any, picks: Any) -> jax.Array:
    return jax.vmap(lambda one: _unembed(cfg, ranges, params, one, picks))(residual)


def _as_slice(numbers: range) -> slice:
    if not numbers:
        return slice(0, 0)
    return slice(numbers.start, numbers.stop if numbers.stop >= 0 else None, numbers.step)


def _padded(array: jax.Array, ndim: int) -> jax.Array:
    return array.reshape((1,) * (ndim - array.ndim) + array.shape)


def _paired(rows: jax.Array, columns: jax.Array, n_free: int) -> jax.Array:
    """Dot products of rows ``[*free, *picked, d_model]`` with columns ``[*picked, d_model]``, picked axes broadcast."""
    picked = rows.shape[n_free:-1]
    if not picked:
        return jnp.tensordot(rows, columns, (-1, -1))
    rank = max(len(picked), columns.ndim - 1)
    rows = rows.reshape(*rows.shape[:n_free], *(1,) * (rank - len(picked)), *picked, rows.shape[-1])
    return jnp.einsum("...d,...d->...", rows, _padded(columns, rows.ndim))
