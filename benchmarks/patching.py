"""Activation-patching sweeps at gpt2-small's shape: tljax against TransformerLens and against torch batched by hand.

Needs the ``[bench]`` extra (``transformer-lens<4`` and torch) for ``headline``; TransformerLens 4 joins where ``--tl4``
names the Python of another environment that has it::

    python benchmarks/patching.py --tl4 ~/tl4/bin/python --json results.json
    python benchmarks/patching.py --parts first ragged memory growth

All contestants have the same random weights, run in turns, and are waited for; nothing is extrapolated except the
column of ``growth`` that says so.
"""

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _patching_alone import ANSWER, WRONG, alone, build, random_tokens
from _timing import GPT2_SMALL, CompilationCounter, machine, print_table, use_threads, write_json

import tljax
from tljax.patching import LogitDiff, sweep

LENGTH, SHARED = 15, 10
PAIRS = ("no shared prefix", f"{SHARED} shared tokens")
OURS, PYTHON, HAND, PLAIN, TL3, TL4 = (
    "tljax", "tljax, Python metric", "hand-batched torch, tuned", "hand-batched torch, one batch",
    "TransformerLens 3.9", "TransformerLens 4",
)  # fmt: skip

# The least ratio of each peer's time to tljax's, with no shared prefix and with ten shared tokens
BARS = {TL3: (30, 100), TL4: (12, 40), PLAIN: (4, None)}
AGREEMENT, FIRST_SECONDS, PEAK_GB, SPENT_OVER_FLOOR = 1e-4, 6.0, 4.0, 1.6
GROWTH_LAYERS, GROWTH_LENGTHS, NAIVE_SITES = (4, 12), (8, 15, 32, 64), 8

Task = Callable[[], Any]
Row = dict[str, Any]


def prompts() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The clean prompt ``[1, 15]`` and the corrupted ones, by name."""
    clean, corrupted = random_tokens(0, LENGTH), random_tokens(1, LENGTH)
    shared = np.concatenate([clean[:, :SHARED], corrupted[:, SHARED:]], axis=1)
    return clean, dict(zip(PAIRS, (corrupted, shared), strict=True))


def python_metric(logits: Any) -> Any:
    """The logit difference as a user writes it."""
    return logits[0, -1, ANSWER] - logits[0, -1, WRONG]


def run_sweep(model: Any, corrupted: np.ndarray, cache: Any, metric: Any) -> Any:
    """One residual sweep, waited for."""
    result = sweep(model, corrupted, cache, metric, "resid_pre", progress=False)
    jax.block_until_ready(result.values)
    return result


class Race:
    """The contestants of the headline and their seconds, by prompt pair."""

    def __init__(self, tl4: Path | None, threads: int, device: str) -> None:
        import torch
        import transformer_lens.patching as patching
        from _patching_peers import HandBatched, synchronize, transformerlens_sweep
        from transformerlens import build_models

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.clean, self.corrupted = prompts()
        self.model, peer = build_models()
        state = peer.state_dict()
        self.request = {"shape": GPT2_SMALL, "state": state, "clean": self.clean, "answer": ANSWER, "wrong": WRONG}
        self.request |= {"corrupted": list(self.corrupted.values()), "threads": threads, "device": device}
        self.tl4, self.versions = tl4, {}
        _, cache = self.model.run_with_cache(self.clean)
        peer = peer.to(device)
        clean = torch.from_numpy(self.clean).long().to(device)
        _, peer_cache = peer.run_with_cache(clean)
        hand = HandBatched(state, GPT2_SMALL["n_layers"], GPT2_SMALL["n_heads"], device)
        residuals = hand.residuals(clean)
        self.chunk = hand.fastest_chunk(clean, residuals)

        def waited(result: torch.Tensor) -> np.ndarray:
            synchronize(device)
            return result.cpu().numpy()

        def tasks_of(corrupted: np.ndarray) -> tuple[dict[str, Task], Task]:
            tokens = torch.from_numpy(corrupted).long().to(device)
            fast = {
                OURS: lambda: run_sweep(self.model, corrupted, cache, LogitDiff(ANSWER, WRONG)),
                PYTHON: lambda: run_sweep(self.model, corrupted, cache, python_metric),
                HAND: lambda: waited(hand.sweep(tokens, residuals, ANSWER, WRONG, self.chunk)),
                PLAIN: lambda: waited(hand.sweep(tokens, residuals, ANSWER, WRONG)),
            }
            return fast, lambda: waited(transformerlens_sweep(patching, peer, tokens, peer_cache, ANSWER, WRONG))

        self.tasks = {pair: tasks_of(corrupted) for pair, corrupted in self.corrupted.items()}
        self.seconds: dict[tuple[str, str], list[float]] = {}
        self.results: dict[tuple[str, str], Any] = {}

    def time(self, pair: str, name: str, task: Task) -> None:
        """Runs one contestant once."""
        time.sleep(0.25)  # the threads of whoever ran before spin for a while
        start = time.perf_counter()
        result = task()
        self.record(pair, name, time.perf_counter() - start, result)

    def record(self, pair: str, name: str, seconds: float, result: Any) -> None:
        """Keeps a time and the values that took it."""
        self.seconds.setdefault((pair, name), []).append(seconds)
        self.results[pair, name] = result

    def turn(self, fast_repeats: int) -> None:
        """The quick contestants several times before and after one sweep of each slow one."""
        for pair, (fast, transformerlens) in self.tasks.items():
            for before in (True, False):
                for _ in range(fast_repeats):
                    for name, task in fast.items():
                        self.time(pair, name, task)
                if before:
                    self.time(pair, TL3, transformerlens)
        if self.tl4 is not None:
            from _patching_peers import ask_transformerlens4

            answer = ask_transformerlens4(self.tl4, self.request)
            self.versions["transformer-lens (second environment)"] = answer["version"]
            for pair, seconds, values in zip(PAIRS, answer["seconds"], answer["values"], strict=True):
                self.record(pair, TL4, seconds, np.asarray(values, np.float32))

    def rows(self, pair: str) -> list[Row]:
        """The table of one pair of prompts."""
        ours, rows = statistics.median(self.seconds[pair, OURS]), []
        values = np.asarray(self.results[pair, OURS].values)
        for (of, name), seconds in self.seconds.items():
            if of != pair:
                continue
            median, result = statistics.median(seconds), self.results[pair, name]
            bar = BARS[name][PAIRS.index(pair)] if name in BARS else None
            difference = float(np.abs(values - np.asarray(getattr(result, "values", result))).max())
            rows.append(
                {
                    "prompts": pair,
                    "sweep": name,
                    "seconds": round(median, 3),
                    "fastest": round(min(seconds), 3),
                    "runs": len(seconds),
                    "times tljax": round(median / ours, 2),
                    "bar": "" if bar is None else f">= {bar}",
                    "met": verdict(bar is None or median / ours >= bar) if bar else "",
                    "max difference": f"{difference:.0e}",
                    "agrees": verdict(difference <= AGREEMENT),
                }
            )
        return rows


def verdict(met: bool) -> str:
    """``yes`` or a ``NO`` that stands out."""
    return "yes" if met else "NO"


def headline(arguments: argparse.Namespace) -> list[Row]:
    """Residual sweeps, 12 layers by 15 positions, of every contestant."""
    race = Race(arguments.tl4, arguments.threads, arguments.torch_device)
    counter = CompilationCounter()
    for fast, _ in race.tasks.values():
        for task in fast.values():
            task()
    before = counter.count
    for _ in range(arguments.repeats):
        race.turn(arguments.fast_repeats)
    compiled = counter.count - before
    rows = [row for pair in PAIRS for row in race.rows(pair)]
    work = [work_row(pair, race.results[pair, OURS].report, race.seconds[pair, OURS]) for pair in PAIRS]
    print_table(rows)
    print(f"\n{HAND}: {race.chunk} sites at once, the last position's logits alone")
    print(f"{compiled} compilations in timed turns; load {load()}")
    for package, version in race.versions.items():
        print(f"{package} {version}")
    print_table(work)
    print()
    return [*rows, *work, {"compilations": compiled, "met": verdict(not compiled)}]


def work_row(name: str, report: Any, seconds: Sequence[float]) -> Row:
    """What a sweep computed, against the least that is exact, against naively, and against the machine."""
    flops, speed = report.flops, report.flops / statistics.median(seconds) / 1e9
    ratio, rate = flops / report.floor_flops, matmul_rate()
    return {
        "sweep": name,
        "GFLOP": round(flops / 1e9, 1),
        "spent / floor": round(ratio, 3),
        "bar": f"<= {SPENT_OVER_FLOOR}",
        "met": verdict(ratio <= SPENT_OVER_FLOOR),
        "naive / spent": round(report.naive_flops / flops, 1),
        "GFLOP/s": round(speed, 1),
        "one matrix product's": round(rate, 1),
        "of it": f"{speed / rate:.0%}",
        "reductions": ", ".join(report.reductions),
    }


def matmul_rate(tokens: int = 128, repeats: int = 25) -> float:
    """GFLOP/s of JAX multiplying ``[tokens, d_model]`` by ``[d_model, d_mlp]``, the largest product of a block."""
    width, hidden = GPT2_SMALL["d_model"], GPT2_SMALL["d_mlp"]
    x, weight = jnp.ones((tokens, width)), jnp.ones((width, hidden))
    multiply = jax.jit(lambda x, weight: jnp.matmul(x, weight, precision="highest"))
    multiply(x, weight).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(x, weight).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * tokens * width * hidden / statistics.median(seconds) / 1e9


def first(arguments: argparse.Namespace) -> list[Row]:
    """What a sweep costs the first time, and whether the programs grow with layers."""
    counts, rows = {layers: alone("first", n_layers=layers) for layers in (GPT2_SMALL["n_layers"], 24)}, []
    shallow, deep = counts.values()
    for name, measured in shallow.items():
        compiled, seconds = measured["compilations"], measured["seconds"]
        met = deep[name]["compilations"] <= compiled + 3 and not (name.startswith("second") and compiled)
        met = met and not (name == "first sweep" and seconds > FIRST_SECONDS)
        rows.append(
            {
                "in a fresh process": name,
                "seconds": round(seconds, 2),
                "bar": f"<= {FIRST_SECONDS:g}" if name == "first sweep" else "",
                "programs, 12 layers": compiled,
                "programs, 24 layers": deep[name]["compilations"],
                "met": verdict(met),
            }
        )
    print_table(rows)
    print()
    return rows


def ragged(arguments: argparse.Namespace) -> list[Row]:
    """20 prompts of 9 to 28 tokens, one sweep each."""
    rows = [
        {
            "20 prompts of 9 to 28 tokens": name,
            "seconds": round(measured["seconds"], 2),
            "programs": measured["compilations"],
            "sweeps that compiled": measured["sweeps that compiled"],
            "met": verdict(name == "first pass" or not measured["compilations"]),
        }
        for name, measured in alone("ragged").items()
    ]
    print_table(rows)
    print()
    return rows


def memory(arguments: argparse.Namespace) -> list[Row]:
    """Peak memory of a sweep of 2160 sites, as it comes and on a small budget."""
    rows, checks = [], []
    for max_batch in ("auto", 4):
        measured = alone("memory", max_batch=max_batch)
        checks.append(measured["checksum"])
        rows.append(
            {
                "z, 12 layers x 15 positions x 12 heads": f"max_batch={max_batch}",
                "seconds": round(measured["seconds"], 1),
                "before GB": round(measured["before_gb"], 2),
                "peak GB": round(measured["peak_gb"], 2),
                "device peak GB": round(measured["device_peak_gb"], 2),
                "bar": f"< {PEAK_GB:g}",
                "all logits would be GB": round(measured["all_logits_gb"], 1),
                "met": verdict(max(measured["peak_gb"], measured["device_peak_gb"]) < PEAK_GB),
            }
        )
    rows[1]["met"] = verdict(rows[1]["met"] == "yes" and abs(checks[0] - checks[1]) < 1e-2)
    print_table(rows)
    print()
    return rows


def growth(arguments: argparse.Namespace) -> list[Row]:
    """How the sweep and a naive loop grow with layers, positions and heads."""
    rows = []
    for n_layers in GROWTH_LAYERS:
        model = build(n_layers)
        for length in GROWTH_LENGTHS if n_layers == GPT2_SMALL["n_layers"] else (LENGTH,):
            rows.append(growth_row(model, length, "resid_pre", ("pos",)))
        rows.append(growth_row(model, LENGTH, "z", ("head",)))
        rows.append(growth_row(model, LENGTH, "z", ("pos", "head")))
        for row in rows:
            if "shown" not in row:
                row["shown"] = True
                print(
                    f"{row['layers']} layers, {row['positions']} positions, {row['site']}", file=sys.stderr, flush=True
                )
    for row in rows:
        row.pop("shown")
    print_table(rows)
    print()
    return rows


def growth_row(model: Any, length: int, name: str, axes: tuple[str, ...]) -> Row:
    """One sweep, timed whole, beside a naive loop, timed over a few sites."""
    clean, corrupted = random_tokens(0, length), random_tokens(1, length)
    _, cache = model.run_with_cache(clean)
    metric, seconds, naive, difference = LogitDiff(ANSWER, WRONG), [], 0.0, 0.0
    for turn in range(4):
        start = time.perf_counter()
        result = sweep(model, corrupted, cache, metric, name, axes=axes, progress=False)
        jax.block_until_ready(result.values)
        seconds.append(time.perf_counter() - start)
        if turn == 1:
            naive, difference = naive_loop(model, corrupted, cache, name, axes, np.asarray(result.values))
    ours, report = statistics.median(seconds[1:]), result.report
    estimate = naive * report.sites
    return {
        "layers": model.cfg.n_layers,
        "positions": length,
        "site": f"{name} by {' and '.join(axes)}",
        "sites": report.sites,
        "tljax s": round(ours, 2),
        f"naive loop s (estimated from {NAIVE_SITES} sites)": round(estimate, 1),
        "naive / tljax": round(estimate / ours, 1),
        "naive / spent FLOPs": round(report.naive_flops / report.flops, 1),
        "spent / floor": round(report.flops / report.floor_flops, 2),
        "GFLOP/s": round(report.flops / ours / 1e9),
        "max difference": f"{difference:.0e}",
        "agrees": verdict(difference <= AGREEMENT),
    }


def naive_loop(
    model: Any, corrupted: np.ndarray, cache: Any, name: str, axes: tuple[str, ...], values: np.ndarray
) -> tuple[float, float]:
    """Median seconds a site of tljax's own loop, one ``run_with_hooks`` and all logits each, and its difference."""
    sites, seconds, differences = np.random.default_rng(0).permutation(values.size), [], []
    for number in sites[: NAIVE_SITES + 2]:
        layer, *at = (int(index) for index in np.unravel_index(number, values.shape))
        where = dict(zip(axes, at, strict=True))
        start = time.perf_counter()
        index = (slice(None), where.get("pos", slice(None)), *([where["head"]] if "head" in where else []))
        hook = tljax.Replace(cache[name, layer][index], **where)
        logits = model.run_with_hooks(corrupted, fwd_hooks=[(tljax.get_act_name(name, layer), hook)])
        measured = float(python_metric(logits))
        seconds.append(time.perf_counter() - start)
        differences.append(abs(measured - float(values[layer, *at])))
    return statistics.median(seconds[2:]), max(differences)


def load() -> str:
    """The machine's load over the last minute."""
    return f"{os.getloadavg()[0]:.1f}"


PARTS = {"headline": headline, "first": first, "ragged": ragged, "memory": memory, "growth": growth}


def main() -> int:
    """Prints the tables; the exit status says whether every bar was met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument(
        "--tl4", type=Path, metavar="PYTHON", help="interpreter of an environment with TransformerLens 4"
    )
    parser.add_argument("--repeats", type=int, default=1, help="sweeps of each slow contestant")
    parser.add_argument("--fast-repeats", type=int, default=3, help="quick ones' sweeps before each, and after it")
    parser.add_argument("--torch-device", default="cpu", help='where torch runs: "cpu" or "cuda"')
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of all contestants")
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    warnings.simplefilter("ignore")
    info = {**machine("jax"), "load before": load()}
    results = {}
    for part in arguments.parts:
        print(f"{part} (load {load()})", flush=True)
        results[part] = PARTS[part](arguments)
    info["load after"] = load()
    print(", ".join(f"{key} {value}" for key, value in info.items()))
    write_json(arguments.json, {"machine": info, "shape": GPT2_SMALL, **results})
    return int(any("NO" in (row.get("met"), row.get("agrees")) for rows in results.values() for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
