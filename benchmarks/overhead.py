"""What tljax itself costs: dispatch per layer, caching per layer, and a plain Python hook against no hook.

::

    python benchmarks/overhead.py --json results.json

Time per layer is the difference between 24 and 12 layers of a model so narrow that arithmetic takes no time.
The same difference for a bare loop over a ``jax.jit`` of an equally narrow block stands beside it. It is taken
between the fastest turns: work this short is either undisturbed or measures the machine's other users.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _timing import GPT2_SMALL, CompilationCounter, interleaved, machine, print_table, use_threads, write_json

import tljax

NARROW = {"d_model": 8, "n_heads": 2, "d_head": 4, "d_mlp": 8, "n_ctx": 8, "d_vocab": 8, "act_fn": "gelu_new"}
FEW, MANY = 12, 24
BARS = {"forward": 0.1}
PYTHON_HOOK_BAR = 1.6


@jax.jit
def bare_block(params: dict[str, Any], resid: jax.Array) -> jax.Array:
    """A pre-norm attention and MLP block with the same parameters as tljax's, and nothing else."""

    def normalise(x: jax.Array, norm: dict[str, jax.Array]) -> jax.Array:
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * norm["w"] + norm["b"]

    attn, mlp = params["attn"], params["mlp"]
    x = normalise(resid, params["ln1"])
    q, k, v = (jnp.einsum("bpm,mhd->bphd", x, attn[f"W_{n}"]) + attn[f"b_{n}"] for n in "QKV")
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2.0
    pos = resid.shape[1]
    pattern = jax.nn.softmax(jnp.where(jnp.tri(pos, dtype=bool)[None, None], scores, -jnp.inf))
    z = jnp.einsum("bhqk,bkhd->bqhd", pattern, v)
    resid = resid + jnp.einsum("bphd,hdm->bpm", z, attn["W_O"]) + attn["b_O"]
    hidden = jax.nn.gelu(normalise(resid, params["ln2"]) @ mlp["W_in"] + mlp["b_in"])
    return resid + hidden @ mlp["W_out"] + mlp["b_out"]


def narrow_model(n_layers: int) -> Any:
    return tljax.HookedTransformer(tljax.HookedTransformerConfig(**NARROW, n_layers=n_layers, seed=0))


def narrow_tasks(n_layers: int) -> dict[str, Callable[[int], Any]]:
    """Forward, full cache, one intervention, one Python hook, and the bare loop, at one depth."""
    model = narrow_model(n_layers)
    tokens = np.array([[1, 2, 3, 4]], np.int32)
    start = jnp.ones((1, 4, NARROW["d_model"]))
    zero = tljax.Zero(pos=1)

    def bare(_: int) -> Any:
        resid = start
        for block in model.params["blocks"]:
            resid = bare_block(block, resid)
        return jax.block_until_ready(resid)

    def cached(_: int) -> Any:
        logits, cache = model.run_with_cache(tokens)
        return jax.block_until_ready((logits, dict(cache)))

    def hooked(function: Any) -> Any:
        hooks = [(f"blocks.{n_layers // 2}.hook_resid_post", function)]
        return jax.block_until_ready(model.run_with_hooks(tokens, fwd_hooks=hooks))

    return {
        "bare jax.jit loop": bare,
        "forward": lambda _: jax.block_until_ready(model(tokens)),
        "full cache": cached,
        "intervention": lambda _: hooked(zero),
        "Python hook": lambda _: hooked(lambda activation, hook: activation * 0.5),
    }


def per_layer(repeats: int, counter: CompilationCounter) -> list[dict[str, Any]]:
    """Milliseconds a layer of each task, from two depths timed in turns."""
    few, many = narrow_tasks(FEW), narrow_tasks(MANY)
    rows = []
    for name in few:
        timings = interleaved({"few": few[name], "many": many[name]}, repeats, counter=counter)
        shallow, deep = timings["few"], timings["many"]
        cost = 1e3 * (deep.fastest - shallow.fastest) / (MANY - FEW)
        bar = BARS.get(name)
        rows.append(
            {
                "measurement": f"{name}, a layer",
                "ms": round(cost, 4),
                "ms of medians": round(1e3 * (deep.median - shallow.median) / (MANY - FEW), 4),
                f"{FEW} layers ms": round(1e3 * shallow.median, 3),
                f"{MANY} layers ms": round(1e3 * deep.median, 3),
                "bar": "" if bar is None else f"<= {bar:g} ms",
                "met": "" if bar is None else "yes" if cost <= bar else "NO",
                "compilations": shallow.compilations + deep.compilations,
            }
        )
    return rows


def python_hook(repeats: int, counter: CompilationCounter) -> list[dict[str, Any]]:
    """A fresh Python closure on one block's output, at gpt2-small's shape, against no hook."""
    model = tljax.HookedTransformer(tljax.HookedTransformerConfig(**GPT2_SMALL, seed=0))
    tokens = np.arange(10, dtype=np.int32)[None]

    def hooked(place: str, number: int) -> Any:
        layer, pos = number * 5 % GPT2_SMALL["n_layers"], number * 7 % tokens.shape[1]
        hooks = [(f"blocks.{layer}.{place}", lambda activation, hook: activation.at[:, pos].multiply(0.5))]
        return jax.block_until_ready(model.run_with_hooks(tokens, fwd_hooks=hooks))

    tasks = {
        "no hook": lambda _: jax.block_until_ready(model(tokens)),
        "hook_resid_post": lambda number: hooked("hook_resid_post", number),
        "attn.hook_z": lambda number: hooked("attn.hook_z", number),
    }
    timings = interleaved(tasks, repeats, counter=counter)
    plain, rows = timings["no hook"], []
    for name, timing in timings.items():
        ratio = timing.median / plain.median
        rows.append(
            {
                "measurement": f"gpt2-small 1x10, {name}",
                "ms": round(1e3 * timing.median, 2),
                "ratio": round(ratio, 3),
                "ratio of fastest": round(timing.fastest / plain.fastest, 3),
                "bar": "" if name == "no hook" else f"<= {PYTHON_HOOK_BAR:g}",
                "met": "" if name == "no hook" else "yes" if ratio <= PYTHON_HOOK_BAR else "NO",
                "compilations": timing.compilations,
            }
        )
    return rows


def main() -> int:
    """Prints both tables; the exit status says whether every bar was met without compiling."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=200, help="timed turns of the narrow models")
    parser.add_argument("--gpt2-repeats", type=int, default=24, help="timed turns at gpt2-small's shape")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    counter, info = CompilationCounter(), machine("jax", "flax")
    layers = per_layer(arguments.repeats, counter)
    hooks = python_hook(arguments.gpt2_repeats, counter)
    print(", ".join(f"{key} {value}" for key, value in info.items()))
    print_table(layers)
    print()
    print_table(hooks)
    write_json(arguments.json, {"machine": info, "per_layer": layers, "python_hook": hooks})
    return int(any(row["met"] == "NO" or row["compilations"] for row in layers + hooks))


if __name__ == "__main__":
    raise SystemExit(main())
