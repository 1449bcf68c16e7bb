"""``Task``: prompts with their corruptions, answers and labelled positions, ready for sweeps and metrics."""

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from tljax.checks import typed, whole
from tljax.errors import InputError, nearest
from tljax.tasks.behaviour import Behaviour, Rule, evaluate
from tljax.tasks.drawing import Draw
from tljax.tasks.showing import shown
from tljax.text.alignment import align
from tljax.text.batch import Batch
from tljax.text.tokenizer import Tokenizer

_STATIC = MappingProxyType({"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Task:
    """Clean prompts, their corruptions, and the tokens that tell whether a model does the task.

    Made by a generator (:func:`tljax.tasks.ioi` and its neighbours), by a loader of a public file, or of your own
    prompts by :func:`tljax.tasks.from_prompts`. A pytree whose arrays, but for those of the batches, are on the host.

    Attributes:
        name: what the prompts are.
        corruption: how ``corrupted`` was made from ``clean``.
        clean, corrupted: the prompts, which a model or a sweep takes as they are.
        answers: ids of the right continuations of ``clean``, int32 ``[batch, n]``; 0 where a prompt has fewer.
        answer_mask: ``[batch, n]``, ``True`` at the ids that count.
        wrongs, wrong_mask: the same for the wrong continuations: what ``corrupted`` asks for, where it asks for one.
        templates: number of the template of each prompt, int32 ``[batch]``: the clusters to resample by.
        spans: where the labelled parts stand in ``clean``: for each label int32 ``[batch, 2]``, first position and
            the one after the last. Positions count in each prompt's text, BOS included, as ``pos=`` does everywhere.
            A prompt without the part has -1 in both.
        corrupted_spans: the same for ``corrupted``.
        clean_texts, corrupted_texts: the texts; ``None`` where prompts were made of token ids.
        dropped: reasons for which rows of a file were left out, each with how many.
        tokenizer: the tokenizer, to show what the ids mean, or ``None``.
    """

    name: str = dataclasses.field(metadata=_STATIC)
    corruption: str = dataclasses.field(metadata=_STATIC)
    clean: Batch
    corrupted: Batch
    answers: Any
    answer_mask: Any
    wrongs: Any
    wrong_mask: Any
    templates: Any
    spans: Mapping[str, Any]
    corrupted_spans: Mapping[str, Any]
    clean_texts: tuple[str, ...] | None = dataclasses.field(metadata=_STATIC)
    corrupted_texts: tuple[str, ...] | None = dataclasses.field(metadata=_STATIC)
    dropped: tuple[tuple[str, int], ...] = dataclasses.field(metadata=_STATIC, default=())
    tokenizer: Tokenizer | None = dataclasses.field(metadata=_STATIC, default=None)

    def __len__(self) -> int:
        return len(self.clean)

    def __iter__(self) -> Iterator["Task"]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> "Task":
        """Returns the task of some of the prompts: a number, numbers, a slice, or booleans ``[batch]``."""
        numbers = self._numbers(index)

        def texts(all_: tuple[str, ...] | None) -> tuple[str, ...] | None:
            return None if all_ is None else tuple(all_[number] for number in numbers)

        arrays = ("answers", "answer_mask", "wrongs", "wrong_mask", "templates")
        taken: dict[str, Any] = {name: getattr(self, name)[numbers] for name in arrays}
        for name in ("spans", "corrupted_spans"):
            taken[name] = {label: span[numbers] for label, span in getattr(self, name).items()}
        return dataclasses.replace(
            self,
            clean=_rows(self.clean, numbers),
            corrupted=_rows(self.corrupted, numbers),
            clean_texts=texts(self.clean_texts),
            corrupted_texts=texts(self.corrupted_texts),
            **taken,
        )

    def _numbers(self, index: Any) -> np.ndarray:
        if isinstance(index, slice):
            numbers = np.arange(len(self))[index]
        else:
            numbers = np.atleast_1d(np.asarray(index))
            if numbers.dtype == bool and numbers.shape == (len(self),):
                numbers = np.flatnonzero(numbers)
            elif numbers.size and (numbers.dtype.kind not in "iu" or numbers.ndim > 1):
                raise InputError(
                    f"task[{index!r}] is not a choice of prompts: give a number, a list of numbers, a slice, or "
                    f"{len(self)} booleans."
                )
        if not numbers.size:
            raise InputError(f"task[{index!r}] keeps none of the {len(self)} prompts: a task has at least one.")
        wrong = numbers[(numbers < -len(self)) | (numbers >= len(self))]
        if wrong.size:
            raise IndexError(f"There is no prompt {int(wrong[0])}: the task has {len(self)}, 0 to {len(self) - 1}.")
        return numbers % len(self)

    @property
    def answer(self) -> np.ndarray:
        """The right ids as metrics take them: ``[batch]``, or ``[batch, n]`` where each prompt has ``n`` of them."""
        return _rectangular(self.answers, self.answer_mask, "answers")

    @property
    def wrong(self) -> np.ndarray:
        """The wrong ids, in the same form."""
        return _rectangular(self.wrongs, self.wrong_mask, "wrong answers")

    @property
    def sets(self) -> dict[str, np.ndarray]:
        """The arguments of a metric of sets: ``ProbDiff(**task.sets)``."""
        return {
            "answer": self.answers, "wrong": self.wrongs, "answer_mask": self.answer_mask, "wrong_mask": self.wrong_mask
        }  # fmt: skip

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each clean prompt, ``[batch]``."""
        return np.asarray(self.clean.mask).sum(axis=1)

    @typed
    def pos(self, label: str, corrupted: bool = False) -> np.ndarray:
        """Returns the last token of a labelled part in each prompt, int32 ``[batch]``, to pass as ``pos=``.

        Args:
            label: a key of ``spans``.
            corrupted: whether in the corrupted prompts.

        Raises:
            InputError: there is no such part, or some prompt lacks it.
        """
        spans = self.corrupted_spans if corrupted else self.spans
        if label not in spans:
            raise InputError(
                f"There is no part {label!r} in these prompts.{nearest(label, spans)} They have: {', '.join(spans)}."
            )
        last = spans[label][:, 1] - 1
        if (missing := np.flatnonzero(last < 0)).size:
            raise InputError(
                f"{missing.size} of {len(self)} prompts have no {label!r}, the first of them prompt {int(missing[0])}. "
                f"Leave them out: task[task.spans[{label!r}][:, 0] >= 0]."
            )
        return last

    def align(self, base: str = "clean") -> np.ndarray:
        """Returns which position of the other prompt each position of ``base`` belongs to, int32 ``[batch, pos]``.

        By the labelled parts where lengths differ; see :func:`tljax.text.align`.

        Args:
            base: ``"clean"`` or ``"corrupted"``.
        """
        if base not in ("clean", "corrupted"):
            raise InputError(f"base={base!r} must be 'clean' or 'corrupted'.")
        sides = (self.clean, self.spans), (self.corrupted, self.corrupted_spans)
        (one, spans), (other, other_spans) = sides if base == "clean" else sides[::-1]
        return align(one, other, spans=spans, source_spans=other_spans)

    @typed
    def split(self, train: int | float, seed: int = 0) -> tuple["Task", "Task"]:
        """Splits the prompts at random into two tasks.

        Args:
            train: prompts of the first, as a number (``100``) or a share (``0.8``).
            seed: the split depends on it alone.

        Raises:
            InputError: one of the two would be empty.
        """
        size = round(train * len(self)) if isinstance(train, float) else int(train)
        if not 0 < size < len(self):
            raise InputError(
                f"train={train} of {len(self)} prompts leaves one part empty: give a share between 0.0 and 1.0, or a "
                f"whole number from 1 to {len(self) - 1}."
            )
        order = np.asarray(list(Draw(seed).order(len(self))))
        return self[order[:size]], self[order[size:]]

    @typed
    def batches(self, batch_size: int, by_length: bool = False) -> Iterator["Task"]:
        """Yields the prompts in tasks of at most ``batch_size``.

        Args:
            batch_size: most prompts of a batch.
            by_length: whether the prompts of a batch have equally many tokens, so that nothing is padded.
        """
        size = whole(batch_size, "batch_size", at_least=1)
        groups = self.by_length().values() if by_length else [self]
        return (group[start : start + size] for group in groups for start in range(0, len(group), size))

    def by_length(self) -> dict[int, "Task"]:
        """Returns the prompts grouped by the number of clean tokens, shortest first."""
        return {int(length): self[self.lengths == length] for length in np.unique(self.lengths)}

    def evaluate(self, model: Any, batch_size: int | None = None) -> Behaviour:
        """Runs a model on the clean and the corrupted prompts and compares right and wrong answers.

        Args:
            model: the model.
            batch_size: prompts that run at once; ``None`` takes as many as a memory budget allows.
        """
        return evaluate(self, model, batch_size)

    @typed
    def known_by(self, model: Any, rule: Rule = "top", batch_size: int | None = None) -> "Task":
        """Keeps the prompts that a model answers right.

        Args:
            model: the model.
            rule: ``"top"``: the likeliest token of all is a right answer. ``"preferred"``: the right answers together
                are more probable than the wrong ones.
            batch_size: as in :meth:`evaluate`.

        Raises:
            InputError: the model answers none of them right.
        """
        right = getattr(evaluate(self, model, batch_size, corrupted=False), rule)
        if not right.any():
            raise InputError(
                f"The model answers none of the {len(self)} prompts of {self.name} right by rule={rule!r}. "
                + ("Try rule='preferred', which compares right and wrong answers only." if rule == "top" else "")
            )
        return self[right]

    def __repr__(self) -> str:
        return shown(self)


def _rows(batch: Batch, numbers: np.ndarray) -> Batch:
    tokens, mask = np.asarray(batch.tokens)[numbers], np.asarray(batch.mask)[numbers]
    used = mask.any(axis=0)
    return Batch.from_mask(tokens[:, used], mask[:, used], batch.padding_side)


def _rectangular(ids: np.ndarray, mask: np.ndarray, what: str) -> np.ndarray:
    if not mask.all():
        counts = mask.sum(axis=1)
        raise InputError(
            f"These prompts have {counts.min()} to {counts.max()} {what}, so they are not one array: use a metric of "
            "sets, ProbDiff(**task.sets), or task.answers and task.wrongs with their masks."
        )
    return ids[:, 0] if ids.shape[1] == 1 else ids
