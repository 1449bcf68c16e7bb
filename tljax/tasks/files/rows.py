"""Rows of CSV, JSON and JSONL files, with errors that name the row and the column."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from tljax.errors import InputError, nearest

Row = Mapping[str, Any]


def read_rows(path: str | PathLike[str]) -> list[Row]:
    """Returns the rows of a file: ``.csv`` with a header; ``.jsonl``; ``.json`` with a list of rows, or lists by name.

    Raises:
        InputError: there is no such file, it is cut off, or it holds something else.
    """
    file = Path(fspath(path))
    if not file.is_file():
        raise InputError(f"There is no file {file}. Tasks are read from local files: download it first.")
    readers: dict[str, Callable[[Path], list[Row]]] = {
        ".csv": _csv,
        ".jsonl": _lines,
        ".ndjson": _lines,
        ".json": _json,
    }
    if file.suffix.lower() not in readers:
        raise InputError(f"{file} ends in {file.suffix!r}; tasks are read from {', '.join(readers)} files.")
    try:
        rows = readers[file.suffix.lower()](file)
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no UTF-8 text: {error}. Is it a text file?") from error
    if not rows:
        raise InputError(f"{file} has no rows.")
    return rows


def _csv(file: Path) -> list[Row]:
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))
    if not rows:
        return []
    header, *body = rows
    for number, row in enumerate(body, 2):
        if row and len(row) != len(header):
            raise InputError(
                f"{file}, row {number}: {len(row)} values for the {len(header)} columns of its header. Was the file "
                "only half written?"
            )
    return [dict(zip(header, row, strict=True)) for row in body if row]


def _lines(file: Path) -> list[Row]:
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            found.append(_checked(_parsed(line, f"{file}, line {number}"), f"{file}, line {number}"))
    return found


def _json(file: Path) -> list[Row]:
    held = _parsed(file.read_text(encoding="utf-8"), str(file))
    if isinstance(held, dict) and all(isinstance(rows, list) for rows in held.values()):
        held = [row for rows in held.values() for row in rows]
    if not isinstance(held, list):
        raise InputError(f"{file} holds {type(held).__name__}; expected a list of rows, or lists of rows by name.")
    return [_checked(row, f"{file}, entry {number}") for number, row in enumerate(held)]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is no JSON: {error}. Was the file only half written?") from error


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise InputError(f"{where} is {type(row).__name__}; expected a row with names, such as {{'prompt': …}}.")
    return row


def need(row: Row, column: str, path: Any, number: int, kind: type | tuple[type, ...] = str) -> Any:
    """Returns an entry of a row.

    Raises:
        InputError: the row lacks it, or it is of another kind.
    """
    if column not in row:
        raise InputError(
            f"{fspath(path)}, row {number} has no column {column!r}.{nearest(column, row)} It has: {', '.join(row)}."
        )
    if not isinstance(row[column], kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise InputError(
            f"{fspath(path)}, row {number}: {column!r} is {row[column]!r:.60}, expected "
            f"{' or '.join(one.__name__ for one in kinds)}."
        )
    return row[column]


def token_id(row: Row, column: str, path: Any, number: int, d_vocab: int) -> int:
    """Returns a token id of a CSV row.

    Raises:
        InputError: it is none of the model's.
    """
    text = need(row, column, path, number)
    try:
        found = int(text)
    except ValueError:
        found = -1
    return known_id(found, text, column, path, number, d_vocab)


def known_id(found: Any, text: str, column: str, path: Any, number: int, d_vocab: int) -> int:
    """Returns a token id after checking that the model has it.

    Raises:
        InputError: it has not.
    """
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < d_vocab:
        raise InputError(
            f"{fspath(path)}, row {number}: {column!r} is {text!r:.60}, not an id of the model's vocabulary (0 to "
            f"{d_vocab - 1}). The files hold ids of one tokenizer: take the one that was made for this model."
        )
    return found


def numbered(values: Sequence[str]) -> dict[str, int]:
    """Returns a number for each different value, in the order of first appearance."""
    return {value: number for number, value in enumerate(dict.fromkeys(values))}
