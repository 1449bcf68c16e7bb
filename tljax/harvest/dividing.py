"""A harvest by several processes: each runs and writes shards of its own, and the first lists them all in the index.

What a shard holds depends on the prompts and the options alone, so the store has the same bytes whoever wrote it, and a
harvest may be gone on with by another number of processes.
"""

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tljax.errors import HarvestError
from tljax.harvest.collecting import Collector
from tljax.harvest.index import FILE, Index, Part
from tljax.harvest.parts import FAILED, read_parts, record_of, write_part
from tljax.harvest.running import begin, kept_tokens, other_prompts, run
from tljax.harvest.windows import Windows
from tljax.harvest.writing import ShardWriter
from tljax.model.hooked_transformer import HookedTransformer
from tljax.processes import check_same, is_distributed, processes_of, readable, together, whole_mesh

_LOOK_EVERY = 0.1
"""Seconds between looks at what the other processes wrote."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Division:
    """How the shards of a harvest are divided among processes.

    Attributes:
        mesh: of the devices of all processes that take part; ``None`` if this one is alone.
        n_processes: how many take part.
        place: which of them this one is, from 0.
        in_step: whether each batch is run by all processes, because the model is spread over their devices; otherwise
            each runs the batches of its own shards.
    """

    mesh: Mesh | None = None
    n_processes: int = 1
    place: int = 0
    in_step: bool = False

    @classmethod
    def of(cls, model: HookedTransformer) -> "Division":
        """Returns the division for a model that lies on this process's devices, or on those of several."""
        in_step = model.mesh is not None and is_distributed(model.mesh)
        if not in_step and jax.process_count() == 1:
            return cls()
        mesh = model.mesh if in_step and model.mesh is not None else whole_mesh()
        processes = processes_of(mesh)
        return cls(mesh=mesh, n_processes=len(processes), place=processes.index(jax.process_index()), in_step=in_step)

    def writes(self, number: int) -> bool:
        """Whether this process writes a shard."""
        return number % self.n_processes == self.place

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Ends a block with an error on every process if one has an error in it."""
        with contextlib.ExitStack() as stack:
            if self.mesh is not None:
                stack.enter_context(together(self.mesh, "The harvest", HarvestError))
            yield


def begin_together(
    division: Division, directory: Path, start: Index, resume: bool, first: Windows, limit: int | None
) -> tuple[Index, dict[int, Part]]:
    """Returns the index to go on from, and the shards that are whole but not in it, by number.

    Raises:
        HarvestError: as :func:`~tljax.harvest.running.begin`; or processes were given different prompts or options, or
            do not share the directory.
    """
    if division.mesh is None:
        return begin(directory, start, resume), read_parts(directory)
    told = f"{directory}{start.recipe}{start.arrays}".encode() + first.digest()
    check_same(told, "Prompts or options of a harvest", division.mesh, HarvestError)
    if limit is not None and start.recipe.get("max_norm_ratio") is not None:
        raise HarvestError(
            "limit= and max_norm_ratio= came together in a harvest by several processes: where the limit is depends on "
            "norms that no process sees all of. Leave one of them out, or harvest with one process."
        )
    with division.together():
        if division.place == 0:
            begin(directory, start, resume)
    with division.together():
        if not (directory / FILE).is_file():
            raise HarvestError(
                f"Process {jax.process_index()} does not see {directory / FILE}, which the first process wrote: name a "
                "directory that all hosts share, since several processes harvest into one."
            )
        index = Index.read(directory, start.format)
        index.refuse_other(start, directory)
        return index, read_parts(directory)


class PartWriter(ShardWriter):
    """Writes shards in any order, each with a record of what it adds to the index."""

    def __init__(self, directory: Path, collector: Collector, index: Index, batches: int, windows: int) -> None:
        super().__init__(directory, collector, index, batches, None)
        self._per_shard = windows
        self._first = 0

    def add(self, windows: Windows, given: np.ndarray, collected: Any) -> int:
        if not self._windows:
            self._first = windows.first
        return super().add(windows, given, collected)

    def _number(self) -> int:
        return self._first // self._per_shard

    def flush(self, *, complete: bool = False) -> None:
        """Writes what waits as a shard, then its record."""
        if self._windows:
            write_part(self.directory, self._written())
            self._start()


class Course:
    """Goes through the windows that are left: yields those to run, and keeps a digest of each shard's.

    Args:
        batches: the windows after those in the index.
        division: who writes what.
        parts: shards that are whole already.
        per_shard: windows of a shard.
    """

    def __init__(self, batches: Iterator[Windows], division: Division, parts: dict[int, Part], per_shard: int) -> None:
        self._batches, self._division, self._parts, self._per_shard = batches, division, parts, per_shard
        self._digests: dict[int, Any] = {}

    def number(self, windows: Windows) -> int:
        """Returns the shard that windows belong to."""
        return windows.first // self._per_shard

    def __iter__(self) -> Iterator[Windows]:
        for windows in self._batches:
            number = self.number(windows)
            self._digests.setdefault(number, hashlib.blake2b(digest_size=16)).update(windows.digest())
            if number not in self._parts and (self._division.in_step or self._division.writes(number)):
                yield windows

    @property
    def shards(self) -> dict[int, str]:
        """Digest of the windows of each shard, by number."""
        return {number: one.hexdigest() for number, one in self._digests.items()}


def up_to(batches: Iterator[Windows], skipped: tuple[int, ...], tokens: int) -> Iterator[Windows]:
    """Yields batches until these hold a number of tokens that are kept."""
    while tokens > 0 and (windows := next(batches, None)) is not None:
        tokens -= int(kept_tokens(windows, skipped).sum())
        yield windows


def run_divided(
    model: HookedTransformer, course: Course, writer: PartWriter, division: Division, skipped: tuple[int, ...],
    progress: bool | None,
) -> None:  # fmt: skip
    """Runs and writes this process's shards, and waits until all shards are in the index.

    Raises:
        HarvestError: something went wrong here, or on another process.
    """
    failed = writer.directory / f"{FAILED}{division.place}"
    try:
        if division.in_step:
            _run_in_step(model, course, writer, division, skipped)
        else:
            run(model, iter(course), writer, skipped, progress)
        if division.place == 0:
            _assemble(writer.directory, writer.index, course.shards)
        else:
            _wait(writer.directory, lambda: Index.read(writer.directory, writer.index.format).complete)
    except Exception:
        if not failed.exists():
            with contextlib.suppress(OSError):  # the disk may be full; then the others wait for jax to miss this one
                failed.touch()
        raise


def _run_in_step(
    model: HookedTransformer, course: Course, writer: PartWriter, division: Division, skipped: tuple[int, ...]
) -> None:
    """Runs all batches together with the other processes; nothing runs beside, as that would mix up their order."""
    for windows in course:
        given = kept_tokens(windows, skipped)
        collected = readable(writer.collector.collect(model, windows, given))
        with division.together():
            if division.writes(course.number(windows)):
                writer.add(windows, given, collected)
            else:
                writer.check(windows, given, collected)
    with division.together():
        writer.flush(complete=True)


def _assemble(directory: Path, index: Index, shards: dict[int, str]) -> None:
    """Lists all shards in the index, in order, as soon as they are there."""
    for number, digest in sorted(shards.items()):
        _wait(directory, lambda number=number: (directory / record_of(number)).is_file())
        part = read_parts(directory).get(number)
        if part is None or part.shard.digest != digest:
            raise other_prompts(directory, number)
        index = index.with_part(part)
    dataclasses.replace(index, complete=True).write(directory)
    for number in shards:
        (directory / record_of(number)).unlink(missing_ok=True)


def _wait(directory: Path, done: Callable[[], bool]) -> None:
    """Waits for the other processes. One that died ends this one too: jax sees to that.

    Raises:
        HarvestError: another process failed.
    """
    while not done():
        if failed := sorted(path.name for path in directory.glob(f"{FAILED}*")):
            raise HarvestError(
                f"The harvest failed on process {failed[0].removeprefix(FAILED)} of those that make it, whose own "
                "message says why. What the others wrote is kept: make the same call again to go on."
            )
        time.sleep(_LOOK_EVERY)
