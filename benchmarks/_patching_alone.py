"""Measurements of ``patching.py`` that need a process of their own: the first sweep, peak memory, ragged prompts.

``python _patching_alone.py PART '{"option": ...}'`` answers with one line of JSON. It needs tljax alone.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _timing import GPT2_SMALL, CompilationCounter

import tljax
from tljax.patching import LogitDiff, sweep

ANSWER, WRONG = 1000, 2000


def random_tokens(seed: int, length: int) -> np.ndarray:
    """One prompt of random token ids ``[1, pos]``."""
    return np.random.default_rng(seed).integers(0, GPT2_SMALL["d_vocab"], (1, length)).astype(np.int32)


def build(n_layers: int = GPT2_SMALL["n_layers"]) -> tljax.HookedTransformer:
    """A random model at gpt2-small's width."""
    model = tljax.HookedTransformer(tljax.HookedTransformerConfig(**GPT2_SMALL | {"n_layers": n_layers}, seed=0))
    jax.block_until_ready(model.params)
    return model


def timed(counter: CompilationCounter, task: Any) -> tuple[float, int, Any]:
    """Seconds and compilations of a task, and its result."""
    before, start = counter.count, time.perf_counter()
    result = task()
    jax.block_until_ready(result.values)
    return time.perf_counter() - start, counter.count - before, result


def first(n_layers: int = 12) -> dict[str, Any]:
    """The first sweep of a process and the second; then the first of another prompt length, and of a Python metric."""
    counter, model = CompilationCounter(), build(n_layers)
    rows = {}

    def one(name: str, length: int, metric: Any, seed: int) -> None:
        clean, corrupted = random_tokens(seed, length), random_tokens(seed + 1, length)
        _, cache = model.run_with_cache(clean)
        jax.block_until_ready(dict(cache))
        seconds, compiled, _ = timed(
            counter, lambda: sweep(model, corrupted, cache, metric, "resid_pre", progress=False)
        )
        rows[name] = {"seconds": seconds, "compilations": compiled}

    metric = LogitDiff(ANSWER, WRONG)
    one("first sweep", 15, metric, 0)
    one("second sweep, other prompts", 15, metric, 2)
    one("a Python metric", 15, lambda logits: logits[0, -1, ANSWER] - logits[0, -1, WRONG], 4)
    one("another new Python metric", 15, lambda logits: logits[0, -1, WRONG] - logits[0, -1, ANSWER], 4)
    one("first of 20 tokens", 20, metric, 6)
    one("second of 20 tokens", 20, metric, 6)
    return rows


def memory(max_batch: int | str = "auto") -> dict[str, Any]:
    """Peak memory of a head-by-position sweep of ``z``."""
    model, counter = build(), CompilationCounter()
    clean, corrupted = random_tokens(0, 15), random_tokens(1, 15)
    _, cache = model.run_with_cache(clean)
    jax.block_until_ready(dict(cache))
    before = resident("VmRSS")
    metric = LogitDiff(ANSWER, WRONG)
    seconds, _, result = timed(
        counter,
        lambda: sweep(model, corrupted, cache, metric, "z", axes=("pos", "head"), max_batch=max_batch, progress=False),
    )
    everything = result.values.size * corrupted.size * GPT2_SMALL["d_vocab"] * 4
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "seconds": seconds,
        "sites": int(result.values.size),
        "before_gb": before / 1e9,
        "peak_gb": resident("VmHWM") / 1e9,
        "device_peak_gb": stats.get("peak_bytes_in_use", 0) / 1e9,
        "all_logits_gb": everything / 1e9,
        "checksum": float(np.asarray(result.values).sum()),
    }


def ragged(prompts: int = 20, shortest: int = 9, longest: int = 28) -> dict[str, Any]:
    """A data set of prompts of many lengths, one sweep each, from token ids to results; then all of them again."""
    counter, model = CompilationCounter(), build()
    lengths = np.linspace(shortest, longest, prompts).round().astype(int)
    metric, passes = LogitDiff(ANSWER, WRONG), []
    for number in range(2):
        compiled, seconds = [], []
        for seed, length in enumerate(np.random.default_rng(number).permutation(lengths)):
            clean, corrupted = random_tokens(seed, length), random_tokens(seed + 100, length)
            spent, programs, _ = timed(
                counter, lambda a=corrupted, b=clean: sweep(model, a, b, metric, "resid_pre", progress=False)
            )
            compiled.append(programs)
            seconds.append(spent)
        passes.append(
            {
                "seconds": sum(seconds),
                "compilations": sum(compiled),
                "sweeps that compiled": sum(map(bool, compiled)),
                "by sweep": compiled,
            }
        )
    return {"first pass": passes[0], "second pass": passes[1]}


def resident(field: str) -> int:
    """Returns ``VmRSS`` (now) or ``VmHWM`` (peak) of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}: this benchmark needs Linux.")


def alone(part: str, **options: Any) -> dict[str, Any]:
    """Runs a part in a fresh process, with nothing compiled beforehand and no memory taken in advance."""
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, __file__, part, json.dumps(options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    function = {"first": first, "memory": memory, "ragged": ragged}[sys.argv[1]]
    print(json.dumps(function(**json.loads(sys.argv[2]))))
