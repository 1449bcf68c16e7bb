"""CSV files of the EAP-IG faithfulness experiments (Hanna et al. 2024)."""

import ast
from collections import Counter
from collections.abc import Callable
from os import PathLike, fspath
from typing import Any, Literal, Unpack

from tljax.checks import typed
from tljax.errors import InputError
from tljax.tasks.files.rows import Row, known_id, need, numbered, read_rows, token_id
from tljax.tasks.prompts import FileOptions, of_pairs, reader_of
from tljax.tasks.task import Task
from tljax.tasks.texts import Pair, Text
from tljax.tasks.words.things import VERBS

Answers = tuple[tuple[str | int, ...], tuple[str | int, ...]]


@typed
def load_faithfulness(
    path: str | PathLike[str],
    model: Any,
    *,
    task: Literal["ioi", "greater-than", "gender-bias", "sva", "fact-retrieval", "hypernymy"],
    corruption: str = "corrupted",
    **options: Unpack[FileOptions],
) -> Task:
    """Reads a CSV file of the EAP-IG faithfulness experiments.

    Answers are the ids in the file, which are those of the tokenizer it was made for: ``correct_idx`` and
    ``incorrect_idx`` (``ioi``); ``clean_answer_idx``, ``corrupted_answer_idx`` (``gender-bias``); ``country_idx``,
    ``corrupted_country_idx`` (``fact-retrieval``); lists ``answers_idx``, ``corrupted_answers_idx`` (``hypernymy``). In
    ``greater-than``, ``correct_idx`` is the year's last two digits, and right are all two-digit tokens above it. In
    ``sva``, right are the verb forms of number ``plural``, of the verbs that :func:`tljax.tasks.subject_verb_agreement`
    uses.

    Args:
        path: a ``.csv`` file.
        model: the model.
        task: what the rows are.
        corruption: the column of corrupted prompts, such as ``"corrupted_hard"``.
        **options: ``equal_lengths`` (leaves out pairs of unequally many tokens; the default), ``prepend_bos``,
            ``padding_side``.

    Returns:
        The rows that suit the tokenizer, in their order; ``task.dropped`` counts the others.

    Raises:
        InputError: the file cannot be read, lacks a column, or holds ids that the model does not have.

    Warns:
        DroppedPromptsWarning: rows were left out.
    """
    rows = read_rows(path)
    groups = numbered([str(row.get("group", number)) for number, row in enumerate(rows)])
    verbs = _verbs(model) if task == "sva" else ((), ())
    pairs = []
    for number, row in enumerate(rows):
        clean, corrupted = (need(row, column, path, number) for column in ("clean", corruption))
        answers = _sva(row, path, number, verbs) if task == "sva" else _READERS[task](row, path, number, model)
        pairs.append(Pair(Text(clean), Text(corrupted), *answers, groups[str(row.get("group", number))]))
    return of_pairs(model, pairs, Counter(), name=task, corruption=corruption, **options)


def _ids(right: str, wrong: str) -> Callable[[Row, Any, int, Any], Answers]:
    def read(row: Row, path: Any, number: int, model: Any) -> Answers:
        one, other = (token_id(row, column, path, number, model.cfg.d_vocab) for column in (right, wrong))
        return (one,), (other,)

    return read


def _lists(row: Row, path: Any, number: int, model: Any) -> Answers:
    found: list[tuple[int, ...]] = []
    for column in ("answers_idx", "corrupted_answers_idx"):
        text = need(row, column, path, number)
        try:
            held = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            held = None
        if not isinstance(held, list | tuple) or not held:
            raise InputError(f"{fspath(path)}, row {number}: {column!r} is {text!r:.60}, not a list of token ids.")
        found.append(tuple(known_id(one, text, column, path, number, model.cfg.d_vocab) for one in held))
    return found[0], found[1]


def _years(row: Row, path: Any, number: int, model: Any) -> Answers:
    year = token_id(row, "correct_idx", path, number, 100)
    digits = [f"{one:02d}" for one in range(100)]
    return tuple(digits[year + 1 :]), tuple(digits[: year + 1])


def _verbs(model: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the singular and the plural forms of verbs that are single tokens in both."""
    forms = [pair.split() for pair in VERBS]
    single = set(reader_of(model, None).single([form for pair in forms for form in pair]))
    known = [pair for pair in forms if single.issuperset(pair)]
    return tuple(f" {one}" for one, _ in known), tuple(f" {several}" for _, several in known)


def _sva(row: Row, path: Any, number: int, verbs: tuple[tuple[str, ...], tuple[str, ...]]) -> Answers:
    plural = need(row, "plural", path, number).strip().lower()
    if plural not in ("0", "1", "true", "false"):
        raise InputError(f"{fspath(path)}, row {number}: 'plural' is {plural!r}, expected 0 or 1.")
    return (verbs[1], verbs[0]) if plural in ("1", "true") else verbs


_READERS: dict[str, Callable[[Row, Any, int, Any], Answers]] = {
    "ioi": _ids("correct_idx", "incorrect_idx"),
    "gender-bias": _ids("clean_answer_idx", "corrupted_answer_idx"),
    "fact-retrieval": _ids("country_idx", "corrupted_country_idx"),
    "hypernymy": _lists,
    "greater-than": _years,
}
