"""The tokens of prompts as one endless sequence, which can be entered anywhere."""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from tljax.errors import HarvestError, InputError
from tljax.harvest.running import kept_tokens
from tljax.harvest.windows import Windows

Rows = dict[str, np.ndarray]
"""Activations ``[token, width]`` by point."""


class TokenStream:
    """The kept tokens of windows that start again when they end, counted from 0.

    Attributes:
        at: number of the first token of the current batch.
        end: number of the token after its last.
    """

    at: int
    end: int

    def __init__(
        self, source: Callable[[], Iterator[Windows]], again: bool, skipped: tuple[int, ...], empty: InputError
    ) -> None:
        self._source, self._again, self._skipped, self._empty = source, again, skipped, empty
        self._iterator: Iterator[Windows] | None = None
        self._restart()

    def _restart(self) -> None:
        if self._iterator is not None and not self._again:
            raise HarvestError(
                "The prompts are an iterator, which cannot go back to its beginning: give a list, files, or a function "
                "that returns a new iterator."
            )
        self._iterator, self._hash = self._source(), hashlib.blake2b(digest_size=16)
        self.at = self.end = self._batches = self._of_epoch = 0
        self._current: tuple[Windows, np.ndarray] | None = None
        self._rows: Rows | None = None

    @property
    def digest(self) -> str:
        """Digest of the windows that were read."""
        read = self._hash.copy()
        read.update(b"" if self._current is None else self._current[0].digest())
        return read.hexdigest()

    def advance(self) -> None:
        """Goes to the next batch.

        Raises:
            HarvestError: there is none, and the prompts cannot start again; or none of their tokens is kept.
        """
        assert self._iterator is not None
        if self._current is not None:
            self._hash.update(self._current[0].digest())
            self._batches += 1
        windows = next(self._iterator, None)
        if windows is None:
            windows = self._next_epoch()
        given = kept_tokens(windows, self._skipped)
        self._current, self._rows = (windows, given), None
        self.at, self.end = self.end, self.end + int(given.sum())
        self._of_epoch += int(given.sum())

    def _next_epoch(self) -> Windows:
        if self._current is None:
            raise self._empty
        if not self._of_epoch:
            raise HarvestError("Every token of the prompts is left out by skip_special=.")
        if not self._again:
            raise HarvestError(
                f"The prompts ended after {self.end} tokens, and an iterator cannot start again: give a list, files, "
                "or a function that returns a new iterator, or fewer steps."
            )
        self._iterator, self._of_epoch = self._source(), 0
        return next(self._iterator)

    def go_to(self, token: int) -> tuple[int, str]:
        """Goes to the batch that holds a token; returns how many batches were read, with that one, and their digest."""
        if token < self.at:
            self._restart()
        while self._current is None or self.end <= token:
            self.advance()
        return self._batches + 1, self.digest

    def go_to_batch(self, number: int) -> None:
        """Goes to a batch by how many batches have been read then."""
        if self._batches + 1 > number:
            self._restart()
        while self._current is None or self._batches + 1 < number:
            self.advance()

    def rows(self, run: Callable[[Windows, np.ndarray], Rows]) -> Rows:
        """Returns what ``run`` makes of the current batch, once."""
        assert self._current is not None
        if self._rows is None:
            self._rows = run(*self._current)
        return self._rows
