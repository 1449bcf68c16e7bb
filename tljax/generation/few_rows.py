"""Weights laid out for products with few rows: what a step of generation on a CPU consists of.

On a CPU, XLA multiplies a few rows by ``[in, out]`` well below the speed of memory: it repacks the weight at every
call, and for one row it uses one core. Two other layouts of the same weight do better, and stand beside it in the
parameter tree while a generation runs: in pieces along ``in`` (one row), and transposed (a few).
``benchmarks/README.md`` has the figures.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tljax.modules.products import OTHER_LAYOUT
from tljax.typing import Params

_PIECES = 4
_SMALLEST = 2**18
"""Elements of a weight that is worth it."""
_CUT = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out")
_TRANSPOSED = ("W_in", "W_gate", "W_out", "W_U")
"""Which weights gain: one row by ``W_U`` runs at full speed as it is, and attention's are too small to repay a copy."""


def in_pieces(params: Params) -> Params:
    """Parameters with their weights in pieces ``[piece, in, out]`` too: no copy inside a compiled program."""
    return _beside(params, _CUT, _cut)


def transposed(params: Params) -> Params:
    """Parameters with their weights transposed ``[out, in]`` too: copies, kept as long as the weights live."""
    return _beside(params, _TRANSPOSED, _transpose)


def size_of_copies(params: Params) -> int:
    """Bytes that :func:`transposed` adds."""
    sizes: list[int] = []
    _beside(params, _TRANSPOSED, lambda matrix: sizes.append(matrix.nbytes))
    return sum(sizes)


def _beside(node: Any, names: Sequence[str], lay_out: Callable[[jax.Array], Any]) -> Any:
    """The tree with another layout of each of the named weights, as a matrix, beside it."""
    if isinstance(node, tuple):
        return tuple(_beside(child, names, lay_out) for child in node)
    if not isinstance(node, dict):
        return node
    tree = {name: child if name == "experts" else _beside(child, names, lay_out) for name, child in node.items()}
    for name in names:
        weight = node.get(name)
        if weight is not None and weight.size >= _SMALLEST and weight.dtype == jnp.float32:
            laid_out = lay_out(_matrix(name, weight))
            if laid_out is not None:
                tree[name + OTHER_LAYOUT] = laid_out
    return tree


def _matrix(name: str, weight: jax.Array) -> jax.Array:
    """``[in, out]``, of a weight with an axis for heads too."""
    if weight.ndim == 2:
        return weight
    return weight.reshape(-1, weight.shape[-1]) if name == "W_O" else weight.reshape(weight.shape[0], -1)


def _cut(matrix: jax.Array) -> jax.Array | None:
    return None if len(matrix) % _PIECES else matrix.reshape(_PIECES, -1, matrix.shape[1])


_kept: dict[int, tuple[weakref.ref[jax.Array], jax.Array]] = {}
"""The transposed copy of each weight that has one, by the weight's id, as long as the weight lives."""


def _transpose(matrix: jax.Array) -> jax.Array:
    key = id(matrix)
    if key in _kept and _kept[key][0]() is matrix:
        return _kept[key][1]
    copy = _turn(matrix)
    _kept[key] = weakref.ref(matrix, lambda _: _kept.pop(key, None)), copy
    return copy


@jax.jit
def _turn(matrix: jax.Array) -> jax.Array:
    return matrix.T
