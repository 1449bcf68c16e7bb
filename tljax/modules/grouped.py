"""Grouped matrix products, as in a mixture of experts: each row is multiplied by the matrix of its own group.

A row costs one product whatever the number of groups, and no group has a capacity to overflow:
rows are cut into tiles of one group each. (``jax.lax.ragged_dot`` does the same, but outside TPUs jax 0.10 lowers
it to a product of every row with every matrix, and it has no ``vmap`` over rows alone.)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Times = Callable[[jax.Array, Any, jax.Array | None], jax.Array]
"""Multiplies rows ``[row, in]`` by their group's of the matrices ``[group, in, out]``, and adds its bias ``[out]``.

Of a :class:`~tljax.quantized_weight.QuantizedWeight` only that group's matrix becomes floats.
"""

_TALLEST = 128


def grouped(
    compute: Callable[[jax.Array, Times], jax.Array], rows: jax.Array, group: jax.Array, n_groups: int
) -> jax.Array:
    """Applies a row-wise function that multiplies rows by the matrices of their group.

    Runs a static number of tiles one after another, and skips those without rows.

    Args:
        compute: takes rows ``[row, in]`` of one group and :data:`Times`, and returns ``[row, out]``; there may be rows
            of zeros among them.
        rows: ``[row, in]``.
        group: ``[row]`` int32, the group of each row.
        n_groups: number of groups.

    Returns:
        ``[row, out]``, in the order of ``rows``.
    """
    n_rows = len(group)
    height = tile_height(n_rows, n_groups)
    n_tiles = min(n_rows, -(-n_rows // height) + n_groups)
    order = jnp.argsort(group)
    sizes = (group[:, None] == jnp.arange(n_groups, dtype=group.dtype)[None]).sum(axis=0, dtype=jnp.int32)
    first_row = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
    tiles_of_group = -(-sizes // height)
    end_tile = jnp.cumsum(tiles_of_group, dtype=jnp.int32)
    first_tile = end_tile - tiles_of_group

    tile = jnp.arange(n_tiles, dtype=jnp.int32)
    owner = jnp.searchsorted(end_tile, tile, side="right").astype(jnp.int32)  # n_groups once there is no row left
    within = (tile - first_tile[owner])[:, None] * height + jnp.arange(height, dtype=jnp.int32)[None]
    inside = (within < sizes[owner][:, None]) & (owner < n_groups)[:, None]
    place = jnp.minimum(first_row[owner][:, None] + within, n_rows - 1)
    source = jnp.where(inside, order[place].astype(jnp.int32), n_rows)

    def run(rows_of_tile: jax.Array, owner: jax.Array) -> jax.Array:
        def times(x: jax.Array, matrices: Any, biases: jax.Array | None) -> jax.Array:
            product = x @ matrices[owner]
            return product if biases is None else product + biases[owner][None]

        return compute(rows_of_tile, times)

    def one(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows_of_tile = rows.at[part[0]].get(mode="fill", fill_value=0)
        like = jax.eval_shape(run, rows_of_tile, part[1])
        return jax.lax.cond(
            part[1] < n_groups, run, lambda *_: jnp.zeros(like.shape, like.dtype), rows_of_tile, part[1]
        )

    out = jax.lax.map(one, (source, owner))
    numbers = jnp.arange(n_rows, dtype=jnp.int32)
    rank = jnp.zeros_like(numbers).at[order].set(numbers, unique_indices=True)
    return out.reshape(n_tiles * height, -1)[first_tile[group] * height + rank - first_row[group]]


def tile_height(n_rows: int, n_groups: int) -> int:
    """Returns the rows of a tile: enough for a group of mean size, and one if most groups are empty."""
    mean = n_rows // n_groups
    return min(_TALLEST, 1 << mean.bit_length()) if mean else 1
