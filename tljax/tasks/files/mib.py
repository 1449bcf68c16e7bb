"""Rows of the Mechanistic Interpretability Benchmark's circuit track (Mueller et al. 2025), as JSON or JSONL."""

from collections import Counter
from os import PathLike, fspath
from typing import Any, Literal, Unpack

from tljax.checks import typed
from tljax.errors import InputError
from tljax.tasks.files.rows import Row, need, numbered, read_rows
from tljax.tasks.prompts import FileOptions, of_pairs
from tljax.tasks.task import Task
from tljax.tasks.texts import Pair, Text, find_word

DEFAULTS = {
    "ioi": "s2_io_flip",
    "mcqa": "symbol",
    "arc": "symbol",
    "arithmetic": "random",
}
_SUFFIX = "_counterfactual"
_NONE = "no counterfactual"


@typed
def load_mib(
    path: str | PathLike[str],
    model: Any,
    *,
    task: Literal["ioi", "mcqa", "arc", "arithmetic"],
    corruption: str | None = None,
    operator: Literal["+", "-"] = "+",
    **options: Unpack[FileOptions],
) -> Task:
    """Reads rows of the circuit track of MIB from a local file.

    A row has ``prompt`` and, for each counterfactual, a row of the same form. ``ioi`` takes its answers from
    ``metadata`` (``subject``, ``indirect_object``, ``random_c``), ``mcqa`` and ``arc`` from ``choices["label"]`` at
    ``answerKey``, ``arithmetic`` from ``label``; the wrong answer is the counterfactual's, in ``ioi`` the subject.

    Args:
        path: a ``.jsonl`` or ``.json`` file.
        model: the model.
        task: what the rows are.
        corruption: the counterfactual column, with or without ``"_counterfactual"``; ``None`` takes the benchmark's
            own: ``s2_io_flip`` for ``ioi``, ``symbol`` for ``mcqa`` and ``arc``, ``random`` for ``arithmetic``.
        operator: which rows of ``arithmetic`` to keep.
        **options: ``equal_lengths`` (leaves out pairs of unequally many tokens; the default), ``prepend_bos``,
            ``padding_side``.

    Returns:
        The rows that suit the tokenizer, in their order; ``task.dropped`` counts the others.

    Raises:
        InputError: the file cannot be read, a row lacks a column, or no row suits.

    Warns:
        DroppedPromptsWarning: rows were left out.
    """
    rows = read_rows(path)
    column = f"{(DEFAULTS[task] if corruption is None else corruption).removesuffix(_SUFFIX)}{_SUFFIX}"
    if not any(column in row for row in rows):
        known = sorted({name for row in rows for name in row if name.endswith(_SUFFIX)})
        raise InputError(f"{fspath(path)} has no column {column!r}. Its counterfactuals: {', '.join(known) or 'none'}.")
    templates = numbered([str(row.get("template", number)) for number, row in enumerate(rows)])
    pairs, unfit = [], Counter[str]()
    for number, row in enumerate(rows):
        if task == "arithmetic" and need(row, "operator", path, number) != operator:
            continue
        other = row.get(column)
        if not isinstance(other, dict) or not isinstance(other.get("prompt"), str):
            unfit[_NONE] += 1
            continue
        template = templates[str(row.get("template", number))]
        pairs.append(_READERS[task](row, other, path, number, template))
    name = f"mib-{task}"
    return of_pairs(model, pairs, unfit, name=name, corruption=column.removesuffix(_SUFFIX), **options)


def _ioi(row: Row, other: Row, path: Any, number: int, template: int) -> Pair:
    metadata = need(row, "metadata", path, number, dict)
    subject, receiver = (need(metadata, name, path, number) for name in ("subject", "indirect_object"))
    prompt = need(row, "prompt", path, number)
    found = {
        "IO": find_word(prompt, receiver), "S1": find_word(prompt, subject),
        "S2": find_word(prompt, subject, last=True),
    }  # fmt: skip
    for label in ("object", "place"):
        found[label] = find_word(prompt, metadata[label]) if isinstance(metadata.get(label), str) else None
    parts = {label: bounds for label, bounds in found.items() if bounds is not None}
    return Pair(Text(prompt, parts), Text(other["prompt"]), (f" {receiver}",), (f" {subject}",), template)


def _choice(row: Row, path: Any, number: int) -> str:
    choices = need(row, "choices", path, number, dict)
    labels = need(choices, "label", path, number, list)
    key = need(row, "answerKey", path, number, (int, str))
    place = key if isinstance(key, int) else [str(label).strip() for label in labels].index(key.strip())
    if not 0 <= place < len(labels):
        raise InputError(f"{fspath(path)}, row {number}: answerKey={key!r} is none of the {len(labels)} choices.")
    return str(labels[place])


def _choices(row: Row, other: Row, path: Any, number: int, template: int) -> Pair:
    prompt = need(row, "prompt", path, number)
    return Pair(
        Text(prompt), Text(other["prompt"]), (_choice(row, path, number),), (_choice(other, path, number),), template
    )


def _arithmetic(row: Row, other: Row, path: Any, number: int, template: int) -> Pair:
    right, wrong = (str(need(one, "label", path, number, (int, str))) for one in (row, other))
    return Pair(Text(need(row, "prompt", path, number)), Text(other["prompt"]), (right,), (wrong,), template)


_READERS = {"ioi": _ioi, "mcqa": _choices, "arc": _choices, "arithmetic": _arithmetic}
