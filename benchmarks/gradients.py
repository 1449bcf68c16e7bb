"""Gradients at hook points, at gpt2-small's shape: their time against a forward pass, their memory against length.

::

    python benchmarks/gradients.py --json gradients.json
    python benchmarks/gradients.py --parts memory --lengths 15 128 512

``held`` is what lies in memory between the forward and the backward pass, beside the model: counted from the live
arrays at the moment when the metric is called. ``compiled`` is what the compiler plans for temporary arrays when the
same call is one ``jax.jit``. There XLA's default scheduler for CPUs computes all blocks again at once, which undoes
most of ``remat``; run this with ``XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false`` to see the other
one.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _timing import GPT2_SMALL, CompilationCounter, interleaved, machine, print_table, use_threads, write_json

import tljax
from tljax.patching import LogitDiff, LogProb, Loss

BATCH, LENGTH = 8, 15
GRADIENTS_BAR, REMAT_BAR = 3.0, 4.0
"""Most times that a forward pass may take with gradients at every layer, and with blocks computed again."""
HELD_BAR = 2.0
"""Most times that what ``remat`` holds may be of the residual streams between blocks."""
Row = dict[str, Any]


def build() -> Any:
    return tljax.HookedTransformer(tljax.HookedTransformerConfig(**GPT2_SMALL, seed=0))


def prompts(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, GPT2_SMALL["d_vocab"], (BATCH, length)).astype(np.int32)


def of_each_layer(name: str) -> bool:
    return name.endswith("hook_resid_post")


def tasks(model: Any) -> dict[str, tuple[Callable[[int], Any], float | None]]:
    """What is timed, with its bar in forward passes."""
    tokens, loss = prompts(LENGTH), Loss(prompts(LENGTH))
    difference = LogitDiff(np.arange(BATCH), np.arange(BATCH) + 100)
    three = {"loss": loss, "difference": difference, "log-probability": LogProb(7)}
    direction = {("resid_post", 0): np.random.default_rng(0).normal(size=GPT2_SMALL["d_model"])}

    def grads(metric: Any, points: Any = of_each_layer, **options: Any) -> Callable[[int], Any]:
        def run(_: int) -> None:
            value, cache, found = model.run_with_grads(tokens, metric, points, **options)
            found = found if isinstance(metric, dict) else {"": found}
            jax.block_until_ready((value, dict(cache), {name: dict(one) for name, one in found.items()}))

        return run

    def jvp(_: int) -> None:
        found = model.run_with_jvp(tokens, direction, difference, of_each_layer)
        jax.block_until_ready((found.tangent, dict(found.tangents)))

    def hvp(_: int) -> None:
        found = model.run_with_hvp(tokens, difference, direction, of_each_layer)
        jax.block_until_ready(dict(found.products))

    return {
        "forward": (lambda _: jax.block_until_ready(model(tokens)), None),
        "loss, every layer": (grads(loss), GRADIENTS_BAR),
        "loss, every point": (grads(loss, None), None),
        "loss, every layer, remat": (grads(loss, remat=True), REMAT_BAR),
        "LogitDiff, every layer": (grads(difference), GRADIENTS_BAR),
        "LogitDiff, every layer, remat": (grads(difference, remat=True), REMAT_BAR),
        "a function, every layer": (grads(lambda logits: logits[:, -1, 3] - logits[:, -1, 4]), GRADIENTS_BAR),
        "three metrics, every layer": (grads(three), None),
        "one direction (jvp)": (jvp, None),
        "Hessian product (hvp)": (hvp, None),
    }


def time(arguments: argparse.Namespace) -> list[Row]:
    """Seconds of each task, and forward passes it takes."""
    counter, timed = CompilationCounter(), tasks(build())
    timings = interleaved({name: task for name, (task, _) in timed.items()}, arguments.repeats, counter=counter)
    rows, forward = [], timings["forward"]
    for name, timing in timings.items():
        ratio, bar = timing.median / forward.median, timed[name][1]
        met = (bar is None or ratio <= bar) and not timing.compilations
        rows.append(
            {
                f"{BATCH} x {LENGTH} tokens": name,
                "seconds": round(timing.median, 3),
                "times forward": round(ratio, 2),
                "of fastest": round(timing.fastest / forward.fastest, 2),
                "bar": "" if bar is None else f"<= {bar:g}",
                "compilations": timing.compilations,
                "met": "yes" if met else "NO",
            }
        )
    return rows


def live_bytes() -> int:
    """Bytes of all arrays on the devices; arrays that share a buffer count once."""
    return sum({array.unsafe_buffer_pointer(): array.nbytes for array in jax.live_arrays()}.values())


def held(model: Any, tokens: np.ndarray, remat: bool) -> int:
    """Bytes beside the model when the metric is called: what the backward pass will need, and the final stream."""
    before, seen = live_bytes(), []

    class Probe:
        reads_stream = True

        def of_stream(self, cfg: Any, params: Any, residual: Any) -> Any:
            seen.append(live_bytes() - before)
            return residual[:, -1, 3] - residual[:, -1, 4]

        def __call__(self, logits: Any) -> Any:
            raise AssertionError("a metric of the stream gets no logits")

    jax.block_until_ready(model.run_with_grads(tokens, Probe(), "hook_embed", remat=remat).value)
    return seen[0]


def compiled(model: Any, tokens: np.ndarray, remat: bool | None) -> int:
    """Bytes of temporary arrays of the run as one program; ``None`` means a forward pass of the last logits."""

    def run(model: Any, tokens: Any) -> Any:
        if remat is None:
            return model(tokens)[:, -1]
        found = model.run_with_grads(tokens, LogitDiff(3, 4), "hook_embed", remat=remat)
        return found.value, dict(found.grads)

    return jax.jit(run).lower(model, tokens).compile().memory_analysis().temp_size_in_bytes


def memory(arguments: argparse.Namespace) -> list[Row]:
    """Megabytes beside the model, against the length of the prompts."""
    model, rows = build(), []
    for length in arguments.lengths:
        tokens = prompts(length)
        streams = 4 * BATCH * length * GPT2_SMALL["d_model"] * (GPT2_SMALL["n_layers"] + 1)
        ours = {remat: held(model, tokens, remat) for remat in (False, True)}
        planned = {way: compiled(model, tokens, way) for way in (None, False, True)}
        rows.append(
            {
                f"{BATCH} prompts of": f"{length} tokens",
                "streams MB": round(streams / 1e6, 1),
                "held MB": round(ours[False] / 1e6, 1),
                "held, remat MB": round(ours[True] / 1e6, 1),
                "bar MB": f"<= {HELD_BAR * streams / 1e6:.1f}",
                "compiled: forward MB": round(planned[None] / 1e6, 1),
                "gradients MB": round(planned[False] / 1e6, 1),
                "remat MB": round(planned[True] / 1e6, 1),
                "met": "yes" if ours[True] <= HELD_BAR * streams else "NO",
            }
        )
    return rows


def main() -> int:
    """Prints the tables; the exit status says whether every bar was met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=("time", "memory"), default=("time", "memory"))
    parser.add_argument("--repeats", type=int, default=12, help="timed turns")
    parser.add_argument("--lengths", type=int, nargs="+", default=(15, 64, 256), help="lengths of the memory table")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    results: dict[str, Any] = {"machine": machine("jax", "flax")}
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items()))
    for part in arguments.parts:
        results[part] = {"time": time, "memory": memory}[part](arguments)
        print_table(results[part])
        print()
    write_json(arguments.json, results)
    return int(any(row["met"] == "NO" for part in arguments.parts for row in results[part]))


if __name__ == "__main__":
    raise SystemExit(main())
