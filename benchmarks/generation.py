"""Generation at gpt2-small's shape: tljax against transformers and TransformerLens 3.9, same random weights.

Needs the ``[bench]`` extra (``transformer-lens<4`` and torch)::

    python benchmarks/generation.py --json generation.json

Greedy, 50 new tokens after 10, batches of 1 and 16, with and without a steering vector added to the residual stream of
one layer at new tokens. Turns alternate, figures are medians, and compilations in the timed turns are counted.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _timing import GPT2_SMALL, CompilationCounter, interleaved, machine, print_table, use_threads, write_json
from transformer_lens import HookedTransformer as PeerTransformer
from transformer_lens import HookedTransformerConfig as PeerConfig

import tljax

N_PROMPT, N_NEW, LAYER = 10, 50, 6
POINT = f"blocks.{LAYER}.hook_resid_post"
BARS = {"transformers": 1.0, "TransformerLens 3.9": 3.0}
STEERING_BAR = 1.05

Task = Callable[[int], Any]


def build_models() -> tuple[Any, Any, Any]:
    """Builds the three models on the same random weights: tljax, transformers, TransformerLens."""
    torch.manual_seed(0)
    hugging_face = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    with tempfile.TemporaryDirectory() as directory:
        hugging_face.save_pretrained(directory)
        ours = tljax.HookedTransformer.from_pretrained_no_processing(directory, tokenizer=None)
    peer = PeerTransformer(PeerConfig(**GPT2_SMALL, device="cpu", seed=0)).eval()
    state = peer.state_dict()
    for name in state:
        *path, leaf = name.split(".")
        if leaf in ("mask", "IGNORE"):
            continue
        node: Any = ours.params
        for part in path:
            node = node[int(part)] if part.isdigit() else node[part]
        value = torch.from_numpy(np.array(node[leaf]))
        state[name] = value.swapaxes(0, 1) if leaf in ("W_Q", "W_K", "W_V") else value
    peer.load_state_dict(state)
    return ours, hugging_face, peer


def tasks_of(models: tuple[Any, Any, Any], batch: int, vector: np.ndarray) -> dict[str, Task]:
    """What is timed, by name; each returns the finished tokens ``[batch, pos]``."""
    ours, hugging_face, peer = models
    tokens = np.random.default_rng(0).integers(0, GPT2_SMALL["d_vocab"], (batch, N_PROMPT)).astype(np.int32)
    torch_tokens, torch_vector = torch.from_numpy(tokens).long(), torch.from_numpy(vector)

    def tljax_task(**options: Any) -> Task:
        return lambda _: np.asarray(
            ours.generate(tokens, N_NEW, do_sample=False, stop_at_eos=False, verbose=False, **options)
        )

    @torch.inference_mode()
    def hugging_face_task(_: int) -> Any:
        mask = torch.ones_like(torch_tokens)
        return hugging_face.generate(
            torch_tokens,
            attention_mask=mask,
            max_new_tokens=N_NEW,
            min_new_tokens=N_NEW,
            do_sample=False,
            pad_token_id=0,
        ).numpy()

    def peer_task(_: int) -> Any:
        return peer.generate(torch_tokens, N_NEW, do_sample=False, stop_at_eos=False, verbose=False).numpy()

    def peer_steered(_: int) -> Any:
        def steer(activation: torch.Tensor, hook: Any) -> torch.Tensor:
            return activation + torch_vector if activation.shape[1] == 1 else activation

        with peer.hooks(fwd_hooks=[(POINT, steer)]):
            return peer_task(0)

    return {
        "tljax": tljax_task(),
        "tljax, steered": tljax_task(fwd_hooks=[(POINT, tljax.Add(vector, pos="new"))]),
        "tljax, steered by a function": tljax_task(
            fwd_hooks=[(POINT, lambda activation, hook: activation + vector if activation.shape[1] == 1 else None)]
        ),
        "transformers": hugging_face_task,
        "TransformerLens 3.9": peer_task,
        "TransformerLens 3.9, steered": peer_steered,
    }


def measure(
    models: tuple[Any, Any, Any], batch: int, repeats: int, counter: CompilationCounter
) -> list[dict[str, Any]]:
    """Times one batch size and returns its rows."""
    vector = np.random.default_rng(1).normal(size=GPT2_SMALL["d_model"]).astype(np.float32)
    tasks = tasks_of(models, batch, vector)
    compiled, start = counter.count, time.perf_counter()
    plain = tasks["tljax"](0)
    first = time.perf_counter() - start
    print(f"batch {batch}: first generation {first:.1f} s, {counter.count - compiled} programs", flush=True)
    references = {"transformers": plain, "TransformerLens 3.9": plain}
    steered = tasks["tljax, steered"](0)
    references |= dict.fromkeys(("tljax, steered by a function", "TransformerLens 3.9, steered"), steered)
    agree = {name: float((tasks[name](0) == expected).mean()) for name, expected in references.items()}
    timings = interleaved(tasks, repeats, warmup=1, counter=counter)
    base = timings["tljax"].median
    rows = []
    for name, timing in timings.items():
        ratio = timing.median / base
        bar = BARS.get(name)
        steering = name == "tljax, steered"
        met = "" if bar is None and not steering else ratio <= STEERING_BAR if steering else ratio >= (bar or 0)
        rows.append({
            "batch": batch,
            "generation": name,
            "tokens/s": round(batch * N_NEW / timing.median, 1),
            "times tljax": round(ratio, 2),
            "bar": f"<= {STEERING_BAR}" if steering else "" if bar is None else f">= {bar}",
            "met": {True: "yes", False: "NO"}.get(met, ""),
            "same tokens": "" if name not in agree else f"{agree[name]:.1%}",
            "compilations": timing.compilations,
        })  # fmt: skip
    return rows


def count_programs(model: Any, counter: CompilationCounter) -> dict[str, int]:
    """Programs that later generations compile, by what is new about them."""

    def run(n_prompt: int, n_new: int, **options: Any) -> int:
        before = counter.count
        tokens = np.random.default_rng(n_prompt).integers(0, GPT2_SMALL["d_vocab"], (1, n_prompt))
        model.generate(tokens, n_new, stop_at_eos=False, verbose=False, **options)
        return counter.count - before

    run(10, 50, seed=0)
    return {
        "80 tokens after 50": run(10, 80, seed=0),
        "a prompt of 12 tokens": run(12, 60, seed=0),
        "another temperature": run(10, 50, seed=1, temperature=0.5),
    }


def main() -> int:
    """Prints the table; the exit status says whether every bar was met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=3, help="timed turns of each contestant")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of all contestants")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    counter, models = CompilationCounter(), build_models()
    rows = [row for batch in arguments.batches for row in measure(models, batch, arguments.repeats, counter)]
    print_table(rows)
    programs = count_programs(models[0], counter)
    print("programs compiled by a later generation:", programs)
    facts = machine("jax", "torch", "transformers", "transformer-lens")
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    write_json(arguments.json, {"machine": facts, "rows": rows, "programs": programs})
    return int(any(row["met"] == "NO" or row["compilations"] for row in rows) or any(programs.values()))


if __name__ == "__main__":
    sys.exit(main())
