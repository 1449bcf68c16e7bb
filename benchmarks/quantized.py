"""Weights in eight and four bits: error of the logits per family, bytes really held, and time against floats.

    python benchmarks/quantized.py families [--only llama gemma2 ...] [--json FILE]
    python benchmarks/quantized.py size [--json FILE]

``families`` makes a tiny random checkpoint of each family (those of the tests; needs torch and transformers), and
prints the root mean square of what rounding changes in the logits, as a share of that of the logits (less their mean).
Their matrices have some 40 inputs, which share a scale. ``size`` does the same with the bundled trained model, and
measures memory and time at the shape of gpt2-small: bytes of the live buffers, and times as ratios of the float
model's, the best of several rounds in which all take turns.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import HookedTransformer, HookedTransformerConfig

FORMS: dict[str, tuple[str, int | None]] = {"int8": ("int8", None), "int4": ("int4", None)}
FINER: dict[str, tuple[str, int | None]] = {"int8, groups of 16": ("int8", 16), "int4, groups of 16": ("int4", 16)}
GPT2 = {"d_model": 768, "n_layers": 12, "n_heads": 12, "n_ctx": 1024, "d_vocab": 50257, "act_fn": "gelu_new"}


def error(model: HookedTransformer, tokens: Any, bits: str, group_size: int | None) -> float:
    """Share of the logits that rounding changes.

    The rounded floats run, so that one program serves all forms; packed weights give the same (tests/model).
    """
    rounded = model.quantize(bits, group_size=group_size).dequantize()
    exact, got = (np.asarray(one(tokens), np.float64) for one in (model, rounded))
    return float(np.sqrt(((got - exact) ** 2).mean()) / np.sqrt(((exact - exact.mean(-1, keepdims=True)) ** 2).mean()))


def families(only: list[str]) -> dict[str, dict[str, float]]:
    """Errors of one small model of each family."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import quick_compiling  # noqa: F401
    from hf_models import VARIANTS, make_hf_model

    simplest = {kind: name for name, (kind, more) in sorted(VARIANTS.items(), key=lambda item: -len(item[1][1]))}
    tokens, found = np.random.default_rng(0).integers(2, 40, (2, 18)).astype(np.int32), {}
    for kind in only or sorted(simplest):
        with tempfile.TemporaryDirectory() as directory:
            make_hf_model(simplest[kind], Path(directory), spread=0.15)
            model = HookedTransformer.from_pretrained_no_processing(directory)
        found[kind] = {name: error(model, tokens, *form) for name, form in FORMS.items()}
        print(f"{kind:20s} {'  '.join(f'{one:7.4f}' for one in found[kind].values())}", flush=True)
        if not len(found) % 10:
            jax.clear_caches()
    for name in FORMS:
        known = [one[name] for one in found.values()]
        print(f"{name}: median {np.median(known):.4f}, largest {max(known):.4f} of {len(known)} families")
    return found


def times(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Best time of each in seconds; they take turns."""
    best = dict.fromkeys(runs, float("inf"))
    for number in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            best[name] = min(best[name], time.perf_counter() - began) if number else best[name]
    return best


def size() -> dict[str, Any]:
    """Errors of the bundled model, then bytes and times at the shape of gpt2-small."""
    trained, found = HookedTransformer.from_pretrained_no_processing("tljax-tiny"), dict[str, Any]()
    tokens = np.random.default_rng(0).integers(0, trained.cfg.d_vocab, (4, 32)).astype(np.int32)
    found["trained"] = {name: error(trained, tokens, *form) for name, form in (FORMS | FINER).items()}
    print("bundled trained model:", found["trained"])
    models = {"float32": HookedTransformer(HookedTransformerConfig(**GPT2))}
    for name in ("int8", "int4"):
        models[name] = models["float32"].quantize(name)
    for name, model in models.items():
        gc.collect()
        arrays = {id(leaf): leaf for leaf in jax.tree.leaves(model.params["blocks"])}
        held = sum(leaf.on_device_size_in_bytes() for leaf in arrays.values())
        found[f"bytes of blocks, {name}"] = held
        assert held == sum(leaf.nbytes for leaf in arrays.values())
        print(f"{name}: {held:,} bytes in the blocks, {model.nbytes:,} in all")
    rng = np.random.default_rng(1)
    for batch, length in ((1, 16), (1, 256), (8, 256)):
        ids = jnp.asarray(rng.integers(0, 50257, (batch, length)), jnp.int32)
        best = times({n: lambda m=m, ids=ids: m(ids, stop_at_layer=12) for n, m in models.items()}, 3)
        found[f"forward {batch}x{length}"] = {name: one / best["float32"] for name, one in best.items()}
        print(
            f"forward {batch}×{length}, blocks alone:", {n: round(one / best["float32"], 2) for n, one in best.items()}
        )
    options: Any = {"max_new_tokens": 16, "do_sample": False, "verbose": False, "stop_at_eos": False}
    best = times({n: lambda m=m: m.generate(ids[:1, :16], **options) for n, m in models.items()}, 2)
    found["generation"] = {name: one / best["float32"] for name, one in best.items()}
    print("16 tokens of generation:", {name: round(one, 2) for name, one in found["generation"].items()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("families", "size"))
    parser.add_argument("--only", nargs="*", default=[], help="families, by transformers' model_type")
    parser.add_argument("--json", help="file to write the figures to")
    options = parser.parse_args()
    found = families(options.only) if options.what == "families" else size()
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
