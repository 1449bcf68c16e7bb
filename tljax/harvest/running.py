"""The loop of a harvest: the model runs one batch while a thread writes the one before."""

import hashlib
import queue
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tljax.errors import HarvestError
from tljax.fingerprint import fingerprint_of
from tljax.harvest.collecting import Collected, Collector
from tljax.harvest.index import FILE, Index
from tljax.harvest.parts import RECORD, read_parts, record_of
from tljax.harvest.points import hooks_in_words
from tljax.harvest.windows import Windows
from tljax.harvest.writing import SHARD, ShardWriter
from tljax.model.hooked_transformer import HookedTransformer
from tljax.progress import Progress

_AHEAD = 2
"""Batches that may wait for the writer: they are in memory."""


def new_index(form: str, model: HookedTransformer, collector: Collector, recipe: dict[str, Any]) -> Index:
    """Returns the index of a harvest that has not begun."""
    arrays = {name: {"dtype": dtype.name, "width": width} for name, (dtype, width) in collector.headers.items()}
    device = jax.devices()[0]
    made_with = {"jax": jax.__version__, "device": f"{device.platform} {device.device_kind}"}
    stated = {**collector.describe(), **recipe, "hooks": hooks_in_words(model)}
    return Index(
        format=form, model=fingerprint_of(model, together=True), recipe=stated, made_with=made_with, arrays=arrays
    )


def begin(directory: Path, wanted: Index, resume: bool) -> Index:
    """Returns the index to go on from, and clears away what a killed harvest left.

    Raises:
        HarvestError: the directory holds something else, another harvest, or one that may not be gone on with.
    """
    if directory.exists() and not directory.is_dir():
        raise HarvestError(f"{directory} is a file; directory= names a directory.")
    directory.mkdir(parents=True, exist_ok=True)
    left = [path for path in directory.iterdir() if not _is_scrap(path)]
    if left and not (directory / FILE).is_file():  # the index is written before the first shard
        raise HarvestError(
            f"{directory} holds something else ({', '.join(sorted(path.name for path in left)[:3])}): name an empty "
            "or a new directory."
        )
    index = wanted
    if (directory / FILE).is_file():
        index = Index.read(directory, wanted.format)
        if not resume:
            raise HarvestError(f"{directory} holds a harvest already: resume=True goes on with it.")
        index.refuse_other(wanted, directory)
    parts = {number: part for number, part in read_parts(directory).items() if number >= len(index.shards)}
    listed = index
    while (number := len(listed.shards)) in parts:
        listed = listed.with_part(parts.pop(number))
    if listed is not index or index is wanted:
        listed.write(directory)
    known = {FILE, *(shard.file for shard in listed.shards), *map(record_of, parts)}
    known |= {part.shard.file for part in parts.values()}
    for path in directory.iterdir():
        if _is_scrap(path) or (_is_ours(path) and path.name not in known):
            path.unlink()
    return listed


def _is_scrap(path: Path) -> bool:
    """Whether this is a temporary file of :func:`tljax.safetensors_files.replace_file`, or a sign of failure."""
    return path.name.startswith((f".{FILE}.", ".shard-", ".part-"))


def _is_ours(path: Path) -> bool:
    """Whether this is a shard or a shard's record."""
    return SHARD.fullmatch(path.name) is not None or RECORD.fullmatch(path.name) is not None


def skip_harvested(index: Index, batches: Iterator[Windows], directory: Path) -> None:
    """Goes past the windows that are stored already, and checks that they are the same.

    Raises:
        HarvestError: they are others.
    """
    first = 0
    for number, shard in enumerate(index.shards):
        digest, windows = hashlib.blake2b(digest_size=16), 0
        while windows < shard.windows and (batch := next(batches, None)) is not None:
            digest.update(batch.digest())
            windows += batch.count
        if windows != shard.windows or digest.hexdigest() != shard.digest:
            raise other_prompts(directory, number, f"windows {first} to {first + shard.windows - 1}")
        first += shard.windows


def other_prompts(directory: Path, number: int, where: str = "the windows") -> HarvestError:
    """Returns the error for a shard that was made of other prompts."""
    return HarvestError(
        f"{directory} was harvested from other prompts: they differ in {where} (shard-{number:05d}.safetensors). Give "
        "the same prompts in the same order to go on (a generator from its beginning), or another directory."
    )


def check_room(directory: Path, needed: int, what: str) -> None:
    """Raises HarvestError if a disk has less room than a harvest needs."""
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise HarvestError(
            f"{what} take {needed / 1e9:.2f} GB, and the disk of {directory} has {free / 1e9:.2f} GB free. "
            "Harvest fewer tokens (limit=) or points, use another disk, or an ActivationBuffer, which stores nothing."
        )


def kept_tokens(windows: Windows, skipped: tuple[int, ...]) -> np.ndarray:
    """Returns which tokens of a batch may be kept, ``[token]``: text, and not special."""
    kept = windows.text if not skipped else windows.text & ~np.isin(windows.tokens, skipped)
    return kept.reshape(-1)


def run(
    model: HookedTransformer, batches: Iterator[Windows], writer: ShardWriter, skipped: tuple[int, ...],
    progress: bool | None,
) -> None:  # fmt: skip
    """Runs batches and writes shards until the prompts end or the writer is full.

    Raises:
        HarvestError: what the writer raised.
    """
    total = None if writer.limit is None else writer.limit - writer.index.counts["tokens"]
    with Progress(total, progress, "harvest", " tokens") as bar, _Background(writer, bar) as background:
        for windows in batches:
            if background.is_over:
                break
            given = kept_tokens(windows, skipped)
            collected = writer.collector.collect(model, windows, given)
            for array in jax.tree.leaves(collected):
                array.copy_to_host_async()
            background.put((windows, given, collected))
        background.finish()
    writer.flush(complete=True)


class _Background:
    """A thread that hands batches to the writer in order; its error is raised where the next batch is put."""

    def __init__(self, writer: ShardWriter, bar: Progress) -> None:
        self._writer, self._bar = writer, bar
        self._queue: queue.Queue[tuple[Windows, np.ndarray, Collected] | None] = queue.Queue(_AHEAD)
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="harvest writer", daemon=True)

    @property
    def is_over(self) -> bool:
        """Whether no more batches are wanted."""
        return self._stopped.is_set()

    def put(self, item: tuple[Windows, np.ndarray, Collected]) -> None:
        while not self.is_over:
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def finish(self) -> None:
        """Waits until all that was put is written.

        Raises:
            BaseException: what went wrong in the thread.
        """
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=0.1)
                break
            except queue.Full:
                continue
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while not self._stopped.is_set() and (item := self._queue.get()) is not None:
                self._bar.advance(self._writer.add(*item))
                if self._writer.is_full:
                    self._stopped.set()
        except BaseException as error:
            self._error = error
        finally:
            self._stopped.set()

    def __enter__(self) -> "_Background":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stopped.set()
        with self._queue.mutex:
            self._queue.queue.clear()
            self._queue.not_full.notify_all()
        self._queue.put(None)
        self._thread.join()
