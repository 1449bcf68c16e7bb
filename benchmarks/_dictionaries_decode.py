"""What a spliced dictionary costs a token of generation, at gpt2-small's shape."""

import argparse
import time
from typing import Any

import numpy as np
from _timing import GPT2_SMALL, CompilationCounter, interleaved, print_table

import tljax
from tljax.dictionaries import Dictionary, DictionaryConfig

D_SAE, POINT, N_PROMPT, N_NEW, SEVERAL = 24576, "blocks.6.hook_resid_pre", 10, 40, 16
BAR = 0.05


def a_dictionary(d_sae: int = D_SAE) -> Dictionary:
    """A random dictionary of the width of gpt2-small's published ones."""
    rng, width = np.random.default_rng(0), GPT2_SMALL["d_model"]
    params = {
        "W_enc": rng.standard_normal((width, d_sae), np.float32) / 28,
        "b_enc": np.full(d_sae, -1.0, np.float32),
        "W_dec": rng.standard_normal((d_sae, width), np.float32) / 28,
        "b_dec": np.zeros(width, np.float32),
    }
    return Dictionary(params, DictionaryConfig(d_in=width, d_sae=d_sae))


def flops(model: Any, d_sae: int) -> tuple[float, float]:
    """FLOPs of one token: of the model's matrices, and of the dictionary's."""
    cfg = model.cfg
    return 2.0 * (cfg.n_params + cfg.d_model * cfg.d_vocab_out), 4.0 * cfg.d_model * d_sae


def a_step(model: Any, prompts: np.ndarray) -> float:
    """Seconds of one decoding step: of ``N_NEW`` new tokens, less the time of the first."""
    seconds = []
    for n_new in (1, N_NEW):
        start = time.perf_counter()
        model.generate(prompts, n_new, do_sample=False, stop_at_eos=False, prepend_bos=False, verbose=False)
        seconds.append(time.perf_counter() - start)
    return (seconds[1] - seconds[0]) / (N_NEW - 1)


def decode(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Times greedy generation with and without a dictionary, in turns; figures are those of the fastest turns."""
    plain = tljax.HookedTransformer(tljax.HookedTransformerConfig(**GPT2_SMALL, seed=0, default_prepend_bos=False))
    one = a_dictionary()
    kept = plain.with_dictionaries({POINT: one})
    models = {
        "plain": plain,
        "error dropped": plain.with_dictionaries({POINT: one}, error="drop"),
        "error kept": kept,
        "error kept, a feature ablated": kept.with_hooks([(f"{POINT}.hook_sae_acts_post", tljax.Zero(feature=7))]),
    }
    own, more = flops(plain, D_SAE)
    rng, counter, rows = np.random.default_rng(0), CompilationCounter(), []
    for batch in (1, SEVERAL):
        prompts = rng.integers(0, 50257, (batch, N_PROMPT))
        steps: dict[str, list[float]] = {name: [] for name in models}
        tasks = {
            name: lambda _, model=model, taken=steps[name], prompts=prompts: taken.append(a_step(model, prompts))
            for name, model in models.items()
        }
        timings = interleaved(tasks, arguments.repeats, 1, counter)
        for name, taken in steps.items():
            bar = 1 if name == "plain" else 1 + more / own + BAR
            ratio = min(taken[1:]) / min(steps["plain"][1:])
            rows.append({
                "batch": batch, "model": name, "ms a token": round(1e3 * min(taken[1:]), 2),
                "over plain": round(ratio, 3), "bar": round(bar, 3), "met": "yes" if ratio <= bar else "NO",
                "compilations": timings[name].compilations,
            })  # fmt: skip
    print(f"decoding, {D_SAE} features at {POINT}: {own / 1e6:.0f} MFLOP a token, {more / 1e6:.0f} of the dictionary")
    print_table(rows)
    return rows
