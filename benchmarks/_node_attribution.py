"""Node attribution at gpt2-small's shape: every head, MLP and embedding at every position of eight pairs of 15 tokens.

``python _node_attribution.py`` answers with one line of JSON: seconds of a forward pass, of all nodes, and of the exact
effects of all heads (144 sites, all positions of each at once), the fastest of three.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from _timing import GPT2_SMALL

import tljax
from tljax.patching import LogitDiff, node_attribution, sweep


def fastest(task: Callable[[], Any], repeats: int = 3) -> float:
    """Seconds of the fastest of some runs, after one that compiles."""
    jax.block_until_ready(task())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(task())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def node_attribution_times(pairs: int = 8, length: int = 15, exact: bool = True) -> dict[str, float]:
    """Seconds of a forward pass, of node attribution, with AtP* and with RelP, and of exact effects of heads."""
    model = tljax.HookedTransformer(tljax.HookedTransformerConfig(**GPT2_SMALL, seed=0))
    rng, d_vocab = np.random.default_rng(0), GPT2_SMALL["d_vocab"]
    clean = rng.integers(0, d_vocab, (pairs, length)).astype(np.int32)
    corrupted = clean.copy()
    corrupted[:, 3:6] = rng.integers(0, d_vocab, (pairs, 3))
    metric = LogitDiff(*rng.integers(0, d_vocab, (2, pairs)))

    def nodes(**options: Any) -> list[jax.Array]:
        return [found.values for found in node_attribution(model, corrupted, clean, metric, **options).values()]

    seconds = {
        "forward": fastest(lambda: model(clean)),
        "nodes": fastest(nodes),
        "nodes, relp": fastest(lambda: nodes(rule="relp")),
        "nodes, atp*": fastest(lambda: nodes(rule="atp*"), 1),
    }
    if exact:
        heads = ("z", ("head",))
        seconds["heads exactly"] = fastest(
            lambda: sweep(model, corrupted, clean, metric, *heads, progress=False).values, 1
        )
    return seconds


if __name__ == "__main__":
    print(json.dumps(node_attribution_times()))
