"""tljax against TransformerLens 3.9 at gpt2-small's shape, same random weights, both in this process.

Needs the ``[bench]`` extra (``transformer-lens<4`` and torch)::

    python benchmarks/transformerlens.py --json results.json

Turns alternate between the two, figures are medians, everything is waited for (logits, every cached array),
and compilations during the timed turns are counted: there must be none.
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
from _timing import GPT2_SMALL, CompilationCounter, interleaved, machine, print_table, use_threads, write_json
from transformer_lens import HookedTransformer as PeerTransformer
from transformer_lens import HookedTransformerConfig as PeerConfig

import tljax

SMALL, LARGE = (1, 10), (8, 256)

# Measurement: (shape, bar on tljax time / TransformerLens time, or None where there is no bar)
BARS = {
    "forward 1x10": None,
    "forward 8x256": None,
    "full cache 1x10": 0.4,
    "full cache 8x256": 0.9,
    "hooked loop 1x10, fresh closures": 0.4,
    "hooked loop 1x10, interventions": 0.4,
}

Task = Callable[[int], Any]


def build_models() -> tuple[Any, Any]:
    """Builds both models on the same random weights."""
    peer = PeerTransformer(PeerConfig(**GPT2_SMALL, device="cpu", seed=0)).eval()
    tree: dict[str, Any] = {"blocks": tuple({} for _ in range(GPT2_SMALL["n_layers"]))}
    for name, value in peer.state_dict().items():
        *path, leaf = name.split(".")
        if leaf in ("mask", "IGNORE"):
            continue
        value = value.swapaxes(0, 1) if leaf in ("W_Q", "W_K", "W_V") else value
        node: Any = tree
        for part in path:
            node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
        node[leaf] = jax.device_put(np.ascontiguousarray(value.numpy()))
    return tljax.HookedTransformer(tljax.HookedTransformerConfig(**GPT2_SMALL), params=tree), peer


def tokens_of(shape: tuple[int, int]) -> np.ndarray:
    """Returns random token ids of a shape."""
    return np.random.default_rng(0).integers(0, GPT2_SMALL["d_vocab"], shape).astype(np.int32)


def wait(outputs: Any) -> Any:
    """Blocks until every array, cached ones included, is computed."""
    return jax.block_until_ready(outputs)


def forward_tasks(model: Any, peer: Any, shape: tuple[int, int]) -> tuple[Task, Task]:
    tokens = tokens_of(shape)
    peer_tokens = torch.from_numpy(tokens).long()
    return lambda _: wait(model(tokens)), lambda _: peer(peer_tokens)


def cache_tasks(model: Any, peer: Any, shape: tuple[int, int]) -> tuple[Task, Task]:
    tokens = tokens_of(shape)
    peer_tokens = torch.from_numpy(tokens).long()

    def ours(_: int) -> Any:
        logits, cache = model.run_with_cache(tokens)
        return wait((logits, dict(cache)))

    return ours, lambda _: peer.run_with_cache(peer_tokens)


def site(number: int) -> tuple[int, int]:
    """Layer and position patched in one turn: they change every turn."""
    return number * 5 % GPT2_SMALL["n_layers"], number * 7 % SMALL[1]


def hook_tasks(model: Any, peer: Any, compiled: bool) -> tuple[Task, Task]:
    """One patch of ``resid_post`` at one position, as a loop of patching experiments does it."""
    tokens = tokens_of(SMALL)
    peer_tokens = torch.from_numpy(tokens).long()
    donor = np.random.default_rng(1).normal(size=(GPT2_SMALL["n_layers"], SMALL[1], GPT2_SMALL["d_model"]))
    donor = donor.astype(np.float32)
    peer_donor = torch.from_numpy(donor)

    def ours(number: int) -> Any:
        layer, pos = site(number)

        def patch(activation: jax.Array, hook: Any) -> jax.Array:
            return activation.at[:, pos].set(donor[layer, pos])

        function = tljax.Replace(donor[layer, pos], pos=pos) if compiled else patch
        return wait(model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", function)]))

    def theirs(number: int) -> Any:
        layer, pos = site(number)

        def patch(activation: torch.Tensor, hook: Any) -> torch.Tensor:
            activation[:, pos] = peer_donor[layer, pos]
            return activation

        return peer.run_with_hooks(peer_tokens, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", patch)])

    return ours, theirs


def tasks_of(name: str, model: Any, peer: Any) -> tuple[Task, Task]:
    """Returns the pair of functions a measurement times."""
    if name.startswith("hooked"):
        return hook_tasks(model, peer, compiled="interventions" in name)
    make = forward_tasks if name.startswith("forward") else cache_tasks
    return make(model, peer, SMALL if name.endswith("1x10") else LARGE)


def check_agreement(ours: Any, theirs: Any) -> float:
    """Largest difference between the two sides' logits, so that the timed work is known to be the same."""
    ours, theirs = (output[0] if isinstance(output, tuple) else output for output in (ours, theirs))
    difference = float(np.abs(np.asarray(ours) - theirs.numpy()).max())
    if difference > 1e-3:
        raise SystemExit(f"the two models disagree by {difference:.1e}: the comparison would mean nothing")
    return difference


def measure(name: str, model: Any, peer: Any, repeats: int, counter: CompilationCounter) -> dict[str, Any]:
    """Times one measurement and returns its row."""
    ours, theirs = tasks_of(name, model, peer)
    difference = max(check_agreement(ours(n), theirs(n)) for n in (0, 1))
    timings = interleaved({"ours": ours, "theirs": theirs}, repeats, counter=counter)
    mine, peers = timings["ours"], timings["theirs"]
    ratio, bar = mine.median / peers.median, BARS[name]
    return {
        "measurement": name,
        "tljax ms": round(1e3 * mine.median, 1),
        "TransformerLens ms": round(1e3 * peers.median, 1),
        "ratio": round(ratio, 3),
        "ratio of fastest": round(mine.fastest / peers.fastest, 3),
        "bar": "" if bar is None else f"<= {bar:g}",
        "met": "" if bar is None else "yes" if ratio <= bar else "NO",
        "compilations": mine.compilations,
        "max difference": f"{difference:.0e}",
    }


def main() -> int:
    """Prints the table; the exit status says whether every bar was met without compiling."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="*", default=list(BARS), choices=list(BARS), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=24, help="timed turns of the small shape")
    parser.add_argument("--large-repeats", type=int, default=5, help="timed turns of the large shape")
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
    rows = []
    for name in arguments.only:
        repeats = arguments.large_repeats if name.endswith("8x256") else arguments.repeats
        rows.append(measure(name, model, peer, repeats, counter))
        print(f"{name}: {rows[-1]['ratio']}", file=sys.stderr, flush=True)
    print(", ".join(f"{key} {value}" for key, value in info.items()))
    print_table(rows)
    write_json(arguments.json, {"machine": info, "shape": GPT2_SMALL, "rows": rows})
    return int(any(row["met"] == "NO" or row["compilations"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
