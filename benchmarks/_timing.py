"""Timing shared by the benchmarks: interleaved runs, medians, compilation counts, tables and JSON."""

import dataclasses
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

GPT2_SMALL: dict[str, Any] = {
    "d_model": 768, "n_layers": 12, "n_heads": 12, "d_head": 64, "d_mlp": 3072, "n_ctx": 1024,
    "d_vocab": 50257, "act_fn": "gelu_new",
}  # fmt: skip
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Timing:
    """One task's ``turns``: ``median`` and ``fastest`` seconds, and the ``compilations`` in all of them."""

    median: float
    fastest: float
    compilations: int
    turns: int


class CompilationCounter:
    """Counts the programs XLA compiles. Listeners cannot be removed, so make one for the whole process."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_: Any) -> None:
        self.count += event == COMPILE_EVENT

    @contextmanager
    def during(self, counts: dict[str, int], name: str) -> Iterator[None]:
        """Adds the compilations inside the block to ``counts[name]``."""
        before = self.count
        yield
        counts[name] = counts.get(name, 0) + self.count - before


def interleaved(
    tasks: Mapping[str, Callable[[int], Any]],
    repeats: int,
    warmup: int = 2,
    counter: CompilationCounter | None = None,
    budget: float = math.inf,
) -> dict[str, Timing]:
    """Times tasks in turns (a, b, a, b, ...) so that a slow moment of the machine hits all of them.

    Args:
        tasks: name to a function of the iteration number that returns only when its work is done.
        repeats: timed turns.
        warmup: untimed turns before them, numbered from ``repeats`` on: other sites than the timed ones.
        counter: counts compilations during the timed turns.
        budget: seconds after which no further turn begins, of either kind; one of each is run whatever it takes.

    Returns:
        The timing of each task.
    """
    began = time.perf_counter()
    for number in range(warmup):
        if number and time.perf_counter() - began > budget:
            break
        for task in tasks.values():
            task(repeats + number)
    counter = counter or CompilationCounter()
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    compilations = dict.fromkeys(tasks, 0)
    for number in range(repeats):
        if number and time.perf_counter() - began > budget:
            break
        for name, task in tasks.items():
            with counter.during(compilations, name):
                start = time.perf_counter()
                task(number)
                seconds[name].append(time.perf_counter() - start)
    return {
        name: Timing(statistics.median(values), min(values), compilations[name], len(values))
        for name, values in seconds.items()
    }


def use_threads(threads: int) -> None:
    """Confines this process to some of its CPUs: XLA sizes its pool by them. Call it before anything runs."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def machine(*packages: str) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "device": f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}",
        "threads": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
    }


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows of equal keys as an aligned table."""
    header = list(rows[0])
    cells = [header] + [[str(row[key]) for key in header] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def write_json(path: Path | None, results: Mapping[str, Any]) -> None:
    """Writes the results where ``--json`` says, if it was given."""
    if path is not None:
        path.write_text(json.dumps(results, indent=2) + "\n")
