"""Long prompts at gpt2-small's shape with rotary positions: time beside transformers (sdpa), memory, gradients.

::

    python benchmarks/long.py --json long.json
    python benchmarks/long.py --parts memory

Each figure stands beside its bar; the exit status is 1 if one was missed. ``time``: the same 2,048 tokens as 1, 2, 4
and 8 prompts; transformers runs a GPT-NeoX of the same sizes, and without transformers and torch its column stays
empty; ``before``: ``attention_path="materialised"``; ``products``: the bare matrix products of weights and tokens (no
exact float32 pass takes less, and attention's own come on top). ``gradients``: at 1 x 2048, beside a forward pass with
the loss. ``memory``: each task in a process of its own, the peak (``VmHWM``) over what is resident once the model is
made, compilation included.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _timing import GPT2_SMALL, CompilationCounter, Timing, interleaved, machine, print_table, use_threads, write_json

import tljax
from tljax.patching import Loss

SHAPES = ((1, 2048), (2, 1024), (4, 512), (8, 256))
THEIRS_BAR, BEFORE_BAR, LOSS_BAR, GRADIENTS_BAR = 0.8, 1.05, 1.1, 4.0
Row = dict[str, Any]


def build(**changes: Any) -> Any:
    sizes = GPT2_SMALL | {"n_ctx": 8192, "positional_embedding_type": "rotary", "seed": 0} | changes
    return tljax.HookedTransformer(tljax.HookedTransformerConfig(**sizes))


def prompts(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, GPT2_SMALL["d_vocab"], (batch, length)).astype(np.int32)


def loss(model: Any, tokens: np.ndarray) -> float:
    return float(model(tokens, return_type="loss"))


def at_points(model: Any, tokens: np.ndarray) -> None:
    """Gradients of the loss at a hook point."""
    found = model.run_with_grads(tokens, Loss(tokens), "hook_embed", remat=True)
    jax.block_until_ready((found.value, dict(found.grads)))


def of_parameters(model: Any, tokens: np.ndarray) -> None:
    """Gradients of the loss by all parameters."""

    def total(params: Any) -> Any:
        return model.replace(params=params)(tokens, return_type="loss", remat=True)

    jax.block_until_ready(jax.grad(total)(model.params))


MEMORY: dict[str, tuple[Callable[[Any, np.ndarray], Any], int, float | None]] = {
    "loss": (loss, 8192, 1.5e9),
    "gradients at a point, remat": (at_points, 2048, 2e9),
    "gradients by parameters, remat": (of_parameters, 2048, 2e9),
    "loss, materialised": (loss, 2048, None),
}
"""Task → how it runs, the length of its prompt, and most bytes over the parameters."""
GRADIENTS: dict[str, tuple[Callable[[Any, np.ndarray], Any], float | None]] = {
    "at a point, remat": (at_points, GRADIENTS_BAR),
    "by parameters, remat": (of_parameters, None),  # 4.3 forward passes of FLOPs alone
}


def theirs() -> Callable[[np.ndarray], Any] | None:
    """A forward pass of transformers with the loss; ``None`` if it or torch is not installed."""
    try:
        import torch
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    except ImportError:
        return None
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = GPTNeoXConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, vocab_size=50257,
        max_position_embeddings=8192, rotary_pct=1.0, use_parallel_residual=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config).eval()

    def run(tokens: np.ndarray) -> float:
        ids = torch.tensor(tokens, dtype=torch.long)
        with torch.no_grad():
            return float(model(ids, labels=ids, use_cache=False).loss)

    return run


def products() -> Callable[[int], Any]:
    """The matrix products of all weights with 2,048 tokens, compiled one by one, and nothing else."""
    width, hidden, vocabulary = (GPT2_SMALL[name] for name in ("d_model", "d_mlp", "d_vocab"))
    rng, n_tokens = np.random.default_rng(0), 2048
    shapes = ((width, width), (width, hidden), (hidden, width), (width, vocabulary))
    left = {size: jax.numpy.asarray(rng.standard_normal((n_tokens, size), np.float32)) for size in (width, hidden)}
    weights = [jax.numpy.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]
    product = jax.jit(jax.numpy.matmul)

    def run(_: int) -> None:
        for weight, count in zip(weights[:3], (4, 1, 1), strict=True):
            for _ in range(count * GPT2_SMALL["n_layers"]):
                jax.block_until_ready(product(left[len(weight)], weight))
        for start in range(0, n_tokens, 256):  # all logits at once would take memory, not products
            jax.block_until_ready(product(left[width][start : start + 256], weights[3]))

    return run


def beside(value: float | None, bar: float | None) -> str:
    """Returns a figure with its bar, ``"0.71 (<= 0.8)"``."""
    return "" if value is None else f"{value:.2f}" + ("" if bar is None else f" (<= {bar:g})")


def met(pairs: dict[str, tuple[float | None, float | None]], compilations: int = 0) -> str:
    """Returns ``"yes"``, or which figures are over their bars."""
    missed = [name for name, (value, bar) in pairs.items() if value is not None and bar is not None and value > bar]
    missed += ["compilations"] if compilations else []
    return "NO: " + ", ".join(missed) if missed else "yes"


def ratio(one: Timing, other: Timing | None) -> float | None:
    return None if other is None else one.median / other.median


def time(arguments: argparse.Namespace) -> list[Row]:
    """Seconds of a forward pass with the loss at each shape, and ratios to what stands beside it."""
    counter, model, peer, rows = CompilationCounter(), build(), theirs(), []
    bare = products()
    before = model.replace(cfg=model.cfg.replace(attention_path="materialised"))
    for batch, length in SHAPES:
        tokens, many = prompts(batch, length), (batch, length) == SHAPES[-1]
        tasks: dict[str, Callable[[int], Any]] = {
            "loss": lambda _, tokens=tokens: loss(model, tokens),
            "logits": lambda _, tokens=tokens: jax.block_until_ready(model(tokens)),
        }
        tasks["products"] = bare
        if many:
            tasks["before"] = lambda _, tokens=tokens: float(before(tokens, return_type="both").loss)
        if peer is not None:
            tasks["transformers"] = lambda _, tokens=tokens: peer(tokens)
        found = interleaved(tasks, arguments.repeats, warmup=1, counter=counter)
        mine, compiled = found["loss"], sum(timing.compilations for timing in found.values())
        pairs = {
            "/ transformers": (ratio(mine, found.get("transformers")), None if many else THEIRS_BAR),
            "/ before": (ratio(mine, found.get("before")), BEFORE_BAR),
            "/ logits": (ratio(mine, found["logits"]), LOSS_BAR),
        }
        rows.append(
            {
                "prompts": f"{batch} x {length}",
                "loss s": round(mine.median, 3),
                **{name: beside(*pair) for name, pair in pairs.items()},
                "/ products": beside(ratio(mine, found["products"]), None),
                "compilations": compiled,
                "met": met(pairs, compiled),
            }
        )
    return rows


def gradients(arguments: argparse.Namespace) -> list[Row]:
    """Seconds of the loss's gradients, in forward passes with the loss."""
    counter, model, tokens = CompilationCounter(), build(), prompts(*SHAPES[0])
    tasks: dict[str, Callable[[int], Any]] = {"loss": lambda _: loss(model, tokens)}
    tasks |= {name: (lambda _, run=run: run(model, tokens)) for name, (run, _) in GRADIENTS.items()}
    found, rows = interleaved(tasks, min(arguments.repeats, 2), warmup=1, counter=counter), []
    for name, (_, bar) in GRADIENTS.items():
        pairs = {"/ loss": (ratio(found[name], found["loss"]), bar)}
        rows.append(
            {
                "gradients": name,
                "seconds": round(found[name].median, 3),
                "/ loss": beside(*pairs["/ loss"]),
                "compilations": found[name].compilations,
                "met": met(pairs, found[name].compilations),
            }
        )
    return rows


def resident() -> int:
    """Bytes of this process in memory, after what is free was handed back."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def child(task: str) -> None:
    """Runs one task of ``MEMORY`` and prints its peak over the model's bytes."""
    run, length, _ = MEMORY[task]
    model = build(init_weights=False, **({"attention_path": "materialised"} if "materialised" in task else {}))
    random = np.random.default_rng(0)

    def drawn(x: jax.Array) -> jax.Array:  # jax draws weights with more memory than the run takes
        return jax.numpy.array(0.02 * random.standard_normal(x.shape, np.float32) if x.ndim > 1 else np.ones_like(x))

    model = model.replace(params=jax.block_until_ready(jax.tree.map(drawn, model.params)))
    tokens, start = prompts(1, length), resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    run(model, tokens)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    print(json.dumps(1024 * int(peak.split()[1]) - start))


def memory(arguments: argparse.Namespace) -> list[Row]:
    """Peak memory of each task over the parameters, in a process of its own; one that fails is a row all the same."""
    rows = []
    for task, (_, length, bar) in MEMORY.items():
        command = [sys.executable, __file__, "--child", task, "--threads", str(arguments.threads)]
        row = {"task": task, "prompts": f"1 x {length}", "peak over parameters GB": "", "met": ""}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.timeout)
            peak = json.loads(done.stdout.splitlines()[-1]) / 1e9
            limit = None if bar is None else bar / 1e9
            row |= {"peak over parameters GB": beside(peak, limit), "met": met({"peak": (peak, limit)})}
        except subprocess.TimeoutExpired:
            row["met"] = f"NO: not done after {arguments.timeout} s"
        except (IndexError, json.JSONDecodeError):
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            row["met"] = f"NO: {last[:100]}"
        rows.append(row)
    return rows


PARTS = {"time": time, "gradients": gradients, "memory": memory}


def main() -> int:
    """Prints the tables; the exit status says whether every bar was met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--repeats", type=int, default=3, help="timed turns")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--timeout", type=float, default=300, help="most seconds of one task of memory")
    parser.add_argument("--child", choices=tuple(MEMORY), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    if arguments.child is not None:
        child(arguments.child)
        return 0
    results: dict[str, Any] = {"machine": machine("jax", "flax")}
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items()))
    for part in arguments.parts:
        results[part] = PARTS[part](arguments)
        print(f"\n{part}")
        print_table(results[part])
        sys.stdout.flush()
        write_json(arguments.json, results)
    return int(any(row["met"] != "yes" for part in arguments.parts for row in results[part]))


if __name__ == "__main__":
    raise SystemExit(main())
