"""The residual stream of gpt2-small's shape taken apart: tljax against TransformerLens 3.9, same random weights.

Needs the ``[bench]`` extra (``transformer-lens<4`` and torch)::

    python benchmarks/decomposition.py --json results.json

Both sides start from a full cache, made before. Turns alternate between the two, figures are medians, everything is
waited for, and compilations during the timed turns are counted: there must be none. TransformerLens stores the heads'
results in its cache the first time; "kept" is what a later time costs, while tljax computes them each time.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from _timing import CompilationCounter, interleaved, machine, print_table, use_threads, write_json
from transformerlens import build_models

BAR = 1.0
Method = Callable[[Any, Any], Any]


def heads_and_mlps(cache: Any, tokens: Any) -> Any:
    """The whole stream as heads, MLPs, embeddings and biases."""
    return cache.get_full_resid_decomposition(expand_neurons=False)


def heads_normed(cache: Any, tokens: Any) -> Any:
    """Every head through the final norm."""
    return cache.stack_head_results(apply_ln=True)


def neurons_projected(cache: Any, tokens: Any) -> Any:
    """Every head and neuron onto one direction, through the final norm."""
    direction = cache.model.W_U[:, 11]
    return cache.get_full_resid_decomposition(apply_ln=True, project_output_onto=direction)


def attribution(cache: Any, tokens: Any) -> Any:
    """The logits of the next tokens, attributed to heads and MLPs."""
    stack = cache.get_full_resid_decomposition(expand_neurons=False)
    return cache.logit_attrs(stack, tokens)


MEASURED: dict[str, Method] = {
    "heads and MLPs": heads_and_mlps,
    "heads, final norm": heads_normed,
    "heads and neurons onto a direction": neurons_projected,
    "logit attribution of heads and MLPs": attribution,
}


def without_results(cache: Any) -> Any:
    """A TransformerLens cache as it was before its heads were computed, which it stores in itself."""
    for name in [name for name in cache.cache_dict if name.endswith("hook_result")]:
        del cache.cache_dict[name]
    return cache


def measure(name: str, mine: Any, theirs: Any, tokens: np.ndarray, repeats: int, counter: Any) -> dict[str, Any]:
    """Times one measurement and returns its row."""
    method, peer_tokens = MEASURED[name], torch.from_numpy(tokens).long()
    kept = type(theirs)(dict(theirs.cache_dict), theirs.model)
    tasks = {
        "ours": lambda _: jax.block_until_ready(method(mine, tokens)),
        "theirs": lambda _: method(without_results(theirs), peer_tokens),
        "kept": lambda _: method(kept, peer_tokens),
    }
    ours, expected = np.asarray(tasks["ours"](0)), tasks["theirs"](0).numpy()
    difference = float(np.abs(ours - expected).max() / np.abs(expected).max())
    if ours.shape != expected.shape or difference > 1e-4:
        raise SystemExit(f"{name}: {ours.shape} and {expected.shape} differ by {difference:.1e}: nothing to compare")
    timings = interleaved(tasks, repeats, warmup=1, counter=counter)
    ratio = timings["ours"].median / timings["theirs"].median
    return {
        "measurement": name,
        "tljax ms": round(1e3 * timings["ours"].median, 1),
        "TransformerLens ms": round(1e3 * timings["theirs"].median, 1),
        "ratio": round(ratio, 3),
        "kept ms": round(1e3 * timings["kept"].median, 1),
        "ratio to kept": round(timings["ours"].median / timings["kept"].median, 3),
        "ratio of fastest": round(timings["ours"].fastest / timings["theirs"].fastest, 3),
        "bar": f"<= {BAR:g}",
        "met": "yes" if ratio <= BAR else "NO",
        "compilations": timings["ours"].compilations,
        "relative difference": f"{difference:.0e}",
    }


def main() -> int:
    """Prints the table; the exit status says whether every bar was met without compiling."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="*", default=list(MEASURED), choices=list(MEASURED), metavar="NAME")
    parser.add_argument("--batch", type=int, default=4, help="prompts")
    parser.add_argument("--pos", type=int, default=64, help="tokens of each")
    parser.add_argument("--repeats", type=int, default=7, help="timed turns")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of both sides")
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    info = machine("jax", "torch", "transformer-lens")
    counter, (model, peer) = CompilationCounter(), build_models()
    shape = (arguments.batch, arguments.pos)
    tokens = np.random.default_rng(0).integers(0, model.cfg.d_vocab, shape).astype(np.int32)
    mine = jax.block_until_ready(model.run_with_cache(tokens)[1]).with_model(model)
    theirs = peer.run_with_cache(torch.from_numpy(tokens).long())[1]
    rows = []
    for name in arguments.only:
        rows.append(measure(name, mine, theirs, tokens, arguments.repeats, counter))
        print(f"{name}: {rows[-1]['ratio']}", file=sys.stderr, flush=True)
    print(", ".join(f"{key} {value}" for key, value in info.items()), f"{shape[0]}x{shape[1]} tokens", sep=", ")
    print_table(rows)
    write_json(arguments.json, {"machine": info, "tokens": shape, "rows": rows})
    return int(any(row["met"] == "NO" or row["compilations"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
