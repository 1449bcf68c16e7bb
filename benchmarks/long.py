"""Long prompts at gpt2-small's shape with rotary positions: time beside transformers (sdpa), and peak memory.

::

    python benchmarks/long.py --json long.json
    python benchmarks/long.py --parts memory

The same 2,048 tokens as 1, 2, 4 and 8 prompts. transformers runs a GPT-NeoX of the same sizes; without transformers and
torch its columns stay empty. ``before``: ``attention_path="materialised"``. Memory is measured in a process
of its own for each task: the peak (``VmHWM``) over what is resident once the model is made, compilation included.
"""

import argparse
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
MEMORY = {"loss": (8192, 1.5e9), "loss, materialised": (2048, None), "gradients, remat": (2048, 2e9)}
"""Task → length of its prompt, and most bytes over the parameters."""
Row = dict[str, Any]


def build(**changes: Any) -> Any:
    sizes = GPT2_SMALL | {"n_ctx": 8192, "positional_embedding_type": "rotary", "seed": 0} | changes
    return tljax.HookedTransformer(tljax.HookedTransformerConfig(**sizes))


def prompts(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, GPT2_SMALL["d_vocab"], (batch, length)).astype(np.int32)


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


def gradients(model: Any, tokens: np.ndarray) -> None:
    found = model.run_with_grads(tokens, Loss(tokens), "hook_embed", remat=True)
    jax.block_until_ready((found.value, dict(found.grads)))


def ratio(one: Timing, other: Timing | None) -> float | None:
    return None if other is None else round(one.median / other.median, 2)


def time(arguments: argparse.Namespace) -> list[Row]:
    """Seconds of a forward pass with the loss at each shape, and ratios to what stands beside it."""
    counter, model, peer, rows = CompilationCounter(), build(), theirs(), []
    before = model.replace(cfg=model.cfg.replace(attention_path="materialised"))
    for batch, length in SHAPES:
        tokens = prompts(batch, length)
        tasks: dict[str, Callable[[int], Any]] = {
            "loss": lambda _, tokens=tokens: float(model(tokens, return_type="loss")),
            "logits": lambda _, tokens=tokens: jax.block_until_ready(model(tokens)),
            "before": lambda _, tokens=tokens: float(before(tokens, return_type="both").loss),
        }
        if peer is not None:
            tasks["transformers"] = lambda _, tokens=tokens: peer(tokens)
        if batch == 1:
            tasks["gradients"] = lambda _, tokens=tokens: gradients(model, tokens)
        found = interleaved(tasks, arguments.repeats, warmup=1, counter=counter)
        loss, slow = found["loss"], batch == SHAPES[-1][0]
        ratios = {
            "/ transformers": (ratio(loss, found.get("transformers")), None if slow else THEIRS_BAR),
            "/ before": (ratio(loss, found["before"]), BEFORE_BAR if slow else None),
            "/ logits": (ratio(loss, found["logits"]), LOSS_BAR),
            "gradients /": (None, None),
        }
        if "gradients" in found:
            ratios["gradients /"] = (ratio(found["gradients"], loss), GRADIENTS_BAR)
        missed = [name for name, (got, bar) in ratios.items() if bar is not None and got is not None and got > bar]
        compiled = sum(timing.compilations for timing in found.values())
        rows.append(
            {
                "prompts": f"{batch} x {length}",
                "loss s": round(loss.median, 3),
                **{name: "" if got is None else got for name, (got, _) in ratios.items()},
                "compilations": compiled,
                "met": "NO: " + ", ".join(missed) if missed or compiled else "yes",
            }
        )
    return rows


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def child(task: str) -> None:
    """Runs one task of ``MEMORY`` and prints its peak over the model's bytes."""
    path = {"attention_path": "materialised"} if "materialised" in task else {}
    model = build(init_weights=False, **path)  # drawing weights would take more memory than the run
    jax.block_until_ready(model.params)
    tokens, start = prompts(1, MEMORY[task][0]), resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    if task.startswith("gradients"):
        gradients(model, tokens)
    else:
        float(model(tokens, return_type="loss"))
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    print(json.dumps(1024 * int(peak.split()[1]) - start))


def memory(arguments: argparse.Namespace) -> list[Row]:
    """Peak memory of each task over the parameters, in a process of its own."""
    rows = []
    for task, (length, bar) in MEMORY.items():
        command = [sys.executable, __file__, "--child", task, "--threads", str(arguments.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak = json.loads(done.stdout.splitlines()[-1])
        rows.append(
            {
                "task": task,
                "prompts": f"1 x {length}",
                "peak over parameters GB": round(peak / 1e9, 2),
                "bar GB": "" if bar is None else f"<= {bar / 1e9:g}",
                "met": "yes" if bar is None or peak <= bar else "NO",
            }
        )
    return rows


def main() -> int:
    """Prints the tables; the exit status says whether every bar was met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=("time", "memory"), default=("time", "memory"))
    parser.add_argument("--repeats", type=int, default=5, help="timed turns")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--child", choices=tuple(MEMORY), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    if arguments.child is not None:
        child(arguments.child)
        return 0
    results: dict[str, Any] = {"machine": machine("jax", "flax")}
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items()))
    for part in arguments.parts:
        results[part] = {"time": time, "memory": memory}[part](arguments)
        print_table(results[part])
        print()
    write_json(arguments.json, results)
    return int(any(row["met"] != "yes" for part in arguments.parts for row in results[part]))


if __name__ == "__main__":
    raise SystemExit(main())
