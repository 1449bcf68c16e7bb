"""Keys and values of the tokens before a run, so that a text continues without running its beginning again."""

import dataclasses

import jax
import jax.numpy as jnp

PAST = ("past_k", "past_v")
"""Names, inside attention, under which a run records past keys and values together with its own."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Past:
    """Keys and values of earlier tokens in one attention layer.

    The token at position ``p`` of the text is in slot ``p % n_slots``: a layer that sees only a window of the text
    needs no more slots than the window has positions, and later tokens overwrite those that left it.

    Attributes:
        k, v: ``[batch, kv_head, slot, d_head]``, (rotated) keys and values: the layout that attention over a few
            queries reads without copying all of it.
        mask: ``[batch, pos]`` boolean over the whole text, ``False`` at padding and at positions not written yet; the
            run's own tokens are ``True``.
        start: position in the text of the run's first token, an int32 scalar.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array
    start: jax.Array

    def extend(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns all keys and values, with the run's own, ``[batch, pos, kv_head, d_head]``, in their slots."""
        slot = self.start % self.k.shape[2]
        where = (jnp.zeros_like(slot), jnp.zeros_like(slot), slot, jnp.zeros_like(slot))
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        return jax.lax.dynamic_update_slice(self.k, k, where), jax.lax.dynamic_update_slice(self.v, v, where)

    def keys_seen(self, n_tokens: int) -> tuple[jax.Array, jax.Array]:
        """Returns the contents of each slot once the run's ``n_tokens`` are written.

        Returns:
            The position in each slot ``[slot]``, negative if empty, and whether it may be seen ``[batch, slot]``.
        """
        position = slot_positions(self.start + n_tokens - 1, self.k.shape[2])
        written = position >= 0
        return position, self.mask[:, jnp.where(written, position, 0)] & written[None]


def slot_positions(last: jax.Array, n_slots: int) -> jax.Array:
    """Returns the position in each slot once ``last`` is the last one written; negative for an empty slot."""
    return last - (last - jnp.arange(n_slots)) % n_slots
