"""What tests compare with: numbers up to rounding, trees of arrays to the bit."""

from typing import Any

import jax
import numpy as np


def close(got: Any, expected: Any, *, atol: float = 2e-5, rtol: float = 1e-4, message: str = "") -> None:
    """Fails unless two arrays are equal up to rounding, ``abs(got - expected) <= atol + rtol * abs(expected)``."""
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=atol, rtol=rtol, err_msg=message)


def same_bits(got: Any, expected: Any) -> None:
    """Fails unless two trees of arrays have one structure and the same numbers."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, left), right in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right), err_msg=jax.tree_util.keystr(path))
