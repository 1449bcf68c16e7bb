"""Weights laid out for products with few rows: what a step of generation on a CPU consists of.

On a CPU, XLA multiplies a few rows by ``[in, out]`` well below the speed of memory: it repacks the weight at every
call, and for one row it uses one core. Two other layouts of the same weight do better: in pieces along ``in`` (one
row), and transposed (a few). The forward pass takes them beside the parameters, as a tree of the same paths.
``benchmarks/README.md`` has the figures.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tljax.typing import Params

_PIECES = 4
_SMALLEST = 2**18
"""Elements of a weight that is worth it."""
_CUT = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out")
_TRANSPOSED = ("W_in", "W_gate", "W_out", "W_U")
"""Which weights gain: one row by ``W_U`` runs at full speed as it is, and attention's are too small to repay a copy."""


def in_pieces(params: Params) -> Params:
    """Weights in pieces ``[piece, in, out]``, ``None`` where they cannot be cut: no copy inside a compiled program."""

    def cut(matrix: jax.Array) -> jax.Array | None:
        return None if len(matrix) % _PIECES else matrix.reshape(_PIECES, -1, matrix.shape[1])

    return jax.tree.map(cut, _matrices(params, _CUT))


def size_of_copies(params: Params) -> int:
    """Bytes that :class:`TransposedWeights` makes."""
    return sum(matrix.nbytes for matrix in jax.tree.leaves(_matrices(params, _TRANSPOSED)))


class TransposedWeights:
    """Weights transposed, ``[out, in]``: copies, made when they are first asked for and kept by whoever keeps this.

    A model keeps one, which its hooked versions share. A pickle or a copy of it is empty.
    """

    def __init__(self) -> None:
        self._kept: tuple[Params, Params] = {}, {}

    def of(self, params: Params) -> Params:
        """The copies for these parameters: those made last if all the weights are the same arrays."""
        (weights, copies), wanted = self._kept, _matrices(params, _TRANSPOSED)
        if jax.tree.map(id, weights) != jax.tree.map(id, wanted):
            copies = jax.tree.map(_turn, wanted)
            self._kept = wanted, copies
        return copies

    def __reduce__(self) -> tuple[type["TransposedWeights"], tuple[()]]:
        return TransposedWeights, ()


def _matrices(node: Any, names: Sequence[str]) -> Any:
    """The tree's weights of these names that are worth another layout, as matrices ``[in, out]``."""
    if isinstance(node, tuple | list):
        return tuple(_matrices(child, names) for child in node)
    tree = {
        name: _matrices(child, names)
        for name, child in node.items()
        if isinstance(child, dict | tuple | list) and name != "experts"
    }
    for name in names:
        weight = node.get(name)
        if isinstance(weight, jax.Array) and weight.size >= _SMALLEST and weight.dtype == jnp.float32:
            tree[name] = weight if weight.ndim == 2 else _joined(weight, name == "W_O")
    return tree


def _joined(weight: jax.Array, heads_first: bool) -> jax.Array:
    """``[in, out]``, of a weight with an axis for heads too."""
    return weight.reshape(-1, weight.shape[-1]) if heads_first else weight.reshape(len(weight), -1)


_turn = jax.jit(jnp.transpose)
