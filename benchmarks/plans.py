"""Memory that ``tljax.plan`` says a run takes, beside the peak that was measured, each run in a process of its own.

::

    python benchmarks/plans.py --json plans.json
    python benchmarks/plans.py --shapes 1b --dtype bfloat16 --runs forward cache

``planned`` and ``measured`` are beside the parameters; ``with parameters`` compares both with them, and has the bar.
A run is made once before, so that compiling is not measured, and freed memory is handed back before the baseline is
taken. What the model keeps of that first run (transposed weights of a generation) counts as the run's. The allocator
hands large arrays back at once: otherwise what is free inside it would count as taken.

The measured peak of a CPU holds some memory that no plan can know: kernels of XLA (YNNPACK) make arrays of their own,
which the compiler does not report, and what a program frees may be handed back while the next one runs.
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
    "small": GPT2_SMALL | {"n_ctx": 2048},
    "1b": {
        "d_model": 2048, "n_layers": 16, "n_heads": 32, "n_key_value_heads": 8, "d_head": 64, "d_mlp": 8192,
        "n_ctx": 4096, "d_vocab": 32000, "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
    },
    "tiny": {
        "d_model": 256, "n_layers": 2, "n_heads": 4, "d_head": 64, "d_mlp": 1024, "n_ctx": 2048, "d_vocab": 8192,
        "act_fn": "gelu_new",
    },
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "forward": {"what": "forward", "batch": 8, "pos": 256},
    "stop": {"what": "forward", "batch": 8, "pos": 512, "stop_at_layer": -1},
    "cache": {"what": "cache", "batch": 4, "pos": 256},
    "gradients": {"what": "gradients", "batch": 4, "pos": 256, "names_filter": "resid_post"},
    "remat": {"what": "gradients", "batch": 8, "pos": 256, "names_filter": "resid_post", "remat": True},
    "sweep": {"what": "sweep", "batch": 1, "pos": 128, "names_filter": "resid_post"},
    "generate": {"what": "generate", "batch": 8, "pos": 384, "max_new_tokens": 32},
    "harvest": {"what": "harvest", "batch": 8, "pos": 256, "names_filter": "resid_post"},
    "long": {"what": "forward", "batch": 1, "pos": 2048},
    "long-remat": {"what": "gradients", "batch": 1, "pos": 2048, "names_filter": "resid_post", "remat": True},
}
"""Arguments of ``tljax.plan`` by name; of ``names_filter`` every layer is meant, in a sweep the one in the middle."""
FEWER: dict[str, dict[str, dict[str, Any]]] = {
    "1b": {
        "forward": {"batch": 1}, "stop": {"batch": 1}, "cache": {"batch": 1}, "gradients": {"batch": 1, "pos": 64},
        "remat": {"batch": 1, "pos": 128}, "sweep": {"pos": 16}, "harvest": {"batch": 1, "pos": 64},
        "generate": {"batch": 2, "pos": 64, "max_new_tokens": 8}, "long": {"pos": 1024}, "long-remat": {"pos": 512},
    },
}  # fmt: skip
"""What a shape's runs have instead, so that all of them together take few minutes."""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}


def arguments_of(shape: str, name: str) -> dict[str, Any]:
    """The arguments of a run of a shape."""
    given = RUNS[name] | FEWER.get(shape, {}).get(name, {})
    n_layers = SHAPES[shape]["n_layers"]
    if "names_filter" in given:
        layers = [n_layers // 2 - 1] if given["what"] == "sweep" else range(n_layers)
        given["names_filter"] = [(given["names_filter"], layer) for layer in layers]
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


def bytes_of(arrays: Any) -> int:
    """Bytes of some arrays of jax; those that share a buffer count once."""
    return sum({array.unsafe_buffer_pointer(): array.nbytes for array in arrays}.values())


def make(model: Any, run: dict[str, Any], directory: Path) -> Any:
    """Makes a run; returns what its caller would hold."""
    import jax

    from tljax import harvest, patching

    what, shape = run["what"], (run["batch"], run["pos"])
    tokens = np.random.default_rng(0).integers(0, model.cfg.d_vocab, shape).astype(np.int32)
    names, options = run.get("names_filter"), dict[str, Any]()
    if what == "forward":
        return jax.block_until_ready(model(tokens, stop_at_layer=run.get("stop_at_layer")))
    if what == "cache":
        logits, cache = model.run_with_cache(tokens, names_filter=names)
        return jax.block_until_ready((logits, dict(cache)))
    if what == "gradients":
        found = model.run_with_grads(tokens, patching.LogitDiff(3, 4), names, remat=run.get("remat", False))
        return jax.block_until_ready((found.value, dict(found.cache), dict(found.grads)))
    if what == "sweep":
        others = (tokens + 1) % model.cfg.d_vocab  # another value at every position, so that no site is left out
        return patching.sweep(model, tokens, others, patching.LogitDiff(3, 4), run["names_filter"][0], progress=False)
    if what == "generate":
        options |= {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
        return model.generate(tokens, max_new_tokens=run["max_new_tokens"], **options)
    windows = [row.tolist() for row in np.tile(tokens, (4, 1))]
    store = directory / f"store{len(list(directory.iterdir()))}"
    options |= {"batch_size": shape[0], "context_size": shape[1], "prepend_bos": False, "progress": False}
    return harvest.harvest(model, windows, names, store, **options)


def measure(shape: str, name: str, dtype: str) -> dict[str, int]:
    """Bytes of a run's peak above those of the model, and of the parameters."""
    import tempfile

    import jax

    import tljax

    cfg = shape_of(shape, dtype)
    model = tljax.HookedTransformer(cfg)
    words = jax.random.normal(jax.random.key(0), model.params["embed"]["W_E"].shape, model.cfg.jnp_dtype)
    model = model.replace(params=model.params | {"embed": {"W_E": words}})  # tokens differ; all else may be zero
    jax.block_until_ready(model.params)
    run, own = arguments_of(shape, name), bytes_of(jax.tree.leaves(model.params))
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(2):  # the first compiles
            base = forget()
            base -= bytes_of(jax.live_arrays()) - own
            held = make(model, run, Path(directory))
            peak = resident("VmHWM")
            del held
    return {
        "measured": peak - base,
        "parameters": own,
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
    planned, found = tljax.plan(cfg, **arguments_of(shape, name)), in_child(shape, name, dtype)
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
