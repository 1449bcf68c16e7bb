"""Memory that ``tljax.plan`` says a run takes, beside the peak that was measured, each run in a process of its own.

::

    python benchmarks/plans.py --json plans.json
    python benchmarks/plans.py --shapes 1b --dtype bfloat16 --runs forward cache

``planned`` and ``measured`` are beside the parameters; ``with parameters`` compares both with them, and has the bar.
A run is made once before, so that compiling is not measured, and freed memory is handed back before the baseline is
taken. The allocator hands large arrays back at once: otherwise what is free inside it would count as taken.
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from _timing import GPT2_SMALL, machine, print_table, write_json

BAR = 0.15
"""The share by which a plan may miss the measured peak."""
SHAPES: dict[str, dict[str, Any]] = {
    "small": GPT2_SMALL,
    "1b": {
        "d_model": 2048, "n_layers": 16, "n_heads": 32, "n_key_value_heads": 8, "d_head": 64, "d_mlp": 8192,
        "n_ctx": 4096, "d_vocab": 32000, "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
    },
    "tiny": {
        "d_model": 256, "n_layers": 2, "n_heads": 4, "d_head": 64, "d_mlp": 1024, "n_ctx": 512, "d_vocab": 8192,
        "act_fn": "gelu_new",
    },
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "forward": {"what": "forward", "batch": 8, "pos": 256},
    "stop": {"what": "forward", "batch": 8, "pos": 512, "stop_at_layer": -1},
    "cache": {"what": "cache", "batch": 4, "pos": 256},
    "gradients": {"what": "gradients", "batch": 4, "pos": 256, "names_filter": "resid_post"},
    "remat": {"what": "gradients", "batch": 8, "pos": 256, "names_filter": "resid_post", "remat": True},
    "sweep": {"what": "sweep", "batch": 1, "pos": 64},
    "generate": {"what": "generate", "batch": 8, "pos": 384, "max_new_tokens": 32},
    "harvest": {"what": "harvest", "batch": 8, "pos": 256, "names_filter": "resid_post"},
}
"""Arguments of ``tljax.plan`` by name; of ``names_filter`` every layer is meant."""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}


def arguments_of(name: str, n_layers: int) -> dict[str, Any]:
    """The arguments of a run for a model of that many layers."""
    given = dict(RUNS[name])
    if "names_filter" in given:
        given["names_filter"] = [(given["names_filter"], layer) for layer in range(n_layers)]
    return given


def shape_of(name: str, dtype: str) -> Any:
    import tljax

    return tljax.HookedTransformerConfig(**SHAPES[name], dtype=dtype, init_weights=False)


def resident(key: str) -> int:
    """Bytes of this process in memory: now (``"VmRSS"``), or at most since the last :func:`forget` (``"VmHWM"``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def forget() -> int:
    """Hands freed memory back and begins a new peak; returns the bytes in memory."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def make(model: Any, run: dict[str, Any], directory: Path) -> Any:
    """Makes a run; returns what its caller would hold."""
    import jax

    from tljax import harvest, patching

    what, shape = run["what"], (run["batch"], run["pos"])
    tokens = np.random.default_rng(0).integers(0, model.cfg.d_vocab, shape).astype(np.int32)
    names = run.get("names_filter")
    if what == "forward":
        return jax.block_until_ready(model(tokens, stop_at_layer=run.get("stop_at_layer")))
    if what == "cache":
        logits, cache = model.run_with_cache(tokens, names_filter=names)
        return jax.block_until_ready((logits, dict(cache)))
    if what == "gradients":
        found = model.run_with_grads(tokens, patching.LogitDiff(3, 4), names, remat=run.get("remat", False))
        return jax.block_until_ready((found.value, dict(found.cache), dict(found.grads)))
    if what == "sweep":
        changed = tokens.copy()
        changed[:, 0] += 1
        return patching.sweep(model, tokens, changed, patching.LogitDiff(3, 4), "resid_post", axes=("pos",))
    if what == "generate":
        options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
        return model.generate(tokens, max_new_tokens=run["max_new_tokens"], **options)
    windows = [row.tolist() for row in np.tile(tokens, (4, 1))]
    store = directory / f"store{len(list(directory.iterdir()))}"
    return harvest.harvest(model, windows, names, store, batch_size=shape[0], context_size=shape[1], progress=False)


def measure(shape: str, name: str, dtype: str) -> dict[str, int]:
    """Bytes of a run's peak above those of the model, and of the parameters."""
    import tempfile

    import jax

    import tljax

    cfg = shape_of(shape, dtype)
    model = tljax.HookedTransformer(cfg)
    jax.block_until_ready(model.params)
    run = arguments_of(name, cfg.n_layers)
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(2):  # the first compiles
            base = forget()
            held = make(model, run, Path(directory))
            peak = resident("VmHWM")
            del held
    return {
        "measured": peak - base,
        "parameters": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def in_child(shape: str, name: str, dtype: str) -> dict[str, int]:
    command = [sys.executable, __file__, "--child", shape, name, dtype]
    done = subprocess.run(command, env=os.environ | ALLOCATOR, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shape} {name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(shape: str, name: str, dtype: str) -> dict[str, Any]:
    """A row of the table."""
    import tljax

    cfg = shape_of(shape, dtype)
    planned, found = tljax.plan(cfg, **arguments_of(name, cfg.n_layers)), in_child(shape, name, dtype)
    beside, whole = planned.peak.bytes / found["measured"], found["parameters"] + found["measured"]
    together = planned.bytes / whole
    return {
        "shape": shape,
        "run": f"{name} {planned.batch}x{planned.pos}",
        "dtype": dtype,
        "planned MB": round(planned.peak.bytes / 1e6, 1),
        "measured MB": round(found["measured"] / 1e6, 1),
        "ratio": round(beside, 3),
        "with parameters": round(together, 3),
        "peak": planned.peak.stage,
        "met": "yes" if abs(together - 1) <= BAR else "NO",
    }


def main() -> int:
    """Prints the table; the exit status says whether every plan was close enough."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=("small", "1b"))
    parser.add_argument("--runs", nargs="+", choices=tuple(RUNS), default=tuple(RUNS))
    parser.add_argument("--dtype", default="float32", help="dtype of parameters and activations")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child)))
        return 0
    rows = []
    for shape in arguments.shapes:
        for name in arguments.runs:
            rows.append(compare(shape, name, arguments.dtype))
            print("  ".join(f"{value}" for value in rows[-1].values()), flush=True)
    print_table(rows)
    write_json(arguments.json, {"machine": machine("jax"), "rows": rows})
    return int(any(row["met"] == "NO" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
