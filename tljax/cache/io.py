"""Caches on disk: one safetensors file, with the model's config in its header."""

from pathlib import Path

import jax

from tljax.config import HookedTransformerConfig
from tljax.errors import CacheError
from tljax.safetensors_files import read_own, write_own

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
    marks = {name: value for name, value in zip(_PADDING, padding, strict=True) if value is not None}
    write_own(
        path, _FORMAT, activations | marks, cfg=cfg.to_dict(), has_batch_dim=has_batch_dim, order=list(activations)
    )


def load(path: Path) -> tuple[dict[str, jax.Array], HookedTransformerConfig, bool, Padding]:
    """Reads what :func:`save` wrote.

    Raises:
        CacheError: no such file, a damaged one, or one that is not a cache.
    """
    arrays, header = read_own(
        path, _FORMAT, "a cache that ActivationCache.save wrote", "Save the cache again.", CacheError
    )
    return (
        {name: arrays[name] for name in header["order"]},
        HookedTransformerConfig.from_dict(header["cfg"]),
        header["has_batch_dim"],
        (arrays.get(_PADDING[0]), arrays.get(_PADDING[1])),
    )
