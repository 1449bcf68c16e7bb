"""Small array functions under TransformerLens's names."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.errors import InputError
from tljax.text.positions import read_mask
from tljax.weights.factored_matrix import FactoredMatrix

SOFTCAP_DISABLED = -1.0
"""The soft cap of configs that have none."""


def to_numpy(tensor: Any) -> np.ndarray:
    """Converts an array, a list or a number to a numpy array; bfloat16, which numpy lacks, becomes float32."""
    array = np.asarray(tensor)
    return array.astype(np.float32) if array.dtype == jnp.bfloat16 else array


def get_corner(tensor: Any, n: int = 3) -> Any:
    """Returns the first ``n`` entries along every axis."""
    return tensor.get_corner(n) if isinstance(tensor, FactoredMatrix) else tensor[(slice(n),) * tensor.ndim]


def get_matrix_corner(matrix: FactoredMatrix, n: int = 3) -> jax.Array:
    """Returns the first ``n`` entries along every axis of a factored matrix's product, as an array."""
    return matrix.get_corner(n)


def remove_batch_dim(tensor: Any) -> Any:
    """Drops the first axis where it has one entry."""
    return tensor[0] if tensor.shape[0] == 1 else tensor


def transpose(tensor: Any) -> Any:
    """Swaps the last two axes."""
    return tensor.T if isinstance(tensor, FactoredMatrix) else jnp.swapaxes(tensor, -1, -2)


def is_square(x: Any) -> bool:
    """Whether this is one square matrix."""
    return x.ndim == 2 and x.shape[0] == x.shape[1]


def is_lower_triangular(x: Any) -> bool:
    """Whether this is one square matrix with nothing above its diagonal."""
    return is_square(x) and not np.triu(np.asarray(x), k=1).any()


def get_cumsum_along_dim(tensor: Any, dim: int, reverse: bool = False) -> jax.Array:
    """Computes the cumulative sum along an axis, from its end if ``reverse``."""
    return jax.lax.cumsum(jnp.asarray(tensor), axis=dim % jnp.ndim(tensor), reverse=reverse)


def get_offset_position_ids(past_kv_pos_offset: int, attention_mask: Any) -> jax.Array:
    """Returns positions ``[batch, pos]`` counted from the first token of ``attention_mask``; padding before it is 0.

    Args:
        past_kv_pos_offset: how many leading positions to leave out.
        attention_mask: ``[batch, pos]``, 1 at text.
    """
    mask = jnp.asarray(read_mask(attention_mask)).astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    return positions[:, past_kv_pos_offset:]


def repeat_along_head_dimension(tensor: Any, n_heads: int, clone_tensor: bool = True) -> jax.Array:
    """Repeats ``[batch, pos, d_model]`` to ``[batch, pos, head, d_model]``; ``clone_tensor`` changes nothing."""
    array = jnp.asarray(tensor)
    if array.ndim != 3:
        raise InputError(f"Expected [batch, pos, d_model], got shape {array.shape}.")
    return jnp.broadcast_to(array[:, :, None], (*array.shape[:2], n_heads, array.shape[2]))


def filter_dict_by_prefix(dictionary: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns the entries whose keys start with ``prefix`` and a dot, without that start.

    >>> filter_dict_by_prefix({"h.0.W_Q": 1, "h.1.W_Q": 2}, "h.0")
    {'W_Q': 1}
    """
    start = f"{prefix.removesuffix('.')}."
    return {key.removeprefix(start): value for key, value in dictionary.items() if key.startswith(start)}


def softcap_enabled(cap: float) -> bool:
    """Whether a config's soft cap does anything."""
    return cap > 0
