"""Peak host memory of loading a checkpoint, over the size of the loaded model.

    python benchmarks/load_memory.py            # a GPT-2 small shaped checkpoint, 500 MB on disk
    python benchmarks/load_memory.py --json

Each load runs in a process of its own. ``ratio`` is the growth of its peak resident memory during ``load_checkpoint``
(compilation included) over the bytes of the parameters it returns, which hold the unembedding apart from the embedding.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LIMIT = 1.3
PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")


def make_checkpoint(directory: Path, n_layers: int, d_model: int, d_vocab: int) -> int:
    """Writes a random GPT-2 checkpoint tensor by tensor; returns its size on disk in bytes."""
    from tljax.checkpoints.families.gpt2 import GPT2
    from tljax.checkpoints.formats.hf_config import HFConfig
    from tljax.checkpoints.rows import bind
    from tljax.modules.parameters import axis_sizes
    from tljax.safetensors_files import write_safetensors

    attributes = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": d_model,
        "n_layer": n_layers,
        "n_head": d_model // 64,
        "n_positions": 1024,
        "vocab_size": d_vocab,
    }
    hf = HFConfig(attributes)
    sizes = axis_sizes(GPT2.read_config(hf))
    entries = [entry for entry in bind(GPT2.rows(hf), n_layers) if not entry.row.tied_to]
    headers = {entry.key: (np.dtype("float32"), entry.row.shape(sizes)) for entry in entries}
    rng = np.random.default_rng(0)
    write_safetensors(
        directory / "model.safetensors",
        headers,
        lambda key: 0.02 * rng.standard_normal(headers[key][1], dtype=np.float32),
    )
    (directory / "config.json").write_text(json.dumps(attributes))
    return (directory / "model.safetensors").stat().st_size


def resident(field: str) -> int:
    """Returns ``VmRSS`` (now) or ``VmHWM`` (peak) of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}: this benchmark needs Linux.")


def measure(directory: str, processed: bool) -> dict[str, float]:
    """Loads ``directory`` in this process and returns what it cost."""
    import jax

    from tljax.checkpoints import load_checkpoint

    jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.numpy.zeros(4)))  # the compiler's own memory is not the load's
    before, start = resident("VmRSS"), time.perf_counter()
    loaded = load_checkpoint(directory, **dict.fromkeys(PROCESSING, processed))
    seconds = time.perf_counter() - start
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
    growth = resident("VmHWM") - before
    return {"model_mb": size / 1e6, "growth_mb": growth / 1e6, "ratio": growth / size, "seconds": seconds}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description="Peak memory of loading a checkpoint, over the model's own size.")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--d-vocab", type=int, default=50257)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", nargs=2, metavar=("DIR", "PROCESSED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], arguments.measure[1] == "1")))
        return
    with tempfile.TemporaryDirectory() as directory:
        disk = make_checkpoint(Path(directory), arguments.layers, arguments.d_model, arguments.d_vocab)
        results: dict[str, dict[str, float]] = {}
        for name, processed in (("unprocessed", "0"), ("processed", "1")):
            command = [sys.executable, __file__, "--measure", directory, processed]
            results[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if arguments.json:
        print(json.dumps({"benchmark": "load_memory", "disk_mb": disk / 1e6, "limit": LIMIT, **results}))
    else:
        print(f"checkpoint: {disk / 1e6:.0f} MB on disk")
        for name, result in results.items():
            print(
                f"{name:12} model {result['model_mb']:.0f} MB, peak growth {result['growth_mb']:.0f} MB: "
                f"{result['ratio']:.2f}x the model, {result['seconds']:.1f} s"
            )
    worst = max(result["ratio"] for result in results.values())
    if worst > LIMIT:
        raise SystemExit(f"Loading took {worst:.2f}x the model's size; the limit is {LIMIT}x.")


if __name__ == "__main__":
    main()
