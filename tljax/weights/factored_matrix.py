"""``FactoredMatrix``: a low-rank matrix kept as its two factors, such as a head's ``W_Q W_K^T`` or ``W_V W_O``."""

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from tljax.elsewhere import MATRIX, SaysWhatInstead
from tljax.errors import InputError
from tljax.weights.factors import product_svd

_matmul = functools.partial(jnp.matmul, precision="highest")


@jax.tree_util.register_pytree_with_keys_class
class FactoredMatrix(SaysWhatInstead):
    """The matrix ``A @ B``, ``[*leading, l, r]``, as ``A`` ``[*leading, l, m]`` and ``B`` ``[*leading, m, r]``.

    TransformerLens's class as an immutable pytree: its leaves are the factors, so it passes through ``jax.jit`` and
    ``jax.vmap``. Norms, singular values and eigenvalues come from the factors; the product is formed only by ``AB``,
    or by ``@`` where a side is no longer than ``m``. Factors in 16 bit are decomposed in float32.

    Args:
        A: left factors.
        B: right factors; leading axes broadcast against those of ``A``.

    Attributes:
        A, B: the factors, leading axes broadcast.

    Raises:
        InputError: the shapes do not fit.

    >>> f = FactoredMatrix(jnp.ones((3, 5, 2)), jnp.ones((2, 4)))
    >>> f.shape, f.mdim, (f @ jnp.ones((4, 6))).shape, f[0].norm().shape
    ((3, 5, 4), 2, (3, 5, 6), ())
    """

    A: jax.Array
    B: jax.Array
    _instead = MATRIX

    def __init__(self, A: Any, B: Any) -> None:
        left, right = (_as_factor(x, name) for x, name in ((A, "A"), (B, "B")))
        if left.shape[-1] != right.shape[-2]:
            raise InputError(
                f"A {list(left.shape)} and B {list(right.shape)} do not multiply: the last axis of A "
                f"({left.shape[-1]}) must be as long as the last but one of B ({right.shape[-2]}).{_hint(left, right)}"
            )
        leading = _broadcast(left.shape[:-2], right.shape[:-2])
        if leading is None:
            raise InputError(
                f"The leading axes of A {list(left.shape)} and B {list(right.shape)} do not broadcast: make each pair "
                "equal or 1, for instance with .unsqueeze."
            )
        self.A = jnp.broadcast_to(left, (*leading, *left.shape[-2:]))
        self.B = jnp.broadcast_to(right, (*leading, *right.shape[-2:]))
        self._decomposed: tuple[jax.Array, jax.Array, jax.Array] | None = None

    __array_ufunc__ = None  # numpy must leave `array @ f` and `number * f` to this class

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], None]:
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in "AB"], None

    @classmethod
    def tree_unflatten(cls, aux: None, children: Sequence[Any]) -> "FactoredMatrix":
        matrix = object.__new__(cls)  # leaves may be anything while jax rearranges them
        matrix.A, matrix.B = children
        matrix._decomposed = None
        return matrix

    # Shapes

    @property
    def ldim(self) -> int:
        """Rows of the product."""
        return self.A.shape[-2]

    @property
    def rdim(self) -> int:
        """Columns of the product."""
        return self.B.shape[-1]

    @property
    def mdim(self) -> int:
        """Length of the axis between the factors."""
        return self.A.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the product, ``(*leading, l, r)``."""
        return (*self.A.shape[:-1], self.B.shape[-1])

    @property
    def ndim(self) -> int:
        """Number of axes, the last two included."""
        return self.A.ndim

    @property
    def has_leading_dims(self) -> bool:
        """Whether this is more than one matrix."""
        return self.ndim > 2

    @property
    def pair(self) -> tuple[jax.Array, jax.Array]:
        """``(A, B)``."""
        return self.A, self.B

    @property
    def T(self) -> "FactoredMatrix":
        """Each matrix transposed; leading axes stay."""
        return FactoredMatrix(jnp.swapaxes(self.B, -1, -2), jnp.swapaxes(self.A, -1, -2))

    @property
    def mT(self) -> "FactoredMatrix":
        """The same as :attr:`T`, by the name that arrays give it."""
        return self.T

    def unsqueeze(self, k: int) -> "FactoredMatrix":
        """Returns the matrix with a new leading axis of length one at ``k``."""
        place = k + self.ndim + 1 if k < 0 else k
        if not 0 <= place <= self.ndim - 2:
            raise InputError(
                f"unsqueeze({k}) would come between or after the two axes of the matrix: a FactoredMatrix of shape "
                f"{self.shape} takes 0 to {self.ndim - 2}."
            )
        return FactoredMatrix(jnp.expand_dims(self.A, place), jnp.expand_dims(self.B, place))

    def __getitem__(self, index: Any) -> "FactoredMatrix":
        """Indexes leading axes, rows and columns; a number for rows or columns keeps that axis, with length one."""
        *leading, rows, columns = _whole_index(index, self.shape)
        A, B = (x[tuple(leading)] if leading else x for x in (self.A, self.B))
        row_index, column_index = _kept(rows, self.ldim, "row"), _kept(columns, self.rdim, "column")
        return FactoredMatrix(A[..., row_index, :], B[..., :, column_index])

    def get_corner(self, k: int = 3) -> jax.Array:
        """Returns the first ``k`` entries along every axis of the product."""
        corner = (slice(k),) * (self.ndim - 2)
        return _matmul(self.A[*corner, :k, :], self.B[*corner, :, :k])

    def __repr__(self) -> str:
        return f"FactoredMatrix: Shape({self.shape}), Hidden Dim({self.mdim})"

    # Products

    @property
    def AB(self) -> Float[Array, "*leading l r"]:
        """The product itself."""
        return _matmul(self.A, self.B)

    @property
    def BA(self) -> Float[Array, "*leading m m"]:
        """``B @ A``, for square matrices only; it has the same nonzero eigenvalues as ``A @ B``."""
        if self.ldim != self.rdim:
            raise InputError(f"BA needs a square matrix (l equal to r), got shape {self.shape}.")
        return _matmul(self.B, self.A)

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, FactoredMatrix):
            return (self @ other.A) @ other.B
        right = jnp.asarray(other)
        if right.ndim == 0 or right.shape[-2 if right.ndim > 1 else -1] != self.rdim:
            raise InputError(
                f"FactoredMatrix {self.shape} @ {right.shape}: the right side must have {self.rdim} rows "
                f"(a vector: {self.rdim} entries)."
            )
        if right.ndim == 1:
            return _matmul(self.A, _matmul(self.B, right)[..., None])[..., 0]
        if self.rdim > self.mdim:
            return FactoredMatrix(self.A, _matmul(self.B, right))
        return FactoredMatrix(self.AB, right)

    def __rmatmul__(self, other: Any) -> Any:
        left = jnp.asarray(other)
        if left.ndim == 0 or left.shape[-1] != self.ldim:
            raise InputError(
                f"{left.shape} @ FactoredMatrix {self.shape}: the left side must have {self.ldim} columns "
                f"(a vector: {self.ldim} entries)."
            )
        if left.ndim == 1:
            return _matmul(_matmul(left, self.A)[..., None, :], self.B)[..., 0, :]
        if self.ldim > self.mdim:
            return FactoredMatrix(_matmul(left, self.A), self.B)
        return FactoredMatrix(left, self.AB)

    def __mul__(self, scalar: Any) -> "FactoredMatrix":
        factor = jnp.asarray(scalar)
        if factor.size != 1:
            raise InputError(
                f"* takes one number, got shape {factor.shape}. For a matrix product use @; to scale each matrix, "
                "scale a factor: FactoredMatrix(f.A * scale[..., None, None], f.B)."
            )
        return FactoredMatrix(self.A * factor.reshape(()).astype(self.A.dtype), self.B)

    __rmul__ = __mul__

    # Decompositions

    def svd(
        self,
    ) -> tuple[Float[Array, "*leading l m"], Float[Array, "*leading m"], Float[Array, "*leading r m"]]:
        """Computes the singular value decomposition ``(U, S, V)``; ``U * S @ V^T`` is the product, which is not formed.

        There are ``min(l, m, r)`` singular values, largest first. Kept for the next call, except under a trace.
        """
        if self._decomposed is not None:
            return self._decomposed
        result = _svd(*_wide(self.A, self.B))
        if not isinstance(result[1], Tracer):
            self._decomposed = result
        return result

    @property
    def U(self) -> Float[Array, "*leading l m"]:
        """Left singular vectors, in columns."""
        return self.svd()[0]

    @property
    def S(self) -> Float[Array, "*leading m"]:
        """Singular values, largest first."""
        return self.svd()[1]

    @property
    def V(self) -> Float[Array, "*leading r m"]:
        """Right singular vectors, in columns."""
        return self.svd()[2]

    @property
    def Vh(self) -> Float[Array, "*leading r m"]:
        """TransformerLens's old name of :attr:`V`; not transposed, whatever the name says."""
        warnings.warn(
            "FactoredMatrix.Vh is V, not transposed, as in TransformerLens: write V, or f.V.mT.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.V

    @property
    def eigenvalues(self) -> Any:
        """Eigenvalues ``[*leading, m]`` of square matrices, complex; the remaining ``l - m`` are zero.

        Not every accelerator supports general eigenvalues in jax, so arrays are moved to the CPU. Traced arrays
        cannot be moved: for them jax raises an error where the device does not support it.
        """
        (product,) = _wide(self.BA)
        if not isinstance(product, Tracer):
            product = jax.device_put(product, jax.local_devices(backend="cpu")[0])
        return jnp.linalg.eigvals(product)

    def norm(self) -> Float[Array, "*leading"]:
        """Computes the Frobenius norm of each matrix."""
        A, B = _wide(self.A, self.B)
        return _norm(_matmul(without_left_rotation(A), without_right_rotation(B)))

    def collapse_l(self) -> Float[Array, "*leading m r"]:
        """Returns ``S V^T``: the product without its orthogonal factor ``U``."""
        _, S, V = self.svd()
        return S[..., :, None] * jnp.swapaxes(V, -1, -2)

    def collapse_r(self) -> Float[Array, "*leading l m"]:
        """Returns ``U S``: the product without its orthogonal factor ``V``."""
        U, S, _ = self.svd()
        return U * S[..., None, :]

    def make_even(self) -> "FactoredMatrix":
        """Returns the same matrix with factors ``U sqrt(S)`` and ``sqrt(S) V^T``: orthogonal columns, equal norms."""
        U, S, V = self.svd()
        root = jnp.sqrt(S)
        left, right = U * root[..., None, :], root[..., :, None] * jnp.swapaxes(V, -1, -2)
        return FactoredMatrix(left.astype(self.A.dtype), right.astype(self.B.dtype))


def composition_scores(left: FactoredMatrix, right: FactoredMatrix, broadcast_dims: bool = True) -> jax.Array:
    """Scores how much ``right`` reads from ``left``: ``|L R| / (|L| |R|)``, Frobenius norms (Elhage et al. 2021).

    Args:
        left: ``[*left_axes, l, d]``.
        right: ``[*right_axes, d, r]``.
        broadcast_dims: score every left matrix with every right one; otherwise leading axes broadcast.

    Returns:
        ``[*left_axes, *right_axes]``, or the broadcast leading axes; 0 where a matrix is zero.

    Raises:
        InputError: the matrices do not multiply.
    """
    if left.rdim != right.ldim:
        raise InputError(
            f"Composition needs left.rdim equal to right.ldim; left has shape {left.shape}, right {right.shape}."
        )
    if not broadcast_dims and _broadcast(left.shape[:-2], right.shape[:-2]) is None:
        raise InputError(f"The leading axes of left {left.shape} and right {right.shape} do not broadcast.")
    return _composition(left, right, broadcast_dims)


@functools.partial(jax.jit, static_argnames="all_pairs")
def _composition(left: FactoredMatrix, right: FactoredMatrix, all_pairs: bool) -> jax.Array:
    (A, B), (C, D) = _wide(*left.pair), _wide(*right.pair)
    before = _matmul(without_left_rotation(A), B)  # [..., m, d], with the norm of L
    after = _matmul(C, without_right_rotation(D))  # [..., d, m], with the norm of R
    if not all_pairs:
        return _share(_norm(_matmul(before, after)), _norm(before), _norm(after))
    befores = before.reshape(-1, *before.shape[-2:])
    afters = after.reshape(-1, *after.shape[-2:])
    together = jax.lax.map(lambda one: _norm(_matmul(one, afters)), befores)
    scores = _share(together, _norm(befores)[:, None], _norm(afters)[None])
    return scores.reshape(*left.shape[:-2], *right.shape[:-2])


def _share(together: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    largest = left * right
    return jnp.where(largest > 0, together / jnp.where(largest > 0, largest, 1), 0)


def without_left_rotation(A: Float[Array, "*leading l m"]) -> Float[Array, "*leading k m"]:
    """Returns a factor with at most ``m`` rows whose products with any ``x`` have the same norms as ``A @ x``."""
    return jnp.linalg.qr(A, mode="r") if A.shape[-2] > A.shape[-1] else A


def without_right_rotation(B: Float[Array, "*leading m r"]) -> Float[Array, "*leading m k"]:
    """Returns a factor with at most ``m`` columns for which ``x`` times it has the same norm as ``x @ B``."""
    return jnp.swapaxes(without_left_rotation(jnp.swapaxes(B, -1, -2)), -1, -2)


@jax.jit
def _svd(A: jax.Array, B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    rank = min(A.shape[-2], A.shape[-1], B.shape[-1])
    leading = A.shape[:-2]
    flat_A = A.reshape(-1, *A.shape[-2:])
    flat_B = jnp.swapaxes(B, -1, -2).reshape(-1, B.shape[-1], B.shape[-2])
    U, S, V = jax.vmap(product_svd)(flat_A, flat_B)
    U, S, V = U[..., :rank], S[..., :rank], V[..., :rank]
    return tuple(x.reshape(*leading, *x.shape[1:]) for x in (U, S, V))  # type: ignore[return-value]


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x, axis=(-2, -1)))


def _wide(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(x.astype(jnp.float32) if x.dtype.itemsize < 4 else x for x in arrays)


def _as_factor(value: Any, name: str) -> jax.Array:
    if isinstance(value, FactoredMatrix):
        raise InputError(f"{name} is a FactoredMatrix itself: multiply with @ instead.")
    factor = jnp.asarray(value)
    if factor.ndim < 2:
        raise InputError(f"{name} must have two axes or more, [..., rows, columns]; got shape {factor.shape}.")
    return factor if jnp.issubdtype(factor.dtype, jnp.inexact) else factor.astype(jnp.float32)


def _hint(left: jax.Array, right: jax.Array) -> str:
    if right.ndim > 2 and math.prod(right.shape[:-2]) > 1 and left.shape[-1] in right.shape:
        return " With leading axes, .T reverses all of them: write .mT, or use model.QK."
    return ""


def _broadcast(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...] | None:
    try:
        return np.broadcast_shapes(first, second)
    except ValueError:
        return None


def _whole_index(index: Any, shape: tuple[int, ...]) -> list[Any]:
    """Checks an index and spells out every axis of it; the last two entries are rows and columns."""
    items = list(index) if isinstance(index, tuple) else [index]
    items = [np.asarray(item) if isinstance(item, list) else item for item in items]
    counts = [0 if item is None else _axes_used(item) for item in items]
    given = sum(count for item, count in zip(items, counts, strict=True) if item is not Ellipsis)
    dots = [n for n, item in enumerate(items) if item is Ellipsis]
    if given > len(shape) or len(dots) > 1:
        raise InputError(f"The index {index!r} is too long for a FactoredMatrix of shape {shape}.")
    place = dots[0] if dots else len(items)
    items[place : place + len(dots)] = [slice(None)] * (len(shape) - given)
    axis = 0
    for item in items:
        if isinstance(item, int | np.integer) and not isinstance(item, bool):
            if not -shape[axis] <= item < shape[axis]:
                raise InputError(f"Index {item} is out of range: axis {axis} of {shape} has {shape[axis]} entries.")
        elif isinstance(item, bool | np.bool_ | str | float):
            raise InputError(f"{item!r} does not index a FactoredMatrix.")
        axis += 0 if item is None else _axes_used(item)
    if any(item is None or _axes_used(item) > 1 for item in items[-2:]) or len(items) < 2:
        raise InputError(f"The index {index!r} leaves no rows and columns of {shape}: new axes and masks come first.")
    return items


def _axes_used(item: Any) -> int:
    is_mask = isinstance(item, np.ndarray | jax.Array) and item.dtype == bool
    return item.ndim if is_mask else 1


def _kept(item: Any, size: int, name: str) -> Any:
    """Returns an index of rows or columns that keeps the axis."""
    if isinstance(item, int | np.integer):
        start = int(item) % size
        return slice(start, start + 1)
    if isinstance(item, slice):
        return item
    array = jnp.asarray(item)
    if array.ndim > 1:
        raise InputError(f"The {name} index has {array.ndim} axes; give a number, a slice or a list.")
    return array[None] if array.ndim == 0 else array
