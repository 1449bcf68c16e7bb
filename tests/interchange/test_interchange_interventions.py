"""Interchange interventions: their formula at every kind of point, their files, and their behaviour as pytrees."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import TOKENS, build

import tljax
from tljax.errors import InterventionError
from tljax.hooks.interchanges import boundary_gate, mask_gate
from tljax.hooks.point import HookPoint
from tljax.interchange import (
    BoundlessInterchange,
    Interchange,
    MaskedInterchange,
    NormMatchedPlacebo,
    RotatedInterchange,
)

RNG = np.random.default_rng(0)
POINT = HookPoint("hook_resid_post", ("batch", "pos", "d_model"))
BASE, SOURCE = RNG.standard_normal((2, 3, 4, 6)).astype(np.float32)
ROTATION = np.linalg.qr(RNG.standard_normal((6, 6)))[0].astype(np.float32)
BASIS = ROTATION[:, :2]


def moved(gate: Any, rotation: np.ndarray = ROTATION, strength: float = 1.0) -> np.ndarray:
    projector = rotation @ np.diag(np.asarray(gate, np.float32)) @ rotation.T
    return BASE + strength * (SOURCE - BASE) @ projector


EXPECTED: dict[str, tuple[Any, np.ndarray]] = {
    "interchange": (Interchange(SOURCE, BASIS, 0.5), moved([1, 1], BASIS, 0.5)),
    "rotated, by number": (RotatedInterchange(SOURCE, ROTATION, [1, 4]), moved([0, 1, 0, 0, 1, 0])),
    "rotated, by slice": (RotatedInterchange(SOURCE, ROTATION, slice(1, 5, 3)), moved([0, 1, 0, 0, 1, 0])),
    "rotated, by mask": (
        RotatedInterchange(SOURCE, ROTATION, np.isin(np.arange(6), (1, 4))), moved([0, 1, 0, 0, 1, 0]),
    ),
    "own coordinates": (RotatedInterchange(SOURCE, None, np.arange(6) < 2), moved([1, 1, 0, 0, 0, 0], np.eye(6))),
    "boundless": (BoundlessInterchange(SOURCE, ROTATION, 0.5), moved([1, 1, 1, 0, 0, 0])),
    "boundless, soft": (
        BoundlessInterchange(SOURCE, ROTATION, 0.5, 2.0), moved(1 / (1 + np.exp(-(3 - np.arange(6) - 0.5) / 2))),
    ),
    "masked": (MaskedInterchange(SOURCE, [1.0, -1, 2, -1, 0, 3], ROTATION), moved([1, 0, 1, 0, 0, 1])),
    "masked, tied": (MaskedInterchange(SOURCE, [0.5], None, 1.0), moved([1 / (1 + np.exp(-0.5))] * 6, np.eye(6))),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_formula(name: str, tmp_path: Path) -> None:
    intervention, right = EXPECTED[name]
    np.testing.assert_allclose(intervention(jnp.asarray(BASE), POINT), right, atol=2e-6)
    tljax.save_interventions([("blocks.0.hook_resid_post", intervention)], tmp_path / "one")
    ((_, read),) = tljax.load_interventions(tmp_path / "one")
    assert jax.tree.structure(read) == jax.tree.structure(intervention)
    np.testing.assert_array_equal(read(jnp.asarray(BASE), POINT), intervention(jnp.asarray(BASE), POINT))


def test_gates_harden() -> None:
    logits = np.asarray([0.3, -0.2, 0.01], np.float32)
    np.testing.assert_allclose(mask_gate(logits, 3, 1e-4), mask_gate(logits, 3), atol=1e-6)
    np.testing.assert_allclose(boundary_gate(np.float32(0.37), 8, 1e-3), boundary_gate(np.float32(0.37), 8), atol=1e-6)
    assert [int(boundary_gate(np.float32(share), 8).sum()) for share in (0.0, 0.4, 1.0)] == [0, 3, 8]


def test_a_placebo_moves_as_far_elsewhere() -> None:
    placebo = NormMatchedPlacebo(SOURCE, BASIS, ROTATION[:, 3:5])(jnp.asarray(BASE), POINT) - BASE
    wanted = moved([1, 1], BASIS) - BASE
    lengths = [np.linalg.norm(array, axis=-1) for array in (placebo, wanted)]
    np.testing.assert_allclose(*lengths, rtol=1e-4)
    np.testing.assert_allclose(np.asarray(placebo) @ BASIS, 0, atol=1e-5)

    def total(base: jax.Array) -> jax.Array:
        return NormMatchedPlacebo(BASE, BASIS, ROTATION[:, 3:5])(base, POINT).sum()

    assert np.isfinite(jax.grad(total)(jnp.asarray(BASE))).all()  # where source and base are the same, nothing moves


def test_a_stack_of_bases_is_vmapped() -> None:
    stack = np.stack([ROTATION[:, n : n + 1] for n in range(3)])
    found = jax.vmap(lambda basis: Interchange(SOURCE, basis, pos=-1)(jnp.asarray(BASE), POINT))(jnp.asarray(stack))
    for one, basis in zip(found, stack, strict=True):
        np.testing.assert_allclose(one[:, -1], moved([1], basis)[:, -1], atol=2e-6)
        np.testing.assert_array_equal(one[:, :-1], BASE[:, :-1])


@pytest.mark.parametrize(("kind", "name"), [("llama", "k"), ("sandwich", "z"), ("gpt2", "mlp_post")])
def test_at_points_of_heads_and_neurons(kind: str, name: str) -> None:
    """Another run's subspace at one head (of keys: a key/value head) or of neurons, each prompt at its own position."""
    model = build(kind)
    full = tljax.get_act_name(name, 1)
    source = model.run_with_cache(TOKENS[:, ::-1])[1][full]
    mine = model.run_with_cache(TOKENS)[1][full]
    width = mine.shape[-1]
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((width, 2)))[0].astype(np.float32)
    places = np.asarray([2, 4])
    mask = (np.arange(6)[None] == places[:, None]).reshape(2, 6, *(1,) * (mine.ndim - 2))
    at = {"head": 1} if mine.ndim == 4 else {}
    _, cache = model.with_hooks(fwd_hooks=[(full, Interchange(source, basis, mask=mask, **at))]).run_with_cache(TOKENS)
    right = np.array(mine)
    for row, place in enumerate(places):
        entry = (row, place, 1) if at else (row, place)
        right[entry] += (np.asarray(source[entry]) - right[entry]) @ basis @ basis.T
    np.testing.assert_allclose(cache[full], right, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Interchange(SOURCE, 2 * BASIS), "not orthonormal.*jnp.linalg.qr"),
        (lambda: Interchange(SOURCE, BASIS.T), "rank 6 does not fit into 2 dimensions. Did you mean its transpose"),
        (lambda: Interchange(SOURCE, BASIS[:, 0]), r"got shape \(6,\). For one direction pass direction\[:, None\]"),
        (lambda: Interchange(SOURCE, BASIS * np.nan), "not orthonormal"),
        (lambda: RotatedInterchange(SOURCE, ROTATION, [6]), "out of range: the rotation has 6"),
        (lambda: RotatedInterchange(SOURCE, ROTATION, np.ones(5)), r"weights of shape \(5,\): give one for each of 6"),
        (lambda: RotatedInterchange(SOURCE, None, [1]), "give a mask"),
        (lambda: MaskedInterchange(SOURCE, np.ones(4), ROTATION), r"got shape \(4,\) for 6 coordinates"),
    ],
)
def test_malformed_interchanges_are_refused(make: Any, message: str) -> None:
    with pytest.raises(InterventionError, match=message):
        make()
    with pytest.raises(InterventionError, match="basis has 6 rows; hook_resid_post has d_model of size 5"):
        Interchange(0.0, BASIS)(jnp.zeros((1, 2, 5)), POINT)
