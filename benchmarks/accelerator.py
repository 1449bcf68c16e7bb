"""One GPU or TPU: numerics against float64, times beside torch's on the same card, peak memory, in under six minutes.

::

    python benchmarks/accelerator.py --json accelerator.json
    python benchmarks/accelerator.py --small          # what a CPU runs: the same work, narrow

Torch stands beside it where it sees the same device (CUDA, or the CPU); EAP-IG, a dictionary's step and the harvest
have no peer in torch here. Each row has ``--budget`` seconds, after which it begins no further turn, and nothing
begins after ``--seconds``. A row that fails is reported with its error, and the next one runs. The file of ``--json``
is written anew after every row.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")  # torch needs the rest of the card

import jax
from _accelerator_numerics import BARS, numerics
from _accelerator_work import SMALL, Work
from _timing import GPT2_SMALL, CompilationCounter, interleaved, machine, print_table, write_json

Row = dict[str, Any]
EMPTY: Row = {
    "work": "", "ms": "", "torch ms": "", "of torch": "", "turns": "", "compilations": "", "in use MB": "",
    "peak MB": "", "row s": "", "error": "",
}  # fmt: skip


def timed(work: Work, repeats: int, budget: float, ends: float, only: list[str] | None = None) -> Iterator[Row]:
    """Times each piece in turns with its peer, and yields its row; what would start after ``ends`` is left out."""
    counter = CompilationCounter()
    for name, make in work.pieces():
        if only and not any(part in name for part in only):
            continue
        row, began = EMPTY | {"work": name}, time.perf_counter()
        if began > ends:
            yield row | {"ms": "left out: no time"}
            continue
        try:
            tasks = make()
            if work.torch_error:
                row["error"] = f"torch: {work.torch_error}"
            try:
                timings = interleaved(tasks, repeats, warmup=2, counter=counter, budget=budget)
            except Exception as error:
                if "torch" not in tasks:
                    raise
                alone = {"tljax": tasks["tljax"]}  # whichever of the two failed: if it was ours, it fails again
                timings = interleaved(alone, repeats, warmup=2, counter=counter, budget=budget)
                row["error"] = f"beside torch: {one_line(error)}"
        except Exception as error:  # a device may refuse anything; the other rows are still wanted
            yield row | memory() | {"row s": round(time.perf_counter() - began, 1), "error": one_line(error)}
            continue
        ours, theirs = timings["tljax"], timings.get("torch")
        row |= memory() | {"row s": round(time.perf_counter() - began, 1)}
        row |= {"ms": round(1e3 * ours.median, 3), "turns": ours.turns, "compilations": ours.compilations}
        if theirs is not None:
            row |= {"torch ms": round(1e3 * theirs.median, 3), "of torch": round(ours.median / theirs.median, 2)}
        yield row


def one_line(error: Exception) -> str:
    """An error's class and the beginning of its message, for a cell of a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def memory() -> Row:
    """Megabytes of the device in use now, and at most so far in this process; empty where it does not count them."""
    stats = jax.devices()[0].memory_stats() or {}
    found = {"in use MB": stats.get("bytes_in_use"), "peak MB": stats.get("peak_bytes_in_use")}
    return {name: "" if value is None else round(value / 1e6, 1) for name, value in found.items()}


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", action=argparse.BooleanOptionalAction, default=None, help="default on a CPU")
    parser.add_argument("--seconds", type=float, default=300, help="begin nothing after this time")
    parser.add_argument("--budget", type=float, default=15, help="seconds of a row, compilation included")
    parser.add_argument("--repeats", type=int, default=10, help="timed turns, if the budget allows them")
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, default=True, help="torch beside it")
    parser.add_argument("--dtypes", nargs="+", choices=BARS, default=list(BARS), help="dtypes of the numerics")
    parser.add_argument("--rows", nargs="+", help="only rows with one of these in their name")
    parser.add_argument("--json", type=Path, help="write the figures to this file, after every row")
    return parser.parse_args()


def main() -> int:
    """Prints the tables; the exit status says whether the numerics were within their bars and every row ran."""
    arguments, started = arguments_of(), time.perf_counter()
    small = jax.devices()[0].platform == "cpu" if arguments.small is None else arguments.small
    facts: Row = machine("jax", "jaxlib", "flax") | {"small": small}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    exact: list[Row] = []
    rows: list[Row] = []
    ends = started + arguments.seconds

    def keep() -> None:
        seconds = round(time.perf_counter() - started, 1)
        write_json(arguments.json, {"machine": facts, "numerics": exact, "times": rows, "seconds": seconds})

    shape, size = (SMALL, (2, 16)) if small else (GPT2_SMALL | {"n_layers": 4}, (2, 256))
    for row in numerics(shape, *size, arguments.dtypes):
        exact.append(row)
        keep()
    print_table(exact)
    with tempfile.TemporaryDirectory() as directory:
        work = Work(small, Path(directory), arguments.torch)
        for row in timed(work, arguments.repeats, arguments.budget, ends, arguments.rows):
            rows.append(row)
            keep()
            print(f"{row['work']}: {row['error'] or row['ms']}", flush=True)
    print_table(rows)
    print(f"{time.perf_counter() - started:.1f} s in all")
    return int(any(row["met"] == "NO" for row in exact) or any(row["error"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
