"""Which features are kept: the k-th largest value and where ties at it end, without sorting.

A selection is a :class:`Cut`: a value, and the last place at which an equal value is kept. The lowest index wins a tie,
and a batch of ``B`` tokens keeps ``int(k * B)`` features (fewer if fewer are positive).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

_ROWS = 32
"""Rows that one turn of the counting loop adds up."""

_EVERY = 0x7FFFFFFF
"""A row or column after every other one."""


class Cut(NamedTuple):
    """A selection of values.

    Attributes:
        value: the smallest value that is kept; scalar, or ``[rows]``.
        row: values equal to it are kept in rows before this one, ...
        column: ... and in this row up to and with this column.
    """

    value: jax.Array
    row: jax.Array
    column: jax.Array

    def keeps(self, values: jax.Array, first_row: jax.Array | int = 0) -> jax.Array:
        """Returns the mask of the values ``[rows, columns]`` that are kept.

        Args:
            values: the values, or some rows of them.
            first_row: the number of the first of these rows.
        """
        rows = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) + first_row
        columns = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
        before = (rows < _tall(self.row)) | ((rows == _tall(self.row)) & (columns <= _tall(self.column)))
        value = _tall(self.value)
        return (values > value) | ((values == value) & before)


def _tall(value: jax.Array) -> jax.Array:
    return value[:, None] if value.ndim else value[None, None]


def cut_rows(values: jax.Array, k: jax.Array, most: int) -> Cut:
    """Selects the ``k`` largest values of each row.

    Args:
        values: ``[rows, columns]``.
        k: how many, from 1 to ``most``; may be traced.
        most: the largest ``k`` that this program is compiled for.
    """
    largest, columns = jax.lax.top_k(jax.lax.stop_gradient(values), most)
    last = jnp.clip(k.astype(jnp.int32) - 1, 0, most - 1)
    rows = jnp.arange(values.shape[0], dtype=jnp.int32)
    value = jnp.take(largest, last, axis=1)
    return Cut(value, rows, jnp.take(columns, last, axis=1))


def cut_batch(values_of: Callable[[jax.Array], jax.Array], stored: jax.Array, keep: jax.Array, guess: jax.Array) -> Cut:
    """Selects the ``keep`` largest positive values of a batch; all positive ones if there are fewer.

    Each turn counts the values that are at least a candidate, and the next candidate is interpolated from the counts
    (log counts are nearly linear in the value). The result is exact and does not depend on ``guess``, which saves time
    if it is near.

    Args:
        values_of: function of some rows of ``stored`` that gives their values; it is computed anew in each turn.
        stored: float32 ``[rows, columns]``.
        keep: int32, how many.
        guess: a value near the result, such as that of the step before; 0 if there is none.
    """

    def at_least(candidate: jax.Array) -> jax.Array:
        return _count(values_of, stored, candidate, jnp.greater_equal)

    low, enough, above = _bracket(at_least, keep, guess)
    value = jnp.where(enough <= keep, _smallest(values_of, stored, low), low)
    surplus = enough > keep  # equal values at the cut
    row, column = _last_of_ties(values_of, stored, value, keep - above, surplus)
    return Cut(value, row, column)


def _bits(value: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(value, jnp.int32)


def _value(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


class _Search(NamedTuple):
    low: jax.Array  # bits of a value that enough values reach
    high: jax.Array  # bits of one that too few reach
    enough: jax.Array
    few: jax.Array
    spread: jax.Array  # relative step while only one side is known
    turn: jax.Array


def _bracket(
    at_least: Callable[[jax.Array], jax.Array], keep: jax.Array, guess: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns a value that ``keep`` values reach (or more, if they tie), how many do, and how many are larger."""
    smallest, infinite = _bits(jnp.float32(jnp.finfo(jnp.float32).tiny)), _bits(jnp.float32(jnp.inf))
    unknown = jnp.int32(-1)

    def unfinished(s: _Search) -> jax.Array:
        return (s.high - s.low > 1) & (s.enough != keep)

    def turn(s: _Search) -> _Search:
        bits = jnp.clip(_next(s, keep, guess), s.low + 1, s.high - 1)
        count = at_least(_value(bits))
        reached = count >= keep
        return _Search(
            jnp.where(reached, bits, s.low), jnp.where(reached, s.high, bits),
            jnp.where(reached, count, s.enough), jnp.where(reached, s.few, count),
            s.spread * 4, s.turn + 1,
        )  # fmt: skip

    start = _Search(smallest, infinite, unknown, unknown, jnp.float32(0.01), jnp.int32(0))
    end = jax.lax.while_loop(unfinished, turn, start)
    enough = jnp.where(end.enough < 0, keep, end.enough)  # never reached: every positive value is kept
    return _value(end.low), enough, jnp.maximum(end.few, 0)


def _next(s: _Search, keep: jax.Array, guess: jax.Array) -> jax.Array:
    """Returns the bits of the next candidate."""
    low, high = _value(s.low), _value(s.high)
    middle = s.low + (s.high - s.low) // 2
    first = _bits(jnp.where(guess > 0, guess, 1))
    up, down = _bits(low * (1 + s.spread)), _bits(high / (1 + s.spread))
    up, down = jnp.where(s.turn > 24, middle, up), jnp.where(s.turn > 24, middle, down)
    few, enough = jnp.maximum(s.few, 1).astype(jnp.float32), jnp.maximum(s.enough, 1).astype(jnp.float32)
    share = (jnp.log(enough) - jnp.log(keep.astype(jnp.float32))) / (jnp.log(enough) - jnp.log(few))
    between = _bits(low + (high - low) * jnp.clip(share, 0, 1))
    between = jnp.where((s.turn % 4 == 3) | ~jnp.isfinite(share), middle, between)
    one_sided = jnp.where(s.enough < 0, down, up)
    known = jnp.where((s.enough >= 0) & (s.few >= 0), between, one_sided)
    return jnp.where(s.turn == 0, first, known)


def _row_blocks(stored: jax.Array) -> jax.Array:
    size = next(n for n in range(min(_ROWS, stored.shape[0]), 0, -1) if stored.shape[0] % n == 0)
    return stored.reshape(-1, size, stored.shape[1])


def _count(
    values_of: Callable[[jax.Array], jax.Array],
    stored: jax.Array,
    candidate: jax.Array,
    compare: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Counts the values that compare to a candidate. On a CPU, adding blocks of rows is four times as fast as a sum."""

    def by_blocks(stored: jax.Array, candidate: jax.Array) -> jax.Array:
        def add(total: jax.Array, block: jax.Array) -> tuple[jax.Array, None]:
            return total + compare(values_of(block), candidate).astype(jnp.int32), None

        blocks = _row_blocks(stored)
        return jax.lax.scan(add, jnp.zeros(blocks.shape[1:], jnp.int32), blocks)[0].sum()

    def at_once(stored: jax.Array, candidate: jax.Array) -> jax.Array:
        return compare(values_of(stored), candidate).sum(dtype=jnp.int32)

    return jax.lax.platform_dependent(stored, candidate, cpu=by_blocks, default=at_once)


def _smallest(values_of: Callable[[jax.Array], jax.Array], stored: jax.Array, bound: jax.Array) -> jax.Array:
    """Returns the smallest value that is at least ``bound``; infinity if there is none."""

    def least(found: jax.Array, block: jax.Array) -> tuple[jax.Array, None]:
        values = values_of(block)
        return jnp.minimum(found, jnp.where(values >= bound, values, jnp.inf)), None

    blocks = _row_blocks(stored)
    return jax.lax.scan(least, jnp.full(blocks.shape[1:], jnp.inf, stored.dtype), blocks)[0].min()


def _last_of_ties(
    values_of: Callable[[jax.Array], jax.Array],
    stored: jax.Array,
    value: jax.Array,
    wanted: jax.Array,
    surplus: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the row and column of the last of the ``wanted`` first values that equal ``value``.

    A loop of no turns where there is no surplus, so that a step without ties does not pay for it.
    """

    def find(_: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        equal = values_of(stored) == value
        until = jnp.cumsum(equal.sum(axis=1, dtype=jnp.int32))
        row = jnp.argmax(until >= wanted).astype(jnp.int32)
        earlier = jnp.where(row > 0, until[jnp.maximum(row - 1, 0)], 0)
        within = jnp.cumsum(equal[row].astype(jnp.int32))
        column = jnp.argmax(within >= wanted - earlier).astype(jnp.int32)
        return row, column, jnp.bool_(False)

    every = jnp.int32(_EVERY)
    row, column, _ = jax.lax.while_loop(lambda state: state[2], find, (every, every, surplus))
    return row, column
