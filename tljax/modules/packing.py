"""Packed runs: suffixes of many runs of the same prompts, laid end to end as one sequence.

A patched run differs from its base run only from the patched position on, so only that suffix is computed, and suffixes
of different lengths share one batch without padding. Everything that acts on one token at a time (norms, projections,
MLPs) sees plain sequences ``[lane, token]``; attention alone needs each row whole, so keys and values are laid out as
``[row, position]``, with those of the base run where a row has no token of its own. Lanes know nothing of each other:
there is one on one device, and one for each group of devices that prompts are spread over.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packing:
    """Layout of a packed run: where its tokens belong. Tokens, rows and queries are counted in their lane.

    Attributes:
        past_k, past_v: ``[prompt, pos, kv_head, d_head]``, the base run's (rotated) keys and its values.
        key_source: ``[lane, row, pos]``, the token at each position of a row: a packed token's index, or the number of
            packed tokens plus the index of a base token in ``past_k``, flattened.
        query_source: ``[lane, row, query]``, index of each query among the computed ones; arbitrary where a row has
            none.
        query_pos: ``[query]``, position of each query column.
        slot: ``[lane, computed query]``, its index in ``[row, query]``, flattened.
        computed: ``[lane, computed query]``, the packed tokens whose output is needed; ``None`` means all of them.
    """

    past_k: jax.Array
    past_v: jax.Array
    key_source: jax.Array
    query_source: jax.Array
    query_pos: jax.Array
    slot: jax.Array
    computed: jax.Array | None = None

    def lay_out_queries(self, q: jax.Array) -> jax.Array:
        """Maps ``[lane, computed query, head, d_head]`` to ``[lane * row, query, head, d_head]``."""
        return _rows(taken(q, self.query_source))

    def lay_out_keys(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps keys and values ``[lane, token, kv_head, d_head]`` to ``[lane * row, pos, kv_head, d_head]``."""
        return self._with_past(k, self.past_k), self._with_past(v, self.past_v)

    def _with_past(self, new: jax.Array, past: jax.Array) -> jax.Array:
        tokens = past.reshape(1, -1, *past.shape[2:])
        tokens = jnp.concatenate([new, jnp.broadcast_to(tokens, (new.shape[0], *tokens.shape[1:]))], axis=1)
        return _rows(taken(tokens, self.key_source))

    def pack(self, z: jax.Array) -> jax.Array:
        """Maps ``[lane * row, query, head, d_head]`` to ``[lane, computed query, head, d_head]``."""
        return taken(z.reshape(self.slot.shape[0], -1, *z.shape[2:]), self.slot)


def taken(tokens: jax.Array, index: jax.Array) -> jax.Array:
    """Returns entries of ``tokens`` ``[lane, token, ...]`` at ``index`` ``[lane, ...]``, each lane from its own."""
    return jax.vmap(lambda own, at: own[at])(tokens, index)


def _rows(x: jax.Array) -> jax.Array:
    """Joins the axes of lanes and rows."""
    return x.reshape(-1, *x.shape[2:])
