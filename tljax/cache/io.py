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
_PADDING = ("padding.token", "padding.key")
"""Tensors besides the activations that mark padding, where there is any; readers that do not know them skip them."""

Padding = tuple[jax.Array | None, jax.Array | None]


def save(
    path: Path,
    activations: dict[str, jax.Array],
    cfg: HookedTransformerConfig,
    has_batch_dim: bool,
    padding: Padding = (None, None),
) -> None:
    """Writes activations, their order, the config and the marks of padding."""
    from safetensors.numpy import save_file

    header = {
        "format": _FORMAT,
        "cfg": json.dumps(cfg.to_dict()),
        "has_batch_dim": json.dumps(has_batch_dim),
        "order": json.dumps(list(activations)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    marks = {name: value for name, value in zip(_PADDING, padding, strict=True) if value is not None}
    tensors = {name: np.ascontiguousarray(value) for name, value in (activations | marks).items()}
    save_file(tensors, path, metadata=header)


def load(path: Path) -> tuple[dict[str, jax.Array], HookedTransformerConfig, bool, Padding]:
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
            present = set(file.keys())
            tokens, keys = (jnp.asarray(file.get_tensor(name)) if name in present else None for name in _PADDING)
    except SafetensorError as error:
        raise CacheError(f"{path} is damaged or incomplete ({error}). Save the cache again.") from error
    return (
        activations,
        HookedTransformerConfig.from_dict(json.loads(header["cfg"])),
        json.loads(header["has_batch_dim"]),
        (tokens, keys),
    )
