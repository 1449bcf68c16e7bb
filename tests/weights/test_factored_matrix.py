"""``FactoredMatrix``: every operation against the product itself, under jit and vmap, and its refusals."""

import functools
from typing import Any

import compare
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tljax
from tljax import FactoredMatrix
from tljax.errors import InputError
from tljax.weights.factored_matrix import composition_scores

SHAPES = {
    "tall": ((6, 3), (3, 5)),
    "wide_middle": ((3, 7), (7, 4)),
    "left_short": ((2, 4), (4, 6)),
    "batched": ((2, 3, 6, 4), (2, 3, 4, 6)),
    "broadcast": ((2, 1, 5, 2), (3, 2, 5)),
}


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), jnp.float32)


@functools.cache
def make(kind: str) -> FactoredMatrix:
    return FactoredMatrix(*(random(*shape, seed=n) for n, shape in enumerate(SHAPES[kind])))


def close(got: Any, expected: Any, atol: float = 2e-5) -> None:
    got = got.AB if isinstance(got, FactoredMatrix) else got
    expected = expected.AB if isinstance(expected, FactoredMatrix) else expected
    assert got.shape == expected.shape
    compare.close(got, expected, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("kind", SHAPES)
def test_shapes_and_products(kind: str) -> None:
    f = make(kind)
    full = np.asarray(f.A) @ np.asarray(f.B)
    close(f.AB, full)
    assert f.shape == full.shape
    assert f.ndim == full.ndim
    assert (f.ldim, f.mdim, f.rdim) == (full.shape[-2], f.A.shape[-1], full.shape[-1])
    assert f.has_leading_dims == (full.ndim > 2)
    assert f.pair == (f.A, f.B)
    close(f.T, np.swapaxes(full, -1, -2))
    right, left = random(f.rdim, 9, seed=5), random(8, f.ldim, seed=6)
    close(f @ right, full @ np.asarray(right))
    close(left @ f, np.asarray(left) @ full)
    close(np.asarray(left) @ f, np.asarray(left) @ full)
    close(f @ right[:, 0], full @ np.asarray(right)[:, 0])
    close(left[0] @ f, np.asarray(left)[0] @ full)
    close(f @ f.T, full @ np.swapaxes(full, -1, -2), 1e-4)
    close((f @ f.T) @ f, full @ np.swapaxes(full, -1, -2) @ full, 1e-3)


def test_a_product_keeps_the_smaller_middle() -> None:
    f = make("tall")
    assert (f @ random(5, 100)).mdim == 3
    assert (f @ FactoredMatrix(random(5, 2), random(2, 5))).mdim == 2
    assert (make("wide_middle") @ random(4, 9)).mdim == 4
    assert (random(9, 3) @ make("wide_middle")).mdim == 3


def test_matrices_with_leading_axes_on_either_side() -> None:
    f, several = make("tall"), random(4, 5, 2)
    close(f @ several, np.asarray(f.AB) @ np.asarray(several))
    close(jnp.swapaxes(several, -1, -2) @ f.T, np.swapaxes(np.asarray(f.AB) @ np.asarray(several), -1, -2))


@pytest.mark.parametrize("scalar", [2, -0.5, np.float32(3), jnp.float32(0.25), jnp.ones((1, 1)), np.float64(1.5)])
def test_scalars(scalar: Any) -> None:
    f = make("batched")
    expected = np.asarray(f.AB) * float(np.asarray(scalar).reshape(()))
    close(f * scalar, expected)
    close(scalar * f, expected)


@pytest.mark.parametrize("kind", SHAPES)
def test_decompositions(kind: str) -> None:
    f = make(kind)
    full = np.asarray(f.AB)
    U, S, V = f.svd()
    rank = min(f.ldim, f.mdim, f.rdim)
    assert U.shape == (*full.shape[:-1], rank)
    assert V.shape == (*full.shape[:-2], f.rdim, rank)
    close(S, np.linalg.svd(full, compute_uv=False)[..., :rank])
    close((U * S[..., None, :]) @ jnp.swapaxes(V, -1, -2), full)
    for vectors in (U, V):
        close(jnp.swapaxes(vectors, -1, -2) @ vectors, np.broadcast_to(np.eye(rank), (*full.shape[:-2], rank, rank)))
    close(f.norm(), np.linalg.norm(full, axis=(-2, -1)))
    close(f.collapse_l(), S[..., :, None] * jnp.swapaxes(V, -1, -2))
    close(f.collapse_r(), U * S[..., None, :])
    even = f.make_even()
    close(even, full)
    close(jnp.swapaxes(even.A, -1, -2) @ even.A, even.B @ jnp.swapaxes(even.B, -1, -2))
    close(f.U, U)
    close(f.V, V)
    with pytest.warns(DeprecationWarning, match="Vh is V, not transposed"):
        close(f.Vh, V)


def test_svd_never_forms_the_product() -> None:
    f = FactoredMatrix(random(300, 2), random(2, 301))
    text = str(jax.make_jaxpr(lambda f: (f.svd(), f.norm(), (f * 2).collapse_l(), composition_scores(f, f.T)))(f))
    assert "300,301" not in text
    assert "301,300" not in text


def test_eigenvalues() -> None:
    f = make("batched")
    found = np.asarray(f.eigenvalues)
    assert found.shape == (2, 3, 4)
    for index in np.ndindex(2, 3):
        expected = np.linalg.eigvals(np.asarray(f.AB[index], np.float64))
        largest = expected[np.argsort(-abs(expected))][:4]
        np.testing.assert_allclose(np.sort_complex(found[index]), np.sort_complex(largest), atol=1e-4)
    with pytest.raises(InputError, match=r"BA needs a square matrix.*\(6, 5\)"):
        _ = make("tall").eigenvalues


KEEP = slice(None)


@pytest.mark.parametrize(
    ("index", "of_product"),
    [
        (0, 0), (-1, -1), ((0, 1), (0, 1)), (np.int64(1), 1), (..., ...), ((KEEP, 2), (KEEP, 2)),
        ((0, slice(0, 2)), (0, slice(0, 2))), ((None, 0), (None, 0)), ((0, None, 1), (0, None, 1)),
        (([0, 1], 2), ([0, 1], 2)), (np.array([True, False]), np.array([True, False])),
        ((1, 2, 3), (1, 2, slice(3, 4))), ((1, 2, -1, -1), (1, 2, slice(-1, None), slice(-1, None))),
        ((..., 1, KEEP), (..., slice(1, 2), KEEP)), ((..., slice(0, 2), 3), (..., slice(0, 2), slice(3, 4))),
        ((KEEP, KEEP, slice(1, 3), slice(2)), (KEEP, KEEP, slice(1, 3), slice(2))),
        ((1, 2, [0, 3], [1, 1, 2]), (1, 2, *np.ix_([0, 3], [1, 1, 2]))),
    ],
)  # fmt: skip
def test_indexing_is_that_of_the_product(index: Any, of_product: Any) -> None:
    f = make("batched")
    close(f[index], np.asarray(f.AB)[of_product])


def test_row_and_column_stay() -> None:
    f = make("tall")
    assert f[0, 1].shape == (1, 1)
    assert f[2].shape == (1, 5)
    assert float(f[0, 1].AB[0, 0]) == pytest.approx(float(f.AB[0, 1]), abs=1e-6)
    assert float(f[-1, -1].AB[0, 0]) == pytest.approx(float(f.AB[-1, -1]), abs=1e-6)
    assert f[:, jnp.int32(2)].shape == (6, 1)


def test_axes_and_corner() -> None:
    f = make("batched")
    assert f.unsqueeze(0).shape == (1, 2, 3, 6, 6)
    assert f.unsqueeze(2).shape == (2, 3, 1, 6, 6)
    assert f.unsqueeze(-3).shape == (2, 3, 1, 6, 6)
    close(f.get_corner(), np.asarray(f.AB)[:3, :3, :3, :3])
    close(f.get_corner(k=2), np.asarray(f.AB)[:2, :2, :2, :2])
    assert repr(f) == "FactoredMatrix: Shape((2, 3, 6, 6)), Hidden Dim(4)"


def test_is_a_pytree_under_jit_vmap_and_grad() -> None:
    f = make("batched")
    close(jax.jit(lambda f, x: f @ x)(f, random(6, 2)), f @ random(6, 2))
    close(jax.vmap(jax.vmap(lambda f: f.norm()))(f), f.norm())
    close(jax.vmap(lambda f: f @ f.T)(f), f @ f.T, 1e-4)
    close(jax.jit(lambda f: f.S)(f), f.S)
    close(jax.jit(lambda f, i: f[i, 1])(f, 1), f[1, 1])
    gradient = jax.grad(lambda f: f.norm().sum())(f)
    assert isinstance(gradient, FactoredMatrix)
    close(gradient.A[1, 2], (f.AB[1, 2] / f.norm()[1, 2]) @ f.B[1, 2].T)
    assert isinstance(jax.tree.map(lambda x: None, f), FactoredMatrix)


def test_svd_under_a_trace_leaks_nothing() -> None:
    f = FactoredMatrix(random(4, 2, seed=3), random(2, 4, seed=3))
    with jax.checking_leaks():
        jax.jit(lambda x: x * f.S[0])(1.0)
    close(f.S, np.linalg.svd(np.asarray(f.AB), compute_uv=False)[:2])


def test_sixteen_bit_factors() -> None:
    f = make("tall")
    half = FactoredMatrix(f.A.astype("bfloat16"), f.B.astype("bfloat16"))
    assert half.S.dtype == half.norm().dtype == jnp.float32
    np.testing.assert_allclose(half.S, f.S, rtol=0.02)
    assert half.make_even().A.dtype == jnp.bfloat16
    assert (half * 2.0).A.dtype == jnp.bfloat16


def test_composition_scores() -> None:
    left, right = make("batched"), make("batched").T
    scores = composition_scores(left, right)
    assert scores.shape == (2, 3, 2, 3)
    one, other = np.asarray(left.AB[1, 0]), np.asarray(right.AB[0, 2])
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    assert float(scores[1, 0, 0, 2]) == pytest.approx(np.linalg.norm(one @ other) / norms, abs=1e-6)
    paired = composition_scores(left, right, broadcast_dims=False)
    close(paired, jnp.einsum("abab->ab", scores))
    assert not np.asarray(composition_scores(left * 0, right)).any()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: FactoredMatrix(random(3, 2), random(3, 2)), r"\[3, 2\] and B \[3, 2\] do not multiply.*\(2\).*\(3\)"),
        (lambda: FactoredMatrix(random(4, 8, 2), random(4, 8, 2).T), r"reverses all of them: write .mT"),
        (lambda: FactoredMatrix(random(2, 3, 2), random(4, 2, 3)), "leading axes .* do not broadcast"),
        (lambda: FactoredMatrix(random(3), random(3, 2)), r"A must have two axes or more.*\(3,\)"),
        (lambda: FactoredMatrix(make("tall"), random(5, 2)), "A is a FactoredMatrix itself: multiply with @"),
        (lambda: make("tall") @ random(6, 2), r"\(6, 5\) @ \(6, 2\): the right side must have 5 rows"),
        (lambda: make("tall") @ random(6), r"must have 5 rows \(a vector: 5 entries\)"),
        (lambda: random(2, 5) @ make("tall"), r"\(2, 5\) @ FactoredMatrix \(6, 5\): the left side must have 6 columns"),
        (lambda: make("tall") @ make("tall"), "must have 5 rows"),
        (lambda: make("tall") @ 3.0, "must have 5 rows"),
        (lambda: make("tall") * random(2), r"\* takes one number, got shape \(2,\). For a matrix product use @"),
        (lambda: make("tall")[0, 1, 2], "too long for a FactoredMatrix of shape"),
        (lambda: make("tall")[..., ...], "too long"),
        (lambda: make("batched")[2], "Index 2 is out of range: axis 0"),
        (lambda: make("tall")[0, 5], "Index 5 is out of range: axis 1"),
        (lambda: make("tall")[:, None], "new axes and masks come first"),
        (lambda: make("tall")["a"], "'a' does not index"),
        (lambda: make("tall").unsqueeze(1), "takes 0 to 0"),
        (lambda: composition_scores(make("tall"), make("tall")), "left.rdim equal to right.ldim"),
        (
            lambda: composition_scores(FactoredMatrix(random(2, 4, 3), random(2, 3, 4)), make("batched")[0, :, :4],
                                       broadcast_dims=False),
            "do not broadcast",
        ),
    ],
)  # fmt: skip
def test_refusals(act: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        act()


def test_is_exported() -> None:
    assert tljax.FactoredMatrix is FactoredMatrix
