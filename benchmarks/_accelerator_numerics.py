"""Errors of logits and gradients on a device against float64, which a process of its own computes on the host's CPU."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

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


def ways(cfg: Any) -> Iterator[tuple[str, Any, bool]]:
    """Yields the ways of attention on this device: a name, the config, and whether the matrix is named."""
    yield "matrix named", cfg, True
    for path in get_args(type(cfg).__annotations__["attention_path"]):
        if path in ("auto", "materialised"):  # one of the others, and what a named matrix takes
            continue
        try:
            asked = cfg.replace(attention_path=path)
        except tljax.errors.ConfigError:  # a kernel that cannot take this dtype or shape
            continue
        found = tljax.HookedTransformer(asked.replace(init_weights=False)).attention_path(256)[-1]
        if found.name == path:  # and not a kernel of another device
            yield path, asked, False


def numerics(
    shape: dict[str, Any], batch: int, pos: int, dtypes: Iterable[str] = tuple(BARS)
) -> Iterator[dict[str, Any]]:
    """Yields the largest errors, of the largest value, for each dtype and way of attention; or why there are none."""
    cfg = tljax.HookedTransformerConfig(**shape)
    tokens = np.random.default_rng(1).integers(0, cfg.d_vocab, (batch, pos)).astype(np.int32)
    exact = _exact(shape, tokens)
    for dtype in dtypes:
        bar = BARS[dtype]
        for way, asked, pattern in ways(cfg.replace(dtype=dtype)):
            row = {"attention": way, "dtype": dtype, "error": "", "bar": bar, "met": "NO", "failed": ""}
            try:
                found = computed(model_in(asked, dtype), tokens, pattern)
            except Exception as error:  # the other ways are still wanted
                yield {"numerics": "logits, gradient"} | row | {"failed": f"{type(error).__name__}: {error}"[:300]}
                continue
            for name, value in found.items():
                error = float(np.abs(value - exact[name]).max() / np.abs(exact[name]).max())
                met = "yes" if error <= bar else "NO"
                yield {"numerics": name} | row | {"error": f"{error:.1e}", "met": met}


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
