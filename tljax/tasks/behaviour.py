"""How a model does on a task: which prompts it answers right, and by how much."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tljax.checks import whole
from tljax.errors import InputError
from tljax.memory import how_many
from tljax.text.batch import Batch

if TYPE_CHECKING:
    from tljax.tasks.task import Task

Rule = Literal["top", "preferred"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Behaviour:
    """A model's answers to a task's prompts. The arrays are NumPy's, one entry a prompt.

    Attributes:
        top: whether the likeliest token after the clean prompt is a right answer.
        preferred: whether the right answers together are more probable than the wrong ones.
        logit_diff: mean logit of the right answers minus that of the wrong ones, after the clean prompt.
        prob_diff: probability of all right answers minus that of all wrong ones, after the clean prompt.
        corrupted_logit_diff, corrupted_prob_diff: the same answers after the corrupted prompt; NaN where only the
            clean prompts were run.
    """

    top: np.ndarray
    preferred: np.ndarray
    logit_diff: np.ndarray
    prob_diff: np.ndarray
    corrupted_logit_diff: np.ndarray
    corrupted_prob_diff: np.ndarray

    def __repr__(self) -> str:
        return (
            f"Behaviour on {len(self.top)} prompts: right answer on top {self.top.mean():.1%}, preferred "
            f"{self.preferred.mean():.1%}\n"
            f"  logit difference        {self.logit_diff.mean():+.3f}, corrupted "
            f"{self.corrupted_logit_diff.mean():+.3f}\n"
            f"  probability difference  {self.prob_diff.mean():+.3f}, corrupted {self.corrupted_prob_diff.mean():+.3f}"
        )


def evaluate(task: "Task", model: Any, batch_size: int | None, corrupted: bool = True) -> Behaviour:
    """Runs a model on a task's prompts; see :meth:`tljax.tasks.Task.evaluate`.

    Raises:
        InputError: an answer is no token of the model.
    """
    largest = max(int(np.max(ids, where=mask, initial=0)) for ids, mask in _ids(task))
    if largest >= model.cfg.d_vocab:
        raise InputError(
            f"The answer with id {largest} is outside the model's vocabulary (0 to {model.cfg.d_vocab - 1}): the task "
            "was made with another model's tokenizer. Make it anew with this model."
        )
    top, logit_diff, prob_diff = _scores(task, model, task.clean, batch_size)
    nothing = np.full(len(task), np.nan)
    _, other_logits, other_probs = (
        _scores(task, model, task.corrupted, batch_size) if corrupted else (nothing, nothing, nothing)
    )
    return Behaviour(
        top=top, preferred=prob_diff > 0, logit_diff=logit_diff, prob_diff=prob_diff,
        corrupted_logit_diff=other_logits, corrupted_prob_diff=other_probs,
    )  # fmt: skip


def _ids(task: "Task") -> list[tuple[np.ndarray, np.ndarray]]:
    return [(task.answers, task.answer_mask), (task.wrongs, task.wrong_mask)]


def _scores(
    task: "Task", model: Any, batch: Batch, batch_size: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns whether an answer is on top, the logit and the probability differences, ``[batch]`` each."""
    rows = _last_logits(model, batch, batch_size)
    log_probs = rows - np.logaddexp.reduce(rows, axis=1, keepdims=True)
    logits, probs = [], []
    for ids, mask in _ids(task):
        picked = np.take_along_axis(rows, ids.astype(np.int64), axis=1)
        logits.append(np.mean(picked, axis=1, where=mask))
        shares = np.exp(np.take_along_axis(log_probs, ids.astype(np.int64), axis=1))
        probs.append(np.sum(shares, axis=1, where=mask))
    best = rows.argmax(axis=1)
    top = ((task.answers == best[:, None]) & task.answer_mask).any(axis=1)
    return top, logits[0] - logits[1], probs[0] - probs[1]


def _last_logits(model: Any, batch: Batch, batch_size: int | None) -> np.ndarray:
    """Returns the logits after each prompt, float64 ``[batch, d_vocab]``; every run has the same shape."""
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    count, width = tokens.shape
    if batch_size is None:
        size = min(count, how_many(4 * width * model.cfg.d_vocab))
    else:
        size = min(count, whole(batch_size, "batch_size", at_least=1))
    found = []
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)  # the last run repeats its last prompt
        logits = model(Batch.from_mask(tokens[rows], mask[rows], batch.padding_side))
        last = width - 1 - mask[rows][:, ::-1].argmax(axis=1)
        found.append(np.asarray(logits[np.arange(size), last]).astype(np.float64)[: count - start])
    return np.concatenate(found)
