"""Caches on disk: one safetensors file, with the model's config in its header."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.config import HookedTransformerConfig
from tljax.errors import CacheError

_FORMAT = "tljax-activation-cache-1"


def save(path: Path, activations: dict[str, jax.Array], cfg: HookedTransformerConfig, has_batch_dim: bool) -> None:
    """Writes activations, their order and the config."""
    from safetensors.numpy import save_file

    header = {
        "format": _FORMAT,
        "cfg": json.dumps(cfg.to_dict()),
        "has_batch_dim": json.dumps(has_batch_dim),
        "order": json.dumps(list(activations)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(value) for name, value in activations.items()}, path, metadata=header)


def load(path: Path) -> tuple[dict[str, jax.Array], HookedTransformerConfig, bool]:
    """Reads what :func:`save` wrote.

    Raises:
        CacheError: no such file, a damaged one, or one that is not a cache.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CacheError(f"There is no cache at {path}.")
    try:
        with safe_open(path, framework="numpy") as file:
            header: dict[str, Any] = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise CacheError(f"{path} is a safetensors file but not a cache that ActivationCache.save wrote.")
            names = json.loads(header["order"])
            activations = {name: jnp.asarray(file.get_tensor(name)) for name in names}
    except SafetensorError as error:
        raise CacheError(f"{path} is damaged or incomplete ({error}). Save the cache again.") from error
    return (
        activations,
        HookedTransformerConfig.from_dict(json.loads(header["cfg"])),
        json.loads(header["has_batch_dim"]),
    )
