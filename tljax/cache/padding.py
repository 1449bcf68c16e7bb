"""Padding marks of cached activations, and cutting one prompt out of a padded cache.

A cache carries the mask among its leaves as offsets, 0 at text and minus infinity at padding, like an additive
attention mask: sums, differences and multiples of caches (``jax.tree.map(jnp.subtract, a, b)``) and ``jax.grad`` with
respect to one then work, and leave padding marked.
"""

from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tljax.cache import access
from tljax.checks import is_traced
from tljax.errors import CacheError
from tljax.hooks.point import POSITION_AXES
from tljax.hooks.points import point_table
from tljax.text.positions import read_mask

if TYPE_CHECKING:
    from tljax.cache.activation_cache import ArraysByName

    _Cache = TypeVar("_Cache", bound=ArraysByName)


def to_offsets(mask: Any) -> jax.Array | None:
    """Returns 0 where ``mask`` is true and minus infinity elsewhere; ``None`` stays ``None``."""
    if mask is None:
        return None
    return jnp.where(jnp.asarray(read_mask(mask, "token_mask")), jnp.float32(0), -jnp.float32(jnp.inf))


def to_mask(offsets: Any) -> jax.Array | None:
    """Returns the mask that :func:`to_offsets` took, also after arithmetic on the offsets."""
    return None if offsets is None else jnp.isfinite(offsets)


@access.checked
def unpad(cache: "_Cache", index: int) -> "_Cache":
    """Returns one prompt's activations without padding, as if it had run alone.

    Args:
        index: the prompt's index in the batch.

    Returns:
        A cache with a batch axis of one (or none, if this one has none), every position axis (``pos``,
        ``query_pos``, ``key_pos``) cut to the prompt's own tokens. Gradients stay those of the whole batch's loss.

    Raises:
        CacheError: no such prompt; a cache under trace; an activation cut after the run.
    """
    if is_traced(cache):
        raise CacheError("A traced cache has prompts of unknown length: call cache.unpad outside jax.jit.")
    size = next((value.shape[0] for value in cache.values()), 0) if cache.has_batch_dim else 1
    if not -size <= index < size:
        raise CacheError(f"There is no prompt {index}: this cache has {size}.")
    if cache.has_batch_dim:
        start = index % size
        cache = cache.apply_slice_to_batch_dim((start, start + 1))
    mask, key_mask = cache.token_mask, cache.key_mask
    if mask is None or key_mask is None:
        return cache
    real, real_keys = _places(mask), _places(key_mask)
    first = int(cache.has_batch_dim) - 1
    kept = {}
    for name, value in cache.items():
        for axis, kind in enumerate(_axes(cache, name)):
            if kind in POSITION_AXES:
                places, length = (real_keys, key_mask.shape[-1]) if kind == "key_pos" else (real, mask.shape[-1])
                value = _take(name, value, places, length, axis + first)
        kept[name] = value
    return cache.without_padding(kept)


def _axes(cache: "ArraysByName", name: str) -> tuple[str, ...]:
    spec = point_table(cache.cfg).get(name.removesuffix("_grad"))
    if spec is None:
        raise CacheError(
            f"{name} is no hook point of this model, so its position axis is not known: make a cache without it first."
        )
    return spec.axes


def _places(mask: jax.Array) -> np.ndarray:
    return np.flatnonzero(np.asarray(mask))


def _take(name: str, value: jax.Array, places: np.ndarray, length: int, axis: int) -> jax.Array:
    if value.shape[axis] != length:
        raise CacheError(
            f"{name} has {value.shape[axis]} positions, the padding marks of its cache {length}: it was cut after the "
            "run. Call unpad first and cut then, or keep fewer positions with run_with_cache(pos_slice=...)."
        )
    if len(places) == length:
        return value
    if len(places) and places[-1] - places[0] + 1 == len(places):
        return jax.lax.slice_in_dim(value, int(places[0]), int(places[-1]) + 1, axis=axis)
    return jnp.take(value, places, axis=axis)
