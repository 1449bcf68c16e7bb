"""Harvest to disk against the bare forward pass to the same layer, and against TransformerLens's loop."""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from _timing import interleaved, print_table
from transformerlens import build_models

from tljax.harvest import ActivationStore
from tljax.harvest import harvest as harvest_to

LAYER, BATCH, CONTEXT, BATCHES = 6, 8, 128, 4
POINT = f"blocks.{LAYER}.hook_resid_pre"
OF_FORWARD, OF_TRANSFORMERLENS = 0.9, 2.5
SGD_BATCH = 4096


def harvest(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens a second of a harvest of some batches, in turns with its peers."""
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    model, peer = build_models()
    rows = np.random.default_rng(0).integers(0, model.cfg.d_vocab, (BATCH * BATCHES, CONTEXT)).astype(np.int32)
    batches = rows.reshape(BATCHES, BATCH, CONTEXT)
    directory = Path(tempfile.mkdtemp(prefix="tljax-harvest-"))

    def ours(number: int) -> None:
        harvest_to(model, rows, POINT, directory / str(number), batch_size=BATCH, progress=False)

    def forward(number: int) -> None:
        jax.block_until_ready([model(batch, return_type=None, stop_at_layer=LAYER) for batch in batches])

    def transformerlens(point: str = POINT, **options: Any) -> Any:
        def loop(number: int) -> None:
            kept = []
            for batch in batches:
                _, cache = peer.run_with_cache(torch.from_numpy(batch).long(), names_filter=point, **options)
                kept.append(cache[point].to(torch.bfloat16))
            torch.save(torch.cat(kept), directory / f"peer{number}.pt")

        return loop

    tasks = {
        "tljax harvest to disk": ours,
        "bare forward to the layer": forward,
        "TransformerLens run_with_cache": transformerlens(),
        f"TransformerLens, stop_at_layer={LAYER}": transformerlens(
            f"blocks.{LAYER - 1}.hook_resid_post", stop_at_layer=LAYER
        ),
    }
    busy: dict[str, list[float]] = {}
    try:
        counted = {name: counting(task, busy.setdefault(name, [])) for name, task in tasks.items()}
        timings = interleaved(counted, arguments.repeats, warmup=1)
        reading = read(directory / "0")
    finally:
        shutil.rmtree(directory)
    own = timings["tljax harvest to disk"].median
    bars = dict.fromkeys(tasks, None) | {
        "bare forward to the layer": OF_FORWARD, "TransformerLens run_with_cache": OF_TRANSFORMERLENS
    }  # fmt: skip
    table = [
        {
            f"to {POINT}, {BATCH} x {CONTEXT}": name,
            "tokens/s": round(rows.size / timing.median),
            "tljax's speed over it": round(timing.median / own, 2),
            "CPU s": round(min(busy[name][1:]), 2),
            "bar": "" if bars[name] is None else f">= {bars[name]}",
            "compilations": timing.compilations,
            "met": "" if bars[name] is None else "yes" if timing.median / own >= bars[name] else "NO",
        }
        for name, timing in timings.items()
    ]
    print_table(table)
    print(reading)
    print()
    return table


def counting(task: Any, seconds: list[float]) -> Any:
    """A task that also notes the CPU seconds it took, which say more than the clock on a busy machine."""

    def counted(number: int) -> None:
        start = time.process_time()
        task(number)
        seconds.append(time.process_time() - start)

    return counted


def read(directory: Path) -> str:
    """What a batch of a shuffled reader takes."""
    reader = ActivationStore.open(directory).reader(SGD_BATCH)
    reader(0)
    start = time.perf_counter()
    for step in range(1, 6):
        reader(step)
    return f"a shuffled batch of {SGD_BATCH} tokens: {(time.perf_counter() - start) / 5 * 1000:.1f} ms"
