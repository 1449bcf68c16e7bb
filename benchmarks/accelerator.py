"""One GPU or TPU: numerics against float64, times beside torch's on the same card, peak memory, in under six minutes.

::

    python benchmarks/accelerator.py --json accelerator.json
    python benchmarks/accelerator.py --small          # what a CPU runs: the same work, narrow

Torch stands beside it where it sees the same device (CUDA, or the CPU); EAP-IG, a dictionary's step and the harvest
have no peer in torch here. What no longer fits into ``--seconds`` is left out, and the table says so.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _accelerator_numerics import numerics
from _timing import GPT2_SMALL, CompilationCounter, interleaved, machine, print_table, write_json

import tljax
from tljax.patching import LogitDiff, sweep

SMALL = {
    "d_model": 32, "n_layers": 2, "n_heads": 4, "d_head": 8, "d_mlp": 64, "n_ctx": 64, "d_vocab": 96,
    "act_fn": "gelu_new",
}  # fmt: skip
Row = dict[str, Any]
Task = Callable[[int], Any]


class Work:
    """What is timed: each piece with its peer in torch, or ``None``.

    Args:
        small: narrow and short.
        directory: where harvests go.
    """

    def __init__(self, small: bool, directory: Path) -> None:
        self.small, self.directory = small, directory
        self.shape = SMALL if small else GPT2_SMALL | {"n_ctx": 4096}
        self.model = tljax.HookedTransformer(tljax.HookedTransformerConfig(**self.shape, seed=0))
        self.peer = _peer(self.shape)

    def tokens(self, batch: int, pos: int, seed: int = 0) -> np.ndarray:
        drawn = np.random.default_rng(seed).integers(0, self.shape["d_vocab"], (batch, pos))
        return drawn.astype(np.int32)

    def pieces(self) -> Iterator[tuple[str, Callable[[], dict[str, Task]]]]:
        """Yields names, and functions that make the tasks, which may take memory."""
        for batch, pos in ((1, 8), (2, 16), (1, 32)) if self.small else ((1, 16), (8, 256), (1, 4096)):
            yield f"forward {batch}x{pos}", lambda batch=batch, pos=pos: self._forward(batch, pos)
        yield "full cache", self._cache
        yield "hooked loop", self._hooked
        yield "residual sweep", self._sweep
        for batch in (1, 4) if self.small else (1, 16):
            yield f"generation, batch {batch}", lambda batch=batch: self._generate(batch)
        yield "EAP-IG", self._edges
        yield "a dictionary's step", self._dictionary
        yield "harvest", self._harvest

    def _both(self, ours: Task, theirs: Callable[[Any], Task], *tokens: np.ndarray) -> dict[str, Task]:
        if self.peer is None:
            return {"tljax": ours}
        return {"tljax": ours, "torch": theirs([self.peer.tokens(one) for one in tokens])}

    def _forward(self, batch: int, pos: int) -> dict[str, Task]:
        tokens, peer = self.tokens(batch, pos), self.peer
        run = lambda _: jax.block_until_ready(self.model(tokens))  # noqa: E731
        return self._both(run, lambda given: lambda _: peer.forward(*given), tokens)

    def _cache(self) -> dict[str, Task]:
        tokens, peer = self.tokens(1, 16 if self.small else 128), self.peer

        def run(_: int) -> Any:
            logits, cache = self.model.run_with_cache(tokens)
            return jax.block_until_ready((logits, dict(cache)))

        return self._both(run, lambda given: lambda _: peer.cached(*given), tokens)

    def _hooked(self) -> dict[str, Task]:
        tokens, peer = self.tokens(1, 16), self.peer

        def run(number: int) -> Any:
            layer, pos = number * 5 % self.shape["n_layers"], number * 7 % 16
            hook = (f"blocks.{layer}.hook_resid_post", lambda x, hook: x.at[:, pos].multiply(0.5))
            return jax.block_until_ready(self.model.run_with_hooks(tokens, fwd_hooks=[hook]))

        return self._both(run, lambda given: lambda number: peer.hooked(*given, number), tokens)

    def _sweep(self) -> dict[str, Task]:
        length, peer = 8 if self.small else 15, self.peer
        tokens, clean, metric = self.tokens(1, length), self.tokens(1, length, 1), LogitDiff(3, 4)
        run = lambda _: sweep(self.model, tokens, clean, metric, "resid_pre", progress=False)  # noqa: E731
        return self._both(run, lambda given: lambda _: peer.sweep(*given), tokens, clean)

    def _generate(self, batch: int) -> dict[str, Task]:
        n_new, peer = 8 if self.small else 64, self.peer
        tokens, options = self.tokens(batch, 8 if self.small else 32), {"do_sample": False, "stop_at_eos": False}

        def run(_: int) -> Any:
            made = self.model.generate(
                tokens, max_new_tokens=n_new, return_type="tokens", verbose=False, **options  # type: ignore[arg-type]
            )  # fmt: skip
            return jax.block_until_ready(made)

        return self._both(run, lambda given: lambda _: peer.generate(*given, n_new), tokens)

    def _edges(self) -> dict[str, Task]:
        from tljax.circuits import edge_scores

        batch, pos = (1, 6) if self.small else (8, 15)
        clean, corrupted = self.tokens(batch, pos), self.tokens(batch, pos, 1)
        options: dict[str, Any] = {"method": "eap-ig", "steps": 2 if self.small else 5, "progress": False}
        run = lambda _: edge_scores(self.model, clean, corrupted, LogitDiff(3, 4), **options).values  # noqa: E731
        return {"tljax": lambda number: jax.block_until_ready(run(number))}

    def _dictionary(self) -> dict[str, Task]:
        from tljax.dictionaries.training import Preparation, TrainingConfig, initial_parameters
        from tljax.dictionaries.training.coefficients import numbers_of, structure_of
        from tljax.dictionaries.training.step import initial_state, train_step

        rows, width, features = (64, 32, 128) if self.small else (4096, 768, 12288)
        cfg = TrainingConfig(architecture="batchtopk", k=8, d_in=width, d_sae=features)
        x = jax.numpy.asarray(np.random.default_rng(0).standard_normal((rows, width), np.float32))
        state = jax.tree.map(jax.numpy.array, initial_state(initial_parameters(cfg), cfg, None))
        numbers, structure = numbers_of(cfg, 1000), structure_of(cfg, cfg.k)

        def run(_: int) -> Any:
            nonlocal state
            state, metrics = train_step(state, x, None, numbers, Preparation(), structure, None)
            return jax.block_until_ready((state, metrics))

        return {"tljax": run}

    def _harvest(self) -> dict[str, Task]:
        from tljax.harvest import harvest

        batch, pos = (2, 16) if self.small else (8, 256)
        rows, point = self.tokens(4 * batch, pos).tolist(), ("resid_post", self.shape["n_layers"] // 2)

        def run(_: int) -> Any:
            there = Path(tempfile.mkdtemp(dir=self.directory)) / "store"
            return harvest(
                self.model, rows, point, there, batch_size=batch, context_size=pos, progress=False
            )  # fmt: skip

        return {"tljax": run}


def _peer(shape: dict[str, Any]) -> Any:
    """Torch on the device that jax uses, or ``None``."""
    if any(util.find_spec(name) is None for name in ("torch", "transformers")):
        return None
    import torch

    platform = jax.devices()[0].platform
    if platform not in ("cpu", "gpu") or (platform == "gpu" and not torch.cuda.is_available()):
        return None
    from _accelerator_peers import Peer

    return Peer(shape, "cuda" if platform == "gpu" else "cpu")


def timed(work: Work, repeats: int, ends: float) -> list[Row]:
    """Times each piece in turns with its peer; what would start after ``ends`` is left out."""
    rows, counter = [], CompilationCounter()
    for name, make in work.pieces():
        row = {"work": name, "ms": "", "torch ms": "", "of torch": "", "compilations": "", "peak MB": ""}
        if time.perf_counter() > ends:
            rows.append(row | {"ms": "left out: no time"})
            continue
        timings = interleaved(make(), repeats, warmup=2, counter=counter)
        ours, theirs = timings["tljax"], timings.get("torch")
        row |= {"ms": round(1e3 * ours.median, 3), "compilations": ours.compilations, "peak MB": _peak()}
        if theirs is not None:
            row |= {"torch ms": round(1e3 * theirs.median, 3), "of torch": round(ours.median / theirs.median, 2)}
        rows.append(row)
        print(f"{name}: {row['ms']} ms, torch {row['torch ms'] or 'has no peer here'}", flush=True)
    return rows


def _peak() -> float | str:
    """Megabytes in use at most so far on the device, where it counts them."""
    stats = jax.devices()[0].memory_stats() or {}
    return round(stats["peak_bytes_in_use"] / 1e6, 1) if "peak_bytes_in_use" in stats else ""


def main() -> int:
    """Prints the tables; the exit status says whether the numerics were within their bars."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", action=argparse.BooleanOptionalAction, default=None, help="default on a CPU")
    parser.add_argument("--seconds", type=float, default=330, help="begin nothing after this time")
    parser.add_argument("--repeats", type=int, default=10, help="timed turns")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    started = time.perf_counter()
    small = jax.devices()[0].platform == "cpu" if arguments.small is None else arguments.small
    facts: Row = machine("jax", "flax") | {"small": small}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    shape, size = (SMALL, (2, 16)) if small else (GPT2_SMALL | {"n_layers": 4}, (2, 256))
    exact = numerics(shape, *size)
    print_table(exact)
    with tempfile.TemporaryDirectory() as directory:
        rows = timed(Work(small, Path(directory)), arguments.repeats, started + arguments.seconds)
    print_table(rows)
    seconds = round(time.perf_counter() - started, 1)
    print(f"{seconds} s in all")
    write_json(arguments.json, {"machine": facts, "numerics": exact, "times": rows, "seconds": seconds})
    return int(any(row["met"] == "NO" for row in exact))


if __name__ == "__main__":
    raise SystemExit(main())
