"""Errors of logits and gradients on a device against float64, which a process of its own computes on the host's CPU."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

import tljax
from tljax.patching import LogitDiff

BARS = {"float32": 2e-4, "bfloat16": 5e-2}
"""Most that an error may be, of the largest value."""
POINT = ("resid_post", 0)


def weights_of(cfg: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights drawn by numpy, equal on every machine, and exact in bfloat16, so that all dtypes share them."""
    rng, drawn = np.random.default_rng(seed), {}
    for path, shape in tljax.checkpoints.layout.parameter_shapes(cfg).items():
        name = path.rpartition(".")[2]
        values = rng.standard_normal(shape, np.float32) * (0.02 if name.startswith("W_") else 0.1)
        values = values + 1 if name == "w" else values
        drawn[path] = values.astype(jax.numpy.bfloat16).astype(np.float32)
    return drawn


def model_in(cfg: Any, dtype: str) -> Any:
    """A model of these weights in a dtype."""
    stored = {path: jax.numpy.asarray(value, dtype) for path, value in weights_of(cfg).items()}
    return tljax.HookedTransformer(cfg.replace(dtype=dtype), params=tljax.checkpoints.layout.unflatten(stored))


def computed(model: Any, tokens: np.ndarray, pattern: bool) -> dict[str, np.ndarray]:
    """Logits and a gradient; with ``pattern`` the attention's matrix is named, so that it is made."""
    names = [("pattern", 0)] if pattern else ("resid_post", 0)
    logits, _ = model.run_with_cache(tokens, names_filter=names)
    found = model.run_with_grads(tokens, LogitDiff(3, 4), [POINT, ("pattern", 0)] if pattern else POINT)
    return {"logits": np.asarray(logits, np.float64), "gradient": np.asarray(found.grads[POINT], np.float64)}


def numerics(shape: dict[str, Any], batch: int, pos: int) -> list[dict[str, Any]]:
    """The largest errors, of the largest value, for each dtype and way of attention."""
    cfg = tljax.HookedTransformerConfig(**shape)
    tokens = np.random.default_rng(1).integers(0, cfg.d_vocab, (batch, pos)).astype(np.int32)
    exact, rows = _exact(shape, tokens), []
    for dtype, bar in BARS.items():
        model = model_in(cfg, dtype)
        for pattern in (False, True):
            found = computed(model, tokens, pattern)
            way = "matrix named" if pattern else "no matrix named"
            if (told := vars(type(model)).get("attention_path")) is not None:
                way = f"{way}: {told(model, [('pattern', 0)] if pattern else [])}"
            for name, value in found.items():
                error = float(np.abs(value - exact[name]).max() / np.abs(exact[name]).max())
                row = {"numerics": f"{name}, {dtype}", "attention": way, "error": f"{error:.1e}", "bar": bar}
                rows.append(row | {"met": "yes" if error <= bar else "NO"})
    return rows


def _exact(shape: dict[str, Any], tokens: np.ndarray) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        np.savez(path / "asked.npz", tokens=tokens)
        (path / "shape.txt").write_text(repr(shape))
        root = Path(tljax.__file__).parents[1]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1", "CUDA_VISIBLE_DEVICES": ""}
        env["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, __file__, directory], env=env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"float64 on the host failed: {done.stderr[-2000:]}")
        return dict(np.load(path / "exact.npz"))


def _answer(directory: Path) -> None:
    import ast

    cfg = tljax.HookedTransformerConfig(**ast.literal_eval((directory / "shape.txt").read_text()))
    tokens = np.load(directory / "asked.npz")["tokens"]
    np.savez(directory / "exact.npz", allow_pickle=False, **computed(model_in(cfg, "float64"), tokens, True))


if __name__ == "__main__":
    _answer(Path(sys.argv[1]))
