"""From texts with labelled parts to token ids, with every check, and from these to a ``Task``."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from tljax.tasks.task import Task
from tljax.tasks.texts import ABSENT, Bounds, Pair, Reader, locate
from tljax.text.padding import pad_rows
from tljax.typing import PaddingSide


@dataclasses.dataclass(frozen=True)
class Row:
    """A checked pair as token ids.

    Attributes:
        clean, corrupted: token ids.
        spans, corrupted_spans: where the parts stand, in tokens.
        answers, wrongs: token ids.
        template: number of the template.
        texts: both texts; ``None`` where there are none.
    """

    clean: list[int]
    corrupted: list[int]
    spans: dict[str, Bounds]
    corrupted_spans: dict[str, Bounds]
    answers: list[int]
    wrongs: list[int]
    template: int
    texts: tuple[str, str] | None = None


def checked(reader: Reader, pairs: Sequence[Pair], equal_lengths: bool = True) -> list[Row | str]:
    """Turns pairs into token ids; a text in place of a row says why a pair is unfit."""
    clean = locate(reader, [pair.clean for pair in pairs])
    corrupted = locate(reader, [pair.corrupted for pair in pairs])
    return [_row(reader, *one, equal_lengths) for one in zip(pairs, clean, corrupted, strict=True)]


def _row(reader: Reader, pair: Pair, clean: Any, corrupted: Any, equal_lengths: bool) -> Row | str:
    if clean is None or corrupted is None:
        return "a part that does not begin and end with a token, or a word that the vocabulary lacks"
    if equal_lengths and len(clean[0]) != len(corrupted[0]):
        return "unequal numbers of tokens"
    ids = [_ids(reader, pair.clean.text, answers) for answers in (pair.answers, pair.wrongs)]
    known = [list(dict.fromkeys(one for one in answers if one is not None)) for answers in ids]
    if None in ids[0] + ids[1] or not all(known):
        return "an answer that is not one token"
    if set(known[0]) & set(known[1]):
        return "a token that is both right and wrong"
    texts = pair.clean.text, pair.corrupted.text
    return Row(clean[0], corrupted[0], clean[1], corrupted[1], known[0], known[1], pair.template, texts)


def _ids(reader: Reader, prompt: str, answers: Sequence[str | int]) -> list[int | None]:
    texts = [one for one in answers if isinstance(one, str)]
    found = dict(zip(texts, reader.answers(prompt, texts), strict=True))
    return [found[one] if isinstance(one, str) else one for one in answers]


def assemble(
    model: Any,
    rows: Sequence[Row],
    *,
    name: str,
    corruption: str,
    padding_side: PaddingSide | None,
    dropped: tuple[tuple[str, int], ...] = (),
) -> Task:
    """Puts rows into one task.

    Raises:
        InputError: a prompt is longer than the model's context.
    """
    answers, answer_mask = pad_rows([row.answers for row in rows])
    wrongs, wrong_mask = pad_rows([row.wrongs for row in rows])
    texts = [row.texts for row in rows if row.texts is not None]
    has_texts = len(texts) == len(rows)
    return Task(
        name=name,
        corruption=corruption,
        clean=model.to_batch([np.asarray(row.clean) for row in rows], padding_side=padding_side),
        corrupted=model.to_batch([np.asarray(row.corrupted) for row in rows], padding_side=padding_side),
        answers=answers,
        answer_mask=answer_mask,
        wrongs=wrongs,
        wrong_mask=wrong_mask,
        templates=np.asarray([row.template for row in rows], np.int32),
        spans=_spans([row.spans for row in rows]),
        corrupted_spans=_spans([row.corrupted_spans for row in rows]),
        clean_texts=tuple(clean for clean, _ in texts) if has_texts else None,
        corrupted_texts=tuple(corrupted for _, corrupted in texts) if has_texts else None,
        dropped=dropped,
        tokenizer=model._tokenizer,
    )


def _spans(rows: Sequence[dict[str, Bounds]]) -> dict[str, np.ndarray]:
    labels = dict.fromkeys(label for row in rows for label in row)
    return {label: np.asarray([row.get(label, ABSENT) for row in rows], np.int32) for label in labels}
