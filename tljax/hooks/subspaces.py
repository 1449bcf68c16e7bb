"""Spans of directions of any lengths, accurate even for nearly parallel ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

RANK_TOLERANCE = 4
"""Unit rows are dependent where a singular value is below this times their number times the dtype's epsilon."""
_WELL_APART = 0.1
"""Ratio of smallest to largest singular value from which single precision is as good as double."""


def unit_rows(directions: jax.Array) -> jax.Array:
    """Scales rows ``[k, d]`` to length one (zeros stay). Gradients treat lengths as constants: a span ignores them."""
    fixed = jax.lax.stop_gradient(directions)
    largest = jnp.abs(fixed).max(axis=1, keepdims=True)  # first, as squares of 1e20 overflow
    largest = jnp.where(largest > 0, largest, 1)
    length = jnp.sqrt(jnp.square(fixed / largest).sum(axis=1, keepdims=True))
    return directions / largest / jnp.where(length > 0, length, 1)


def well_conditioned(directions: Any) -> Any:
    """Returns directions ``[k, d]``, or if they are nearly dependent an orthonormal basis of their span, ``[k, d]``.

    Rows that the basis does not need are zeros. Traced or single directions, and other arrays, are returned unchanged.
    """
    if isinstance(directions, Tracer) or np.ndim(directions) != 2 or len(directions) < 2:
        return directions
    given = directions if isinstance(directions, jax.Array) else np.asarray(directions)
    rows = np.asarray(given, np.float64)
    if not rows.size or not np.isfinite(rows).all():
        return directions
    largest = np.abs(rows).max(axis=1, keepdims=True)
    rows = rows / np.where(largest > 0, largest, 1)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    _, sizes, basis = np.linalg.svd(rows / np.where(length > 0, length, 1), full_matrices=False)
    if len(sizes) == len(rows) and sizes[-1] >= _WELL_APART * sizes[0]:
        return directions
    epsilon = float(jnp.finfo(given.dtype).eps) if jnp.issubdtype(given.dtype, jnp.floating) else 0.0
    kept = basis[sizes > max(RANK_TOLERANCE * len(rows) * epsilon, 1e-12) * sizes[0]]
    return np.pad(kept, ((0, len(rows) - len(kept)), (0, 0)))
