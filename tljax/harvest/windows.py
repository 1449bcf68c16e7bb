"""Windows: documents cut to the length that the model runs at once."""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from tljax.checks import whole
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError, TokenizerError
from tljax.harvest.documents import Document, Prompts, Reading, documents, token_rows
from tljax.model.hooked_transformer import HookedTransformer
from tljax.text.inputs import check_ids

Separator = int | Literal["bos", "eos", "none"] | None
Short = Literal["pad", "drop"]

CONTEXT_SIZE = 128
NOTHING = -1
"""Stands for the token or the document of padding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cutting:
    """How documents become windows; all of it is stated in a store's index.

    Attributes:
        context_size: tokens of a window, special ones included.
        form: ``"packed"``: documents joined and cut; ``"windowed"``: each document cut alone; ``"rows"``: token rows
            as they are.
        bos: id at the start of every window; ``None`` puts none there.
        separator: id between packed documents; ``None`` puts none there.
        short: of ``"windowed"``: whether windows shorter than ``context_size`` are padded or dropped.
    """

    context_size: int
    form: Literal["packed", "windowed", "rows"]
    bos: int | None
    separator: int | None
    short: Short


class Windows(NamedTuple):
    """A batch of windows.

    Attributes:
        tokens: int32 ``[window, pos]``.
        text: ``[window, pos]``, ``False`` at padding and in windows that only fill the batch.
        documents: int32 ``[window, pos]``, the number of each token's document.
        count: how many windows do not only fill the batch.
        first: how many windows came before.
    """

    tokens: np.ndarray
    text: np.ndarray
    documents: np.ndarray
    count: int
    first: int

    def digest(self) -> bytes:
        """Returns a digest of the windows' tokens."""
        kept = self.tokens[: self.count], self.text[: self.count], self.documents[: self.count]
        return hashlib.blake2b(b"".join(one.tobytes() for one in kept), digest_size=16).digest()


class _Window(NamedTuple):
    tokens: np.ndarray
    documents: np.ndarray


def read_cutting(
    model: HookedTransformer,
    prompts: Prompts,
    *,
    context_size: int | None,
    packed: bool,
    prepend_bos: bool | None,
    separator: Separator,
    short: Short,
) -> Cutting:
    """Checks the options that say how prompts become windows.

    Raises:
        InputError: a window is longer than the model's context, or than the rows of a token array.
        TokenizerError: a BOS or a separator is asked for that the model does not have.
    """
    cfg, rows = model.cfg, token_rows(prompts)
    if rows is not None:
        if prepend_bos or separator is not None:
            raise InputError(
                "A token array's rows are run as they are: prepend_bos= and separator= do not apply. Give lists of "
                "token ids, or texts, to have windows made of them."
            )
        size = _context_size(cfg, rows.shape[1] if context_size is None else context_size)
        if size != rows.shape[1]:
            raise InputError(
                f"context_size={size}, but the rows have {rows.shape[1]} tokens and are run as they are: leave "
                "context_size= out, cut the rows, or give them as a list to have them joined and cut anew."
            )
        return Cutting(context_size=size, form="rows", bos=None, separator=None, short="pad")
    size = _context_size(cfg, min(CONTEXT_SIZE, cfg.n_ctx) if context_size is None else context_size)
    starts = cfg.default_prepend_bos if prepend_bos is None else prepend_bos
    bos = _special(model, "bos", "prepend_bos=True") if starts else None
    if size < 1 + (bos is not None):
        raise InputError(f"context_size={size} leaves no room for a token after BOS.")
    if not packed and isinstance(separator, int | str) and separator != "none":
        raise InputError("separator= stands between packed documents; packed=False joins none. Leave it out.")
    between = _separator(model, separator, bos) if packed else None
    return Cutting(context_size=size, form="packed" if packed else "windowed", bos=bos, separator=between, short=short)


def _context_size(cfg: HookedTransformerConfig, given: int) -> int:
    size = whole(given, "context_size", at_least=1)
    if size > cfg.n_ctx:
        raise InputError(
            f"context_size={size}, but this model takes at most n_ctx={cfg.n_ctx} tokens: choose context_size="
            f"{cfg.n_ctx} or less, or (rotary models) load with a larger n_ctx=."
        )
    return size


def special_ids(model: HookedTransformer) -> dict[str, int]:
    """Returns the ids of the special tokens that a model or its tokenizer knows, of ``bos``, ``eos`` and ``pad``."""
    cfg, tokenizer = model.cfg, model._tokenizer
    of_config = {"bos": cfg.bos_token_id, "eos": next(iter(cfg.eos_token_ids or ()), None), "pad": cfg.pad_token_id}
    known = of_config if tokenizer is None else {
        "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id
    }  # fmt: skip
    return {name: id for name, id in known.items() if id is not None}


def _special(model: HookedTransformer, name: str, asked: str) -> int:
    known = special_ids(model)
    if name not in known:
        raise TokenizerError(
            f"{asked} needs the id of {name.upper()}, and neither the model nor its tokenizer has one. Pass "
            f"{'prepend_bos=False' if name == 'bos' else 'separator=<an id>, or separator=' + repr('none')}, or attach "
            "a tokenizer: model.set_tokenizer(tokenizer)."
        )
    return known[name]


def _separator(model: HookedTransformer, separator: Separator, bos: int | None) -> int | None:
    if separator == "none":
        return None
    if separator is None:
        return bos if bos is not None else special_ids(model).get("eos")
    if isinstance(separator, str):
        return _special(model, separator, f"separator={separator!r}")
    return int(check_ids(model.cfg, np.asarray([whole(separator, "separator")]), " (separator=)")[0])


def window_batches(
    model: HookedTransformer, prompts: Prompts, cutting: Cutting, reading: Reading, batch_size: int
) -> Iterator[Windows]:
    """Yields windows in batches of one shape; the last is filled with copies of its last window."""
    pending: list[_Window] = []
    first = 0
    for window in _windows(model, prompts, cutting, reading):
        pending.append(window)
        if len(pending) == batch_size:
            yield _batch(pending, cutting.context_size, batch_size, first)
            first, pending = first + batch_size, []
    if pending:
        yield _batch(pending, cutting.context_size, batch_size, first)


def _batch(windows: list[_Window], size: int, batch_size: int, first: int) -> Windows:
    tokens = np.zeros((batch_size, size), np.int32)
    text = np.zeros((batch_size, size), bool)
    numbers = np.full((batch_size, size), NOTHING, np.int32)
    for row, window in enumerate(windows):
        length = len(window.tokens)
        tokens[row, :length], numbers[row, :length], text[row, :length] = window.tokens, window.documents, True
        tokens[row, length:] = window.tokens[-1]
    tokens[len(windows) :] = tokens[len(windows) - 1]
    return Windows(tokens, text, numbers, len(windows), first)


def _windows(model: HookedTransformer, prompts: Prompts, cutting: Cutting, reading: Reading) -> Iterator[_Window]:
    if (rows := token_rows(prompts)) is not None:
        for number, row in enumerate(rows):
            yield _Window(check_ids(model.cfg, row, f" of row {number}"), np.full(len(row), number, np.int32))
        return
    source = documents(model, prompts, reading)
    yield from _packed(source, cutting) if cutting.form == "packed" else _alone(source, cutting)


def _alone(source: Iterator[Document], cutting: Cutting) -> Iterator[_Window]:
    start = np.asarray([] if cutting.bos is None else [cutting.bos], np.int32)
    room = cutting.context_size - len(start)
    for number, ids in source:
        for at in range(0, len(ids), room):
            tokens = np.concatenate([start, ids[at : at + room]])
            if len(tokens) == cutting.context_size or cutting.short == "pad":
                yield _Window(tokens, np.full(len(tokens), number, np.int32))


def _packed(source: Iterator[Document], cutting: Cutting) -> Iterator[_Window]:
    stream = _Stream()
    room = cutting.context_size - (cutting.bos is not None)
    for number, ids in source:
        if not len(ids):
            continue
        if number and cutting.separator is not None and not stream.is_new:
            stream.add(np.asarray([cutting.separator], np.int32), number)
        stream.add(ids, number)
        while (found := stream.take(room, cutting)) is not None:
            yield found


class _Stream:
    """Tokens that wait until they fill a window."""

    def __init__(self) -> None:
        self._tokens, self._documents = np.zeros(0, np.int32), np.zeros(0, np.int32)
        self.is_new = True

    def add(self, ids: np.ndarray, number: int) -> None:
        self.is_new = False
        self._tokens = np.concatenate([self._tokens, ids])
        self._documents = np.concatenate([self._documents, np.full(len(ids), number, np.int32)])

    def take(self, room: int, cutting: Cutting) -> _Window | None:
        """Returns the next window if there are tokens for one. A separator right after BOS is dropped if it is BOS."""
        doubled = cutting.bos is not None and cutting.bos == cutting.separator
        drop = int(doubled and len(self._tokens) > 0 and self._tokens[0] == cutting.bos)
        if len(self._tokens) < room + drop:
            return None
        tokens, numbers = self._tokens[drop : drop + room], self._documents[drop : drop + room]
        self._tokens, self._documents = self._tokens[drop + room :], self._documents[drop + room :]
        if cutting.bos is not None:
            tokens, numbers = np.concatenate([[cutting.bos], tokens]), np.concatenate([numbers[:1], numbers])
        return _Window(tokens.astype(np.int32), numbers.astype(np.int32))


def no_windows(cutting: Cutting) -> InputError:
    """Returns the error for prompts that give not a single window."""
    if cutting.form == "packed" or cutting.short == "drop":
        return InputError(
            f"The prompts hold too few tokens for one window of context_size={cutting.context_size}: give more, choose "
            'a smaller context_size=, or packed=False with short="pad", which keeps short documents.'
        )
    return InputError("prompts= holds no tokens: the texts are empty, or the iterator was used up before.")


def read_skipped(model: HookedTransformer, skip_special: Any) -> tuple[int, ...]:
    """Returns the token ids whose activations are not kept: ``True`` means BOS, EOS and padding.

    Raises:
        InputError: ``True`` without any known special token, or an id outside the vocabulary.
    """
    if skip_special is False:
        return ()
    if skip_special is True:
        if not (known := special_ids(model)):
            raise InputError("skip_special=True, but the model has no special tokens: name ids, skip_special=[0].")
        return tuple(sorted(set(known.values())))
    ids = np.atleast_1d(np.asarray(skip_special))
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise InputError(f"skip_special={skip_special!r} must be True, False or a list of token ids.")
    return tuple(sorted(set(map(int, check_ids(model.cfg, ids, " (skip_special=)")))))
