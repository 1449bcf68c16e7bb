"""``float64`` for a test, by the name that each jax has for it."""

from typing import Any

import jax


def double_precision() -> Any:
    """Returns a context in which jax computes in float64; ``jax.enable_x64`` is younger than the oldest jax allowed."""
    if jax.__version_info__ >= (0, 8):
        return jax.enable_x64(True)
    from jax import experimental

    return experimental.enable_x64(True)
