"""A model whose blocks stay in its files (``offload="host"``) beside the resident one: peak memory, and time.

    python benchmarks/offload.py            # a GPT-2 of 48 layers and d_model 768, 1.4 GB on disk
    python benchmarks/offload.py --json

``peak`` is the growth of a process's resident memory while it loads the model and harvests the stream entering its
middle layer; each is measured in a process of its own. ``ratio`` is the time of the same forward passes to the middle
layer, run in turns in one process: the best of each, offloaded over resident. On a machine with CPUs alone nothing
crosses a bus: what is paid for is reading a block from its file, turning it round and processing it, each time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from load_memory import PROCESSING, make_checkpoint, resident

SIZES = ((1, 64), (2, 256))
"""Prompts and tokens of the passes that are timed."""


def load(directory: str, offload: str, processed: bool) -> object:
    """Loads the model: ``offload`` is ``"resident"`` or ``"files"``."""
    from tljax import HookedTransformer

    steps = dict.fromkeys(PROCESSING, processed)
    if offload == "files":
        return HookedTransformer.from_pretrained(directory, offload="host", **steps)
    return HookedTransformer.from_pretrained(directory, **steps)


def measure_peak(directory: str, offload: str) -> dict[str, float]:
    """Loads and harvests in this process; returns the growth of its peak memory, and the parameters' size."""
    import jax

    from tljax.harvest import harvest

    jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.numpy.zeros(4)))
    before = resident("VmRSS")
    model = load(directory, offload, True)
    tokens = np.random.default_rng(0).integers(0, model.cfg.d_vocab, (8, 128)).astype(np.int32)
    with tempfile.TemporaryDirectory() as store:
        harvest(model, tokens, [("resid_pre", model.cfg.n_layers // 2)], store, batch_size=4, progress=False)
    width = np.dtype(model.cfg.dtype).itemsize
    return {"peak_mb": (resident("VmHWM") - before) / 1e6, "model_mb": model.n_params_total * width / 1e6}


def measure_time(directory: str, rounds: int) -> dict[str, float]:
    """Returns, for each way and size, the best time over the resident model's."""
    import jax

    model = load(directory, "resident", False)
    models = {
        "resident": model,
        "memory": model.offload("host"),
        "files": load(directory, "files", False),
        "files, processed": load(directory, "files", True),
    }
    ratios = {}
    for batch, pos in SIZES:
        tokens = np.random.default_rng(1).integers(0, model.cfg.d_vocab, (batch, pos)).astype(np.int32)
        best = dict.fromkeys(models, float("inf"))
        outputs = {}
        for _ in range(rounds + 1):
            for name, one in models.items():
                start = time.perf_counter()
                outputs[name] = jax.block_until_ready(one(tokens, stop_at_layer=model.cfg.n_layers // 2))
                best[name] = min(best[name], time.perf_counter() - start)
        for name in ("memory", "files"):
            np.testing.assert_array_equal(outputs[name], outputs["resident"])
        ratios |= {f"{name}, {batch}×{pos}": best[name] / best["resident"] for name in models if name != "resident"}
    return ratios


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description="Blocks on the host: peak memory and time.")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--d-vocab", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", nargs=2, metavar=("DIR", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        directory, way = arguments.measure
        found = measure_time(directory, arguments.rounds) if way == "time" else measure_peak(directory, way)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as directory:
        make_checkpoint(Path(directory), arguments.layers, arguments.d_model, arguments.d_vocab)
        rounds = ["--rounds", str(arguments.rounds)]
        results: dict[str, dict[str, float]] = {}
        for way in ("resident", "files", "time"):
            command = [sys.executable, __file__, *rounds, "--measure", directory, way]
            results[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if arguments.json:
        print(json.dumps({"benchmark": "offload", **results}))
        return
    for way in ("resident", "files"):
        peak, model = results[way]["peak_mb"], results[way]["model_mb"]
        print(f"{way:9} peak growth {peak:.0f} MB, {peak / model:.2f}x the model's {model:.0f} MB")
    for name, ratio in results["time"].items():
        print(f"{name:28} {ratio:.2f}x the resident model's time")


if __name__ == "__main__":
    main()
