"""Weight layouts for matrix products with few rows, as in each step of generation on a CPU.

On a CPU, XLA multiplies a few rows by ``[in, out]`` well below the speed of memory: it repacks the weight at every
call, and for one row it uses one core. Two other layouts of the same weight are faster: pieces along ``in`` (for one
row), and the transpose (for a few). The forward pass takes them beside the parameters, as a tree of the same paths.
``benchmarks/README.md`` has the figures.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tljax.dictionary_params import DICTIONARIES
from tljax.typing import Params

_PIECES = 4
_SMALLEST = 2**18
"""Elements of the smallest weight for which another layout pays off."""
_CUT = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out", "W_enc", "W_dec")
_TRANSPOSED = ("W_in", "W_gate", "W_out", "W_U", "W_enc", "W_dec")
"""Weights that gain from each: one row times ``W_U`` is fast as it is, attention's are too small to repay a copy."""


def in_pieces(params: Params) -> Params:
    """Returns weights as ``[piece, in, out]``, ``None`` where indivisible; no copy inside a compiled program."""

    def cut(matrix: jax.Array) -> jax.Array | None:
        return None if len(matrix) % _PIECES else matrix.reshape(_PIECES, -1, matrix.shape[1])

    return jax.tree.map(cut, _matrices(params, _CUT))


def size_of_copies(params: Params) -> int:
    """Returns the size in bytes of the copies that :class:`TransposedWeights` makes."""
    return sum(matrix.nbytes for matrix in jax.tree.leaves(_matrices(params, _TRANSPOSED)))


class TransposedWeights:
    """Transposed copies of weights, ``[out, in]``, made on first use and kept as long as this object.

    A model keeps one and shares it with its hooked versions. A pickle or a copy of it is empty.
    """

    def __init__(self) -> None:
        self._kept: tuple[Params, Params] = {}, {}

    def of(self, params: Params) -> Params:
        """Returns the copies for ``params``; the last ones are reused if all the weights are the same arrays."""
        (weights, copies), wanted = self._kept, _matrices(params, _TRANSPOSED)
        if jax.tree.map(id, weights) != jax.tree.map(id, wanted):
            copies = jax.tree.map(_turn, wanted)
            self._kept = wanted, copies
        return copies

    def __reduce__(self) -> tuple[type["TransposedWeights"], tuple[()]]:
        return TransposedWeights, ()


def _matrices(node: Any, names: Sequence[str]) -> Any:
    """Returns the tree's weights of these names that are worth another layout, as matrices ``[in, out]``."""
    if isinstance(node, tuple | list):
        return tuple(_matrices(child, names) for child in node)
    tree = {
        name: _matrices(child, names)
        for name, child in node.items()
        if isinstance(child, dict | tuple | list) and name not in ("experts", DICTIONARIES)
    }
    if DICTIONARIES in node:
        tree[DICTIONARIES] = {point: _matrices(one.params, names) for point, one in node[DICTIONARIES].items()}
    for name in names:
        weight = node.get(name)
        if isinstance(weight, jax.Array) and weight.size >= _SMALLEST and weight.dtype == jnp.float32:
            tree[name] = weight if weight.ndim == 2 else _joined(weight, name == "W_O")
    return tree


def _joined(weight: jax.Array, heads_first: bool) -> jax.Array:
    """Reshapes a weight with an axis of heads to ``[in, out]``."""
    return weight.reshape(-1, weight.shape[-1]) if heads_first else weight.reshape(len(weight), -1)


_turn = jax.jit(jnp.transpose)
