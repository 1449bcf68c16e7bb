"""Packed runs: suffixes of many runs of the same prompts, laid end to end as one sequence.

A patched run differs from its base run only from the patched position on, so only that suffix is computed, and suffixes
of different lengths share one batch without padding. Everything that acts on one token at a time (norms, projections,
MLPs) sees a plain sequence ``[1, token]``; attention alone needs each row whole, so keys and values are laid out as
``[row, position]``, with those of the base run where a row has no token of its own.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packing:
    """Layout of a packed run: where its tokens belong.

    Attributes:
        past_k, past_v: ``[prompt, pos, kv_head, d_head]``, the base run's (rotated) keys and its values.
        key_source: ``[row, pos]``, the token at each position of a row: a packed token's index, or the number of packed
            tokens plus the index of a base token in ``past_k``, flattened.
        query_source: ``[row, query]``, index of each query among the computed ones; arbitrary where a row has none.
        query_pos: ``[query]``, position of each query column.
        slot: ``[computed query]``, its index in ``[row, query]``, flattened.
        computed: ``[computed query]``, the packed tokens whose output is needed; ``None`` means all of them.
    """

    past_k: jax.Array
    past_v: jax.Array
    key_source: jax.Array
    query_source: jax.Array
    query_pos: jax.Array
    slot: jax.Array
    computed: jax.Array | None = None

    def lay_out_queries(self, q: jax.Array) -> jax.Array:
        """Maps ``[1, computed query, head, d_head]`` to ``[row, query, head, d_head]``."""
        return q[0][self.query_source]

    def lay_out_keys(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps keys and values ``[1, token, kv_head, d_head]`` to ``[row, pos, kv_head, d_head]``."""
        return self._with_past(k, self.past_k), self._with_past(v, self.past_v)

    def _with_past(self, new: jax.Array, past: jax.Array) -> jax.Array:
        tokens = jnp.concatenate([new[0], past.reshape(-1, *past.shape[2:])])
        return tokens[self.key_source]

    def pack(self, z: jax.Array) -> jax.Array:
        """Maps ``[row, query, head, d_head]`` to ``[1, computed query, head, d_head]``."""
        return z.reshape(-1, *z.shape[2:])[self.slot][None]
