"""The metric of two sets of tokens, which may have different sizes for each prompt."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from tljax.errors import InputError
from tljax.patching.metrics.arguments import each_prompt, picked_from_rows, rows_at
from tljax.patching.metrics.metrics import DeclaredMetric, Logits


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class ProbDiff(DeclaredMetric):
    """Probability of all tokens of ``answer`` together, minus that of all tokens of ``wrong``, at one position.

    The metric of tasks with sets of answers: years after a year, verbs of one number, names of a kind (Hanna et al.
        2023).

    Args:
        answer: token id, one for each prompt ``[batch]``, or several for each ``[batch, n]``, whose probabilities are
            added.
        wrong: the same for the wrong answers.
        answer_mask: ``[batch, n]``, ``True`` at the ids that count, where prompts have different numbers of them;
            ``None`` means all. ``ProbDiff(**task.sets)`` takes ids and masks from a task.
        wrong_mask: the same for ``wrong``.
        pos: as in :class:`LogitDiff`.

    >>> logits = jnp.log(jnp.asarray([[[0.5, 0.2, 0.2, 0.1]]]))
    >>> ProbDiff(answer=[[0, 1]], wrong=[[2, 0]], wrong_mask=[[True, False]])(logits)
    Array([0.5], dtype=float32)
    """

    answer: Any
    wrong: Any
    answer_mask: Any = None
    wrong_mask: Any = None
    pos: Any = -1

    def __post_init__(self) -> None:
        for name in ("answer", "wrong"):
            self._checked_ids(name)
            self._set(f"{name}_mask", _mask(getattr(self, f"{name}_mask"), getattr(self, name), name))
        self._checked_pos(self.pos)

    def __call__(self, logits: Logits) -> Float[Array, " batch"]:
        """Returns the difference for each prompt ``[batch]``."""
        rows = rows_at(logits, self.pos, "ProbDiff")
        log_sum = jax.nn.logsumexp(rows, axis=-1, keepdims=True)
        answer, wrong = (self._summed(rows - log_sum, name) for name in ("answer", "wrong"))
        return answer - wrong

    def _summed(self, log_probs: jax.Array, name: str) -> jax.Array:
        ids = each_prompt(getattr(self, name), log_probs.shape[0], log_probs.shape[1], f"ProbDiff({name}=...)")
        probs, mask = jnp.exp(picked_from_rows(log_probs, ids)), getattr(self, f"{name}_mask")
        return (probs if mask is None else jnp.where(mask, probs, 0)).sum(axis=-1)


def _mask(mask: Any, ids: Any, name: str) -> Any:
    if mask is None or isinstance(mask, Tracer):
        return mask
    array = np.asarray(mask)
    if array.dtype != bool or array.shape != np.shape(ids) or array.ndim != 2 or not array.any(axis=1).all():
        raise InputError(
            f"ProbDiff({name}_mask=...) must be booleans of the shape of {name}=, [batch, n], with at least one True a "
            f"prompt; got shape {array.shape}, dtype {array.dtype}, for ids of shape {np.shape(ids)}."
        )
    return array
