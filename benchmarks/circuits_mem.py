"""Edges and circuits at gpt2-small's shape: tljax, the published procedure on TransformerLens 3.9, TransformerLens 4.

Needs the ``[bench]`` extra (``transformer-lens<4`` and torch) for ``peers``; TransformerLens 4 joins where ``--tl4``
names the Python of another environment that has it::

    python benchmarks/circuits.py --tl4 ~/tl4/bin/python --json results.json
    python benchmarks/circuits.py --parts ours exact memory            # needs neither torch nor TransformerLens

Eight pairs of random prompts of 15 tokens, random weights, all contestants in turns. Exact edges are measured for whole
layers of readers (``--layers``) and the rest is estimated from their FLOPs; ``--layers all`` measures every edge.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _timing import GPT2_SMALL, CompilationCounter, machine, print_table, use_threads, write_json

import tljax
from tljax.circuits import ResidualGraph, edge_scores, faithfulness_curve
from tljax.patching import LogitDiff, node_attribution

PAIRS, LENGTH, ANSWER, WRONG, STEPS = 8, 15, 1000, 2000, 5
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
BARS = {
    "EAP": 10,
    "EAP-IG": 10,
    "EAP-IG's memory": 5,
    "node attribution": 2,
    "edges per position": 3,
    "exact edges": 60,
}
CURVE_BAR = 2.5
MEMORY_LENGTHS = (15, 32)

Task = Callable[[], Any]


def pairs(n: int = PAIRS, length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    """Clean and corrupted token ids ``[n, length]``."""
    rng = np.random.default_rng(0)
    clean, corrupted = rng.integers(0, GPT2_SMALL["d_vocab"], (2, n, length)).astype(np.int32)
    return clean, corrupted


def build() -> tljax.HookedTransformer:
    """A random model of gpt2-small's shape."""
    return tljax.HookedTransformer(tljax.HookedTransformerConfig(**GPT2_SMALL, seed=0))


def tasks(model: Any, length: int = LENGTH) -> dict[str, Task]:
    """What is timed, by name; each returns arrays to wait for."""
    (clean, corrupted), metric = pairs(length=length), LogitDiff(ANSWER, WRONG)

    def scores(**options: Any) -> Task:
        return lambda: edge_scores(model, clean, corrupted, metric, progress=False, **options).values

    def nodes() -> Any:
        return [one.values for one in node_attribution(model, clean, corrupted, metric).values()]

    one = edge_scores(model, clean, corrupted, metric, progress=False)
    return {
        "forward": lambda: model(clean),
        "EAP": scores(),
        "EAP-IG": scores(method="eap-ig", steps=STEPS),
        "node attribution": nodes,
        "edges per position": lambda: (
            edge_scores(model, clean[:1], corrupted[:1], metric, axes=("pos",), progress=False).values
        ),
        "curve of ten circuits": lambda: (
            faithfulness_curve(
                model, one, clean, corrupted, metric, fractions=FRACTIONS, prune=False, progress=False
            ).values
        ),
    }


def timed(task: Task, repeats: int, counter: CompilationCounter) -> dict[str, Any]:
    """First and median seconds of a task, and what compiled in each."""
    before, start = counter.count, time.perf_counter()
    jax.block_until_ready(task())
    row = {"first": time.perf_counter() - start, "first compiles": counter.count - before}
    before, seconds = counter.count, []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(task())
        seconds.append(time.perf_counter() - start)
    return row | {"seconds": statistics.median(seconds), "later compiles": counter.count - before}


def ours(repeats: int) -> dict[str, Any]:
    """tljax alone."""
    counter, model = CompilationCounter(), build()
    rows = {name: timed(task, repeats, counter) for name, task in tasks(model).items()}
    print_table([{"task": name} | {key: f"{value:.3g}" for key, value in row.items()} for name, row in rows.items()])
    ratio = rows["curve of ten circuits"]["seconds"] / (len(FRACTIONS) * rows["forward"]["seconds"])
    print(f"curve of ten circuits: {ratio:.2f} times ten forward passes (bar {CURVE_BAR})")
    return rows | {"curve over ten forward passes": ratio}


def exact(layers: str) -> dict[str, Any]:
    """Exact effects of all edges into the readers of some layers, and from them the time for every edge."""
    counter, model = CompilationCounter(), build()
    graph, (clean, corrupted) = ResidualGraph.of(model), pairs()
    metric = LogitDiff(ANSWER, WRONG)
    chosen = range(graph.n_layers) if layers == "all" else [int(layer) for layer in layers.split(",")]
    rows = {}
    for layer in [*chosen, graph.n_layers]:
        mask = np.zeros(graph.shape, bool)
        mask[:, graph.readers_of(layer)] = graph.edges[:, graph.readers_of(layer)]
        before, start = counter.count, time.perf_counter()
        found = edge_scores(model, clean, corrupted, metric, "exact", edges=mask, progress=False)
        jax.block_until_ready(found.values)
        rows[layer] = {
            "edges": int(mask.sum()), "seconds": time.perf_counter() - start, "compilations": counter.count - before,
        }  # fmt: skip
        print(layer, rows[layer], flush=True)
    work = {layer: _layer_runs(graph, layer) for layer in range(graph.n_layers)}
    spent = sum(rows[layer]["seconds"] for layer in chosen)
    total = spent * sum(work.values()) / sum(work[layer] for layer in chosen)
    print(f"all {graph.n_edges} edges: {total:.0f} s{'' if layers == 'all' else ' (estimated from these layers)'}")
    return {"layers": {str(layer): row for layer, row in rows.items()}, "all edges, seconds": total}


def _layer_runs(graph: ResidualGraph, layer: int) -> float:
    """How many blocks the edges into a layer's readers run; the last one computes one position of fifteen."""
    edges = int(graph.edges[:, graph.readers_of(layer)].sum())
    return edges * (graph.n_layers - 1 - layer + 0.25)


def memory(lengths: Sequence[int] = MEMORY_LENGTHS) -> dict[str, Any]:
    """Peak memory over the model of each method, each in a process of its own."""
    rows = []
    for length in lengths:
        row: dict[str, Any] = {"tokens": length}
        for name in ("EAP", "EAP-IG", "curve of ten circuits"):
            done = subprocess.run(
                [sys.executable, __file__, "--alone", name, str(length)], capture_output=True, text=True, check=True
            )
            row[name] = json.loads(done.stdout.strip().splitlines()[-1])["gigabytes"]
        rows.append(row)
        print({key: round(value, 3) for key, value in row.items()}, flush=True)
    return {"gigabytes over the model": rows}


def alone(name: str, length: int) -> None:
    """Runs one task, and prints by how much it raised the peak of the process."""
    import resource

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    model = build()
    clean, _ = pairs(length=length)
    jax.block_until_ready(model(clean[:1, :4]))
    held = _resident()
    metric, (clean, corrupted) = LogitDiff(ANSWER, WRONG), pairs(length=length)
    if name == "curve of ten circuits":
        graph = ResidualGraph.of(model)
        values = np.random.default_rng(0).normal(size=graph.shape) * graph.edges
        faithfulness_curve(model, values, clean, corrupted, metric, fractions=FRACTIONS, prune=False, progress=False)
    else:
        options: dict[str, Any] = {"method": "eap-ig", "steps": STEPS} if name == "EAP-IG" else {}
        jax.block_until_ready(edge_scores(model, clean, corrupted, metric, progress=False, **options).values)
    print(json.dumps({"gigabytes": max(peak() - held, 0.0)}))


def _resident() -> float:
    """Gigabytes that the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def peers(tl4: Path | None, threads: int, repeats: int, exact_seconds: float | None) -> dict[str, Any]:
    """tljax in turns with the published procedure on TransformerLens 3.9; TransformerLens 4 once."""
    import torch
    from _circuits_peers import EdgesByHooks, ask_transformerlens4
    from transformerlens import build_models

    torch.set_num_threads(threads)
    model, peer = build_models()
    clean, corrupted = pairs()
    theirs = EdgesByHooks(peer, *(torch.from_numpy(tokens).long() for tokens in (clean, corrupted)), ANSWER, WRONG)
    graph = ResidualGraph.of(model)
    one_edge = graph.edges.copy()
    one_edge[graph.edge("a3.h2->m7")] = False
    own = tasks(model)
    contestants: dict[str, tuple[Task, Task]] = {
        "forward": (own["forward"], lambda: peer(theirs.clean)),
        "EAP": (own["EAP"], theirs.attribute),
        "EAP-IG": (own["EAP-IG"], lambda: theirs.attribute(STEPS)),
    }
    for name in ("EAP", "EAP-IG"):
        ours_now, theirs_now = np.asarray(contestants[name][0]()), contestants[name][1]().numpy()
        np.testing.assert_allclose(ours_now, theirs_now, atol=2e-5 * np.abs(theirs_now).max())
    rows: dict[str, Any] = {}
    for name, (mine, other) in contestants.items():
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats):
            for task, kept in zip((mine, other), seconds, strict=True):
                start = time.perf_counter()
                jax.block_until_ready(task())
                kept.append(time.perf_counter() - start)
        rows[name] = {"tljax": statistics.median(seconds[0]), "TransformerLens 3.9": statistics.median(seconds[1])}
    start = time.perf_counter()
    for _ in range(3):
        theirs.evaluate(torch.from_numpy(one_edge))
    rows["exact edges"] = {
        "tljax": exact_seconds,
        "TransformerLens 3.9": (time.perf_counter() - start) / 3 * graph.n_edges,
    }
    if tl4 is not None:
        request = {
            "shape": GPT2_SMALL, "state": peer.state_dict(), "clean": clean, "corrupted": corrupted, "answer": ANSWER,
            "wrong": WRONG, "threads": threads,
        }  # fmt: skip
        found = ask_transformerlens4(tl4, request)
        for name, key in (("node attribution", "node"), ("edges per position", "edge")):
            seconds_of = []
            for _ in range(repeats + 1):
                start = time.perf_counter()
                jax.block_until_ready(own[name]())
                seconds_of.append(time.perf_counter() - start)
            mine_now = statistics.median(seconds_of[1:])
            rows[name] = {"tljax": mine_now, f"TransformerLens {found['version']}": found["seconds"][key]}
    missed = []
    for name, row in rows.items():
        (_, mine_seconds), *others = row.items()
        if mine_seconds is None:
            continue
        row["ratio"] = others[0][1] / mine_seconds
        if name in BARS and row["ratio"] < BARS[name]:
            missed.append(name)
        print(name, {key: float(f"{value:.4g}") for key, value in row.items()}, "bar", BARS.get(name), flush=True)
    return rows | {"missed": missed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("ours", "exact", "memory", "peers"))
    parser.add_argument("--layers", default="0,5,11", help="layers whose readers' edges are measured exactly, or all")
    parser.add_argument("--tl4", type=Path, help="Python of an environment with TransformerLens 4")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        alone(options.alone[0], int(options.alone[1]))
        return
    use_threads(options.threads)
    parts, results = options.parts or ["ours", "exact", "memory", "peers"], {"machine": machine("jax", "flax")}
    if "ours" in parts:
        results["ours"] = ours(options.repeats)
    if "exact" in parts:
        results["exact"] = exact(options.layers)
    if "memory" in parts:
        results["memory"] = memory()
    if "peers" in parts:
        seconds = results.get("exact", {}).get("all edges, seconds")
        results["peers"] = peers(options.tl4, options.threads, options.repeats, seconds)
    write_json(options.json, results)
    late = "ours" in results and results["ours"]["curve over ten forward passes"] > CURVE_BAR
    sys.exit(bool(results.get("peers", {}).get("missed")) or late)


if __name__ == "__main__":
    main()
