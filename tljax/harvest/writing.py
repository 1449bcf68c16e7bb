"""Shards: rows gathered in memory until a file is full, then written whole or not at all."""

import contextlib
import dataclasses
import errno
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tljax.errors import HarvestError
from tljax.harvest.collecting import Arrays, Collected, Collector, refuse_not_finite
from tljax.harvest.index import Index, Part, Shard
from tljax.harvest.windows import NOTHING, Windows
from tljax.safetensors_files import write_safetensors

SUMS = "sums/"
"""Prefix of a shard's sums."""
SHARD = re.compile(r"shard-\d{5,}\.safetensors")
"""Names of shards."""
CONTEXT = "context"
"""Tokens of a shard's windows ``[window, pos]``, -1 at padding."""


class ShardWriter:
    """Gathers batches into shards; every shard holds the same number of windows but the last.

    Args:
        directory: where the shards go.
        collector: what is stored.
        index: the index to go on from.
        batches: batches of a shard.
        limit: tokens after which the harvest is over; ``None`` stores all.
    """

    def __init__(self, directory: Path, collector: Collector, index: Index, batches: int, limit: int | None) -> None:
        self.directory, self.collector, self.index = directory, collector, index
        self.batches, self.limit = batches, limit
        self._start()

    def _start(self) -> None:
        self._parts: dict[str, list[np.ndarray]] = {}
        self._sums: Arrays = {}
        self._digest = hashlib.blake2b(digest_size=16)
        self._windows = self._batches = self._tokens = 0
        self._left_out = {"special": 0, "large_norm": 0}
        self._documents = self.index.counts["documents"]

    @property
    def is_full(self) -> bool:
        """Whether ``limit`` tokens are stored or waiting."""
        return self.limit is not None and self.index.counts["tokens"] + self._tokens >= self.limit

    def add(self, windows: Windows, given: np.ndarray, collected: Collected) -> int:
        """Adds a batch, and writes a shard if that fills it.

        Args:
            windows: what was run.
            given: ``[token]``, which tokens were not special.
            collected: what came of it; waited for here.

        Returns:
            How many tokens were kept.

        Raises:
            HarvestError: an activation is not finite, or the shard cannot be written.
        """
        values, kept, _, sums = self.check(windows, given, collected)
        rows = np.flatnonzero(kept)
        text = windows.text.reshape(-1)
        self._left_out["special"] += int(text.sum() - given.sum())
        self._left_out["large_norm"] += int(given.sum()) - len(rows)
        self._append(windows, values, rows)
        self._sums = self.collector.merge(self._sums, sums)
        self._digest.update(windows.digest())
        self._documents = max(self._documents, int(windows.documents.max()) + 1)
        self._windows, self._batches = self._windows + windows.count, self._batches + 1
        self._tokens += len(rows)
        if self._batches == self.batches:
            self.flush()
        return len(rows)

    def check(self, windows: Windows, given: np.ndarray, collected: Collected) -> Any:
        """Returns what came of a batch on the host.

        Raises:
            HarvestError: an activation is not finite.
        """
        fetched = jax.device_get(collected)
        if not fetched.finite.all():
            number = int(np.argmin(fetched.finite))
            point = self.collector.points[number]
            dtype = [*self.collector.headers.values()][number][0].name
            raise refuse_not_finite(point, fetched.values[number], given, windows, dtype)
        return fetched

    def _append(self, windows: Windows, values: Any, rows: np.ndarray) -> None:
        size = windows.tokens.shape[1]
        beside = {
            "tokens": windows.tokens.reshape(-1)[rows],
            "positions": (rows % size).astype(np.int32),
            "documents": windows.documents.reshape(-1)[rows],
            "windows": (windows.first + rows // size).astype(np.int32),
            CONTEXT: np.where(windows.text, windows.tokens, NOTHING)[: windows.count],
        }
        stored = {name: value[rows] for name, value in zip(self.collector.headers, values, strict=True)}
        for name, part in (stored | beside).items():
            self._parts.setdefault(name, []).append(part)

    def flush(self, *, complete: bool = False) -> None:
        """Writes what waits as a shard, then the index.

        Raises:
            HarvestError: the disk is full, or cannot be written.
        """
        index = self.index
        if self._windows:
            index = index.with_part(self._written())
        if index is self.index and index.complete == complete:
            return
        index = dataclasses.replace(index, complete=complete)
        with _explained(self.directory, len(self.index.shards)):
            index.write(self.directory)
        self.index = index
        self._start()

    def _number(self) -> int:
        """Returns which shard of the store is gathered."""
        return len(self.index.shards)

    def _written(self) -> Part:
        """Writes what waits as a shard."""
        number = self._number()
        name = f"shard-{number:05d}.safetensors"
        parts = self._parts | {SUMS + one: value for one, value in self._sums.items()}
        self._parts = {}
        headers = {one: _header(part) for one, part in parts.items()}
        widest = sorted(headers, key=lambda one: -headers[one][0].itemsize)  # keeps each aligned
        tokens = headers["tokens"][1][0]

        def whole(one: str) -> np.ndarray:
            part = parts.pop(one)  # one array at a time is in memory twice
            return np.concatenate(part) if isinstance(part, list) else part

        with _explained(self.directory, number):
            path, metadata = self.directory / name, {"format": self.index.format}
            write_safetensors(path, {one: headers[one] for one in widest}, whole, metadata, sealed=True, durable=True)
            size = path.stat().st_size
        shard = Shard(file=name, bytes=size, tokens=tokens, windows=self._windows, digest=self._digest.hexdigest())
        counts = {"windows": self._windows, "tokens": tokens, **self._left_out}
        return Part(number=number, shard=shard, counts=counts, documents=self._documents)


def _header(part: np.ndarray | list[np.ndarray]) -> tuple[np.dtype, tuple[int, ...]]:
    """Returns the dtype and the shape of an array, or of the whole that parts along its first axis make."""
    if isinstance(part, list):
        return part[0].dtype, (sum(map(len, part)), *part[0].shape[1:])
    return part.dtype, part.shape


@contextlib.contextmanager
def _explained(directory: Path, done: int) -> Iterator[None]:
    """Turns errors of the file system into a HarvestError that says what is safe and what to do."""
    try:
        yield
    except OSError as error:
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise HarvestError(
            f"A shard could not be written to {directory}: {why}. The {done} shards before it are whole, and nothing "
            "of it is there. Make room and make the same call again: it goes on where it stopped."
        ) from error
