"""Documents to harvest: texts, files of texts and token ids, one at a time, as token ids."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tljax.errors import InputError, nearest
from tljax.model.hooked_transformer import HookedTransformer
from tljax.text.inputs import check_ids
from tljax.text.tokenizer import Tokenizer, need_tokenizer

Prompts = Any
"""What is harvested: a text, an iterable of texts, files and token ids, a function that returns one, ``[row, pos]``."""

_AT_ONCE = 64
"""Texts that are tokenized in one call."""
_SUFFIXES = (".txt", ".jsonl")
_CHUNK = 2**20


class Document(NamedTuple):
    """One document.

    Attributes:
        number: how many came before it.
        ids: token ids, int32 ``[pos]``, without special tokens around them.
    """

    number: int
    ids: np.ndarray


class Reading(NamedTuple):
    """How files are read.

    Attributes:
        field: the key of a ``.jsonl`` file's objects that holds the text, or token ids.
        text_separator: what stands between the documents of a ``.txt`` file; ``None``: the file is one document.
    """

    field: str = "text"
    text_separator: str | None = None


def token_rows(prompts: Prompts) -> np.ndarray | None:
    """Returns prompts that are an array ``[row, pos]``, whose rows are run as they are; ``None`` for other prompts.

    Raises:
        InputError: it has another number of axes, no rows, or does not hold whole numbers.
    """
    if not isinstance(prompts, np.ndarray | jax.Array):
        return None
    rows = np.asarray(prompts)
    if rows.ndim != 2 or not rows.size:
        raise InputError(f"An array of token ids must be [row, pos] and not empty; got shape {rows.shape}.")
    if rows.dtype.kind not in "iu":
        raise InputError(f"Token ids must be whole numbers; got dtype {rows.dtype}.")
    return rows


def starts_again(prompts: Prompts) -> bool:
    """Whether prompts can be gone through a second time; a generator cannot."""
    return callable(prompts) or not isinstance(prompts, Iterator)


def documents(model: HookedTransformer, prompts: Prompts, reading: Reading) -> Iterator[Document]:
    """Yields documents in order.

    Raises:
        InputError: something is neither a text, a file nor token ids; a file is missing or broken; an id is outside the
            vocabulary.
    """
    number, texts = 0, []
    for one in _each(prompts, reading):
        texts.append(one)
        if len(texts) == _AT_ONCE:
            yield from _tokenized(model, texts, number)
            number, texts = number + len(texts), []
    yield from _tokenized(model, texts, number)


def _tokenized(model: HookedTransformer, given: list[Any], first: int) -> Iterator[Document]:
    texts = [one for one in given if isinstance(one, str)]
    rows = iter(_ids_of(model, texts))
    for number, one in enumerate(given, first):
        ids = np.asarray(next(rows) if isinstance(one, str) else one)
        ids = ids.astype(np.int32) if not ids.size else ids
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(
                f"prompts[{number}] is neither a text nor a list of token ids: {type(one).__name__} of shape "
                f"{ids.shape}, dtype {ids.dtype}. Rows of one length go in as an array [row, pos]."
            )
        yield Document(number, np.asarray(check_ids(model.cfg, ids, f" of prompts[{number}]")))


def _ids_of(model: HookedTransformer, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    tokenizer: Tokenizer = need_tokenizer(model._tokenizer)
    return tokenizer.plain_rows(texts)


def _each(prompts: Prompts, reading: Reading) -> Iterator[Any]:
    """Yields texts and lists of ids."""
    if isinstance(prompts, str | Path):
        prompts = [prompts]
    elif callable(prompts):
        prompts = prompts()
    if not isinstance(prompts, Iterable) or isinstance(prompts, dict | bytes):
        raise InputError(
            f"prompts= is a {type(prompts).__name__}: give texts, paths of .txt or .jsonl files, lists of token ids, "
            "an iterator of these, or an array of token ids [row, pos]."
        )
    for one in prompts:
        if isinstance(one, Path) or (isinstance(one, str) and _names_a_file(one)):
            yield from _in_file(Path(one), reading)
        else:
            yield one


def _names_a_file(text: str) -> bool:
    return text.endswith(_SUFFIXES) and "\n" not in text and len(text) < 1024


def _in_file(path: Path, reading: Reading) -> Iterator[Any]:
    if path.suffix not in _SUFFIXES:
        raise InputError(f"{path} is neither a .txt nor a .jsonl file. Read it yourself and give its texts.")
    if not path.is_file():
        raise InputError(f"There is no file {path}. A text of one line that ends in {path.suffix} is read as a path.")
    if path.suffix == ".jsonl":
        yield from _in_lines(path, reading.field)
    elif reading.text_separator is None:
        yield _decoded(path)
    else:
        yield from _split(path, reading.text_separator)


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8: {error}.") from error


def _in_lines(path: Path, field: str) -> Iterator[Any]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number}: not JSON, or half written ({error}).") from error
            if not isinstance(entry, dict) or not isinstance(entry.get(field), str | list):
                keys = list(entry) if isinstance(entry, dict) else []
                raise InputError(
                    f"{path}, line {number}: no text under {field!r}.{nearest(field, keys)} It has: "
                    f"{', '.join(keys) or 'no keys'}. Say which with field=."
                )
            yield entry[field]


def _split(path: Path, separator: str) -> Iterator[str]:
    """Yields the parts of a file between separators, a megabyte in memory at a time; empty parts are left out."""
    rest = ""
    with path.open(encoding="utf-8") as stream:
        while chunk := stream.read(_CHUNK):
            *whole, rest = (rest + chunk).split(separator)
            yield from (part for part in whole if part.strip())
    if rest.strip():
        yield rest
