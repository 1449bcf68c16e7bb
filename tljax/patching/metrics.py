"""Metrics of a run's logits, as small pytrees that say which position they read."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class LogitDiff:
    """Logit of ``answer`` minus logit of ``wrong`` at one position, one number a prompt.

    Args:
        answer: token id, or one id a prompt ``[batch]``.
        wrong: token id, or one id a prompt ``[batch]``.
        pos: the position read; sweeps unembed only this row.
    """

    answer: Any
    wrong: Any
    pos: int = -1

    def __call__(self, logits: Float[Array, "batch pos d_vocab"]) -> Float[Array, " batch"]:
        """Returns the difference for each prompt ``[batch]``."""
        return self.at_position(logits[:, self.pos])

    def at_position(self, logits: Float[Array, "batch d_vocab"]) -> Float[Array, " batch"]:
        """The same from the logits of the position alone."""
        return _pick(logits, self.answer) - _pick(logits, self.wrong)

    def repeated(self, times: int) -> "LogitDiff":
        """The metric for a batch that holds the same prompts ``times`` over."""
        answer, wrong = (jnp.tile(token, times) if jnp.ndim(token) else token for token in (self.answer, self.wrong))
        return LogitDiff(answer, wrong, self.pos)

    def tree_flatten(self) -> tuple[tuple[Any, Any], int]:
        return (self.answer, self.wrong), self.pos

    @classmethod
    def tree_unflatten(cls, pos: int, children: tuple[Any, Any]) -> "LogitDiff":
        return cls(*children, pos)


def _pick(logits: jax.Array, token: Any) -> jax.Array:
    ids = jnp.broadcast_to(jnp.asarray(token, jnp.int32), logits.shape[:1])
    return jnp.take_along_axis(logits, ids[:, None], axis=1)[:, 0]
