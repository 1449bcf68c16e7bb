"""Peak host memory of loading a checkpoint, over the size of the loaded model.

    python benchmarks/load_memory.py            # a GPT-2 small shaped checkpoint, 500 MB on disk
    python benchmarks/load_memory.py --json
    python benchmarks/load_memory.py --processes 2   # shared by two processes, one device each

Each load runs in a process of its own. ``ratio`` is the growth of its peak resident memory during ``load_checkpoint``
(compilation included) over the bytes of the parameters it returns, which hold the unembedding apart from the embedding.
With several processes it is each one's growth over its own share, and the limit 1.1 × the share + the largest tensor.
"""

import argparse
import ctypes
import gc
import json
import os
import socket
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


def measure_share(directory: str, processed: bool, port: int, count: int, number: int) -> dict[str, float]:
    """Loads this process's share of ``directory``, spread over ``count`` processes, and returns what it cost."""
    from tljax.scale import connect, make_mesh

    connect(f"localhost:{port}", count, number)
    import jax

    from tljax import HookedTransformer

    steps, mesh = dict.fromkeys(PROCESSING, processed), make_mesh(count)
    jax.block_until_ready(HookedTransformer.from_pretrained(directory, mesh=mesh, first_n_layers=1, **steps).params)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")  # with all programs: the compiler's own memory is not the load's
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    params = HookedTransformer.from_pretrained(directory, mesh=mesh, **steps).params
    jax.block_until_ready(params)
    leaves = jax.tree.leaves(params)
    own = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    bound = 1.1 * own + max(leaf.nbytes for leaf in leaves)
    growth = resident("VmHWM") - before
    return {"share_mb": own / 1e6, "growth_mb": growth / 1e6, "bound_mb": bound / 1e6}


def shares(directory: str, count: int) -> None:
    """Prints what each of several processes takes, and exits with an error if one is over the limit."""
    over, environment = False, os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # what is freed is not counted
    for processed in (False, True):
        with socket.socket() as one:
            one.bind(("localhost", 0))
            port = one.getsockname()[1]
        command = [sys.executable, __file__, "--share", directory, str(int(processed)), str(port), str(count)]
        running = [
            subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True, env=environment)
            for n in range(count)
        ]
        for number, process in enumerate(running):
            found = json.loads(process.communicate(timeout=540)[0].splitlines()[-1])
            over |= found["growth_mb"] > found["bound_mb"]
            print(
                f"{'processed' if processed else 'unprocessed':12} process {number}: share {found['share_mb']:.0f} MB, "
                f"peak growth {found['growth_mb']:.0f} MB, limit {found['bound_mb']:.0f} MB"
            )
    if over:
        raise SystemExit("A process took more than 1.1 x its share and the largest tensor.")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description="Peak memory of loading a checkpoint, over the model's own size.")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--d-vocab", type=int, default=50257, help="processes share it if it divides, as 50304 does")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--processes", type=int, default=1, help="how many share the model")
    parser.add_argument("--share", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, metavar=("DIR", "PROCESSED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], arguments.measure[1] == "1")))
        return
    if arguments.share:
        place, processed, port, count, number = arguments.share
        print(json.dumps(measure_share(place, processed == "1", int(port), int(count), int(number))))
        return
    with tempfile.TemporaryDirectory() as directory:
        disk = make_checkpoint(Path(directory), arguments.layers, arguments.d_model, arguments.d_vocab)
        if arguments.processes > 1:
            return shares(directory, arguments.processes)
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
