"""A task of prompts of your own."""

import dataclasses
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from tljax.checks import typed
from tljax.errors import InputError
from tljax.tasks.building import Row, assemble, checked
from tljax.tasks.task import Task
from tljax.tasks.texts import Pair, Reader, Text
from tljax.text.tokenizer import check_padding_side, need_tokenizer
from tljax.typing import PaddingSide


class DroppedPromptsWarning(UserWarning):
    """Rows of a file do not suit the model's tokenizer and were left out; ``task.dropped`` has the counts."""


@typed
def from_prompts(
    model: Any,
    clean: Sequence[str],
    corrupted: Sequence[str],
    answer: Sequence[Any],
    wrong: Sequence[Any],
    *,
    name: str = "custom",
    corruption: str = "custom",
    templates: Sequence[int] | None = None,
    parts: Mapping[str, Sequence[str]] | None = None,
    corrupted_parts: Mapping[str, Sequence[str]] | None = None,
    equal_lengths: bool = True,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
) -> Task:
    """Makes a task of your own prompts, after the checks that generated ones pass.

    Args:
        model: the model.
        clean, corrupted: the texts, in pairs.
        answer, wrong: the right and the wrong continuations of each clean text: a text with the space that it starts
            with, a token id, or a list of these.
        name, corruption: what the prompts are, and how they were corrupted.
        templates: number of the template of each pair; ``None`` makes each pair its own.
        parts: labelled parts: for each label a word or phrase of each clean text; where one stands several times, the
            first is meant.
        corrupted_parts: the same of the corrupted texts; ``None`` means that they stand at the same tokens.
        equal_lengths: whether a pair of unequally many tokens is an error. If not, parts need ``corrupted_parts``.
        prepend_bos: whether prompts start with BOS; ``None`` means ``cfg.default_prepend_bos``.
        padding_side: where shorter prompts are filled; ``None`` means the tokenizer's side.

    Raises:
        InputError: lists of different lengths, a pair of unequally many tokens, an answer that is not one token, or a
            part that a text does not have or that splits a token. The message names the first such prompt.
        TokenizerError: the model has no tokenizer.
    """
    lists = {"clean": clean, "corrupted": corrupted, "answer": answer, "wrong": wrong, "templates": templates}
    for which, own in (("parts", parts), ("corrupted_parts", corrupted_parts)):
        lists |= {f"{which}[{label!r}]": words for label, words in (own or {}).items()}
    for which, values in lists.items():
        if isinstance(values, str) or (values is not None and len(values) != len(clean)):
            raise InputError(
                f"{which}= must be a list with one entry for each of the {len(clean)} clean prompts; got "
                f"{values!r:.60}."
            )
    if not len(clean):
        raise InputError("There are no prompts: give at least one pair.")
    if parts and corrupted_parts is None and not equal_lengths:
        raise InputError(
            "parts= are those of the clean texts; with equal_lengths=False the corrupted texts have theirs elsewhere. "
            "Name them too: corrupted_parts=."
        )
    pairs = []
    for index, (one, other) in enumerate(zip(clean, corrupted, strict=True)):
        right, others = (
            _listed(model, ids[index], which, index) for which, ids in (("answer", answer), ("wrong", wrong))
        )
        texts = [
            Text(
                text, {label: _stands(text, words[index], f"{which}[{label!r}]", index) for label, words in own.items()}
            )
            for text, which, own in ((one, "parts", parts or {}), (other, "corrupted_parts", corrupted_parts or {}))
        ]
        template = index if templates is None else int(templates[index])
        pairs.append(Pair(texts[0], texts[1], right, others, template))
    reader = reader_of(model, prepend_bos)
    made = checked(reader, pairs, equal_lengths)
    for index, row in enumerate(made):
        if isinstance(row, str):
            raise InputError(
                f"Prompt {index} does not make a pair, because of {row}: clean {clean[index]!r}, corrupted "
                f"{corrupted[index]!r}, answer {answer[index]!r}, wrong {wrong[index]!r}. Change it or leave it out"
                + (", or pass equal_lengths=False." if "unequal" in row else ".")
            )
    rows = [_with_parts(row) if parts and corrupted_parts is None else row for row in made if isinstance(row, Row)]
    check_padding_side(padding_side)
    return assemble(model, rows, name=name, corruption=corruption, padding_side=padding_side)


class FileOptions(TypedDict, total=False):
    """Options of every reader of files.

    Attributes:
        equal_lengths: whether pairs of unequally many tokens are left out.
        prepend_bos: whether prompts start with BOS; ``None`` means ``cfg.default_prepend_bos``.
        padding_side: where shorter prompts are filled; ``None`` means the tokenizer's side.
    """

    equal_lengths: bool
    prepend_bos: bool | None
    padding_side: PaddingSide | None


def of_pairs(
    model: Any,
    pairs: Sequence[Pair],
    unfit: Mapping[str, int],
    *,
    name: str,
    corruption: str,
    equal_lengths: bool = True,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
) -> Task:
    """Makes a task of the pairs of a file that suit the tokenizer, and says how many do not.

    Args:
        model: the model.
        pairs: pairs of texts.
        unfit: why other rows were left out already, and how many.
        name, corruption: as of a ``Task``.
        equal_lengths, prepend_bos, padding_side: as in :class:`FileOptions`.

    Raises:
        InputError: none does.

    Warns:
        DroppedPromptsWarning: some do not.
    """
    check_padding_side(padding_side)
    made = checked(reader_of(model, prepend_bos), pairs, equal_lengths)
    dropped = Counter(unfit) + Counter(one for one in made if isinstance(one, str))
    rows = [one for one in made if isinstance(one, Row)]
    total = len(rows) + dropped.total()
    reasons = ", ".join(f"{count} ({why})" for why, count in dropped.items())
    if not rows:
        raise InputError(f"None of the {total} rows suits this model's tokenizer: {reasons or 'the file has no rows'}.")
    if dropped:
        warnings.warn(f"Left out {dropped.total()} of {total} rows: {reasons}.", DroppedPromptsWarning, stacklevel=4)
    return assemble(
        model, rows, name=name, corruption=corruption, padding_side=padding_side, dropped=tuple(dropped.items())
    )


def reader_of(model: Any, prepend_bos: bool | None) -> Reader:
    """Returns a reader of the model's tokenizer.

    Raises:
        TokenizerError: it has none.
    """
    tokenizer = need_tokenizer(model._tokenizer, "A task of texts")
    return Reader(tokenizer, model.cfg.default_prepend_bos if prepend_bos is None else prepend_bos)


def _stands(text: str, word: str, which: str, index: int) -> tuple[int, int]:
    start = text.find(word)
    if start < 0 or not word:
        raise InputError(f"{which} of prompt {index} is {word!r}, which does not stand in {text!r}.")
    start += len(word) - len(word.lstrip())
    return start, start + len(word.strip())


def _listed(model: Any, given: Any, which: str, index: int) -> tuple[str | int, ...]:
    several = tuple(given) if isinstance(given, list | tuple | np.ndarray) else (given,)
    for one in several:
        if isinstance(one, bool) or not isinstance(one, str | int | np.integer):
            raise InputError(f"{which}[{index}]={given!r} must be a text, a token id, or a list of these.")
        if not isinstance(one, str) and not 0 <= one < model.cfg.d_vocab:
            raise InputError(f"{which}[{index}]: there is no token {one}; ids are 0 to {model.cfg.d_vocab - 1}.")
    if not several:
        raise InputError(f"{which}[{index}] is empty: each prompt needs at least one.")
    return tuple(one if isinstance(one, str) else int(one) for one in several)


def _with_parts(row: Row) -> Row:
    """Returns a row whose corrupted prompt has the clean one's parts."""
    return dataclasses.replace(row, corrupted_spans=row.spans)
