"""Every intervention at every kind of address, against numpy, plain and under jit, vmap and grad."""

import copy
import pickle
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import tljax
from tljax import Add, Chain, HookPoint, Intervention, Mean, Noise, Project, ProjectOut, Replace, Scale, Zero
from tljax.errors import InterventionError

Z = HookPoint("blocks.0.attn.hook_z", ("batch", "pos", "head", "d_head"))
RESID = HookPoint("blocks.0.hook_resid_post", ("batch", "pos", "d_model"))
PATTERN = HookPoint("blocks.0.attn.hook_pattern", ("batch", "head", "query_pos", "key_pos"))
SHAPES = {Z: (2, 5, 4, 3), RESID: (2, 5, 6), PATTERN: (2, 4, 5, 5)}


def activation(point: HookPoint) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPES[point]).astype(np.float32)


def selected(point: HookPoint, at: dict[str, Any]) -> np.ndarray:
    """Which entries an address picks, entry by entry."""
    where = np.ones(SHAPES[point], bool)
    for axis, index in at.items():
        number = point.axes.index(axis)
        one = np.zeros(SHAPES[point][number], bool)
        one[np.asarray(index) if not isinstance(index, slice) else index] = True
        shape = [1] * where.ndim
        shape[number] = len(one)
        where = where & one.reshape(shape)
    return where


ADDRESSES: list[tuple[HookPoint, dict[str, Any]]] = [
    (RESID, {}),
    (RESID, {"pos": 3}),
    (RESID, {"pos": -1}),
    (RESID, {"pos": [1, -1]}),
    (RESID, {"pos": slice(1, None, 2)}),
    (RESID, {"pos": np.array([True, False, True, False, False])}),
    (RESID, {"batch": 1, "pos": np.int64(0)}),
    (Z, {"head": 2}),
    (Z, {"head": [0, 3], "pos": 1}),
    (Z, {"head": jnp.array(1), "pos": slice(-2, None), "batch": 0}),
    (PATTERN, {"query_pos": 2, "key_pos": [0, 1]}),
    (PATTERN, {"head": 0, "key_pos": -1}),
]
DIRECTIONS = np.random.default_rng(3).standard_normal((2, 12)).astype(np.float32)


def projected(x: np.ndarray) -> np.ndarray:
    basis, _ = np.linalg.qr(DIRECTIONS[:, : x.shape[-1]].T.astype(np.float64))
    return x @ basis @ basis.T


OPERATIONS: dict[str, tuple[Any, Any]] = {
    "replace": (lambda x, **at: Replace(7.5, **at), lambda x: np.full_like(x, 7.5)),
    "replace_array": (lambda x, **at: Replace(np.cos(x), **at), np.cos),
    "add": (lambda x, **at: Add(np.sin(x), **at), lambda x: x + np.sin(x)),
    "add_trailing": (lambda x, **at: Add(np.arange(x.shape[-1]), **at), lambda x: x + np.arange(x.shape[-1])),
    "scale": (lambda x, **at: Scale(-2, **at), lambda x: -2 * x),
    "zero": (lambda x, **at: Zero(**at), np.zeros_like),
    "mean": (lambda x, **at: Mean(**at), lambda x: np.broadcast_to(x.mean(0, keepdims=True), x.shape)),
    "mean_of_reference": (
        lambda x, **at: Mean(np.concatenate([x, x + 3]), **at),
        lambda x: np.broadcast_to(x.mean(0, keepdims=True) + 1.5, x.shape),
    ),
    "mean_over_two": (
        lambda x, **at: Mean(over=("batch", "head" if x.ndim == 4 else "pos"), **at),
        None,
    ),
    "project": (lambda x, **at: Project(DIRECTIONS[:, : x.shape[-1]], **at), projected),
    "project_out": (lambda x, **at: ProjectOut(DIRECTIONS[:, : x.shape[-1]], **at), lambda x: x - projected(x)),
    "chain": (lambda x, **at: Chain(Add(1.0, **at), Scale(3.0, **at)), lambda x: 3 * (x + 1)),
}  # fmt: skip


@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_operation_at_every_address(operation: str) -> None:
    make, compute = OPERATIONS[operation]
    for point, at in ADDRESSES:
        if operation == "add_trailing" and isinstance(at.get(point.axes[-1]), int):
            continue  # the last axis is addressed by a number, so a vector lies along the one before it
        x = activation(point)
        if compute is None:
            axes = tuple(point.axes.index(axis) for axis in make(x).over)
            expected = np.broadcast_to(x.mean(axes, keepdims=True), x.shape)
        else:
            expected = compute(x)
        expected = np.where(selected(point, at), expected, x)
        np.testing.assert_allclose(make(x, **at)(jnp.asarray(x), point), expected, atol=1e-5, err_msg=str(at))


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "chain"])
def test_mask_confines_the_change(operation: str) -> None:
    x = activation(Z)
    mask = np.random.default_rng(5).random((2, 5, 1, 1)) > 0.5
    everywhere = np.asarray(OPERATIONS[operation][0](x)(jnp.asarray(x), Z))
    changed = OPERATIONS[operation][0](x, mask=mask, head=[1, 2])(jnp.asarray(x), Z)
    where = mask & selected(Z, {"head": [1, 2]})
    np.testing.assert_allclose(changed, np.where(where, everywhere, x), atol=1e-6)


@pytest.mark.parametrize("operation", ["replace_array", "scale", "zero", "mean", "project_out", "chain"])
def test_jit_vmap_and_a_new_position_share_one_program(operation: str) -> None:
    x = jnp.asarray(activation(RESID))
    make = OPERATIONS[operation][0]
    traces = []

    @jax.jit
    def apply(intervention: Intervention, value: jax.Array) -> jax.Array:
        traces.append(1)
        return intervention(value, RESID)

    for pos in (0, 3, -1):
        np.testing.assert_allclose(apply(make(x, pos=pos), x), make(x, pos=pos)(x, RESID), atol=1e-6)
    assert len(traces) == 1
    positions = jnp.array([0, 3, -1])
    together = jax.vmap(lambda pos: make(x, pos=pos)(x, RESID))(positions)
    for row, pos in zip(together, (0, 3, -1), strict=True):
        np.testing.assert_allclose(row, make(x, pos=pos)(x, RESID), atol=1e-6)
    stacked = jax.vmap(lambda pos: make(x, pos=pos))(positions)
    np.testing.assert_allclose(jax.vmap(lambda i: i(x, RESID))(stacked), together, atol=1e-6)


def test_gradient_of_add_is_the_gradient_at_the_selected_entries() -> None:
    x = jnp.asarray(activation(RESID))
    gradient = jax.grad(lambda i: (i(x, RESID) ** 2).sum())(Add(jnp.zeros_like(x), pos=2))
    expected = np.where(selected(RESID, {"pos": 2}), 2 * np.asarray(x), 0)
    np.testing.assert_allclose(gradient.value, expected, rtol=1e-5)
    np.testing.assert_array_equal(gradient.at[0].payload, 0)


def test_gradient_flows_around_replaced_entries() -> None:
    x = jnp.asarray(activation(RESID))
    gradient = jax.grad(lambda v: Replace(1.0, pos=2)(v, RESID).sum())(x)
    np.testing.assert_array_equal(gradient, ~selected(RESID, {"pos": 2}))


@pytest.mark.parametrize(
    ("value_shape", "at", "expand"),
    [
        ((6,), {"pos": 3}, (None, None)),
        ((2, 6), {"pos": 3}, (slice(None), None)),
        ((2, 5, 6), {"pos": 3}, ()),
        ((1, 6), {"batch": 0, "pos": 1}, (None,)),
        ((6,), {"batch": 0, "pos": 1}, (None, None)),
        ((5, 6), {"batch": 1}, (None,)),
        ((5, 6), {}, (None,)),
        ((), {"pos": 0}, (None, None, None)),
    ],
)
def test_operands_line_up(value_shape: tuple, at: dict, expand: tuple) -> None:
    x = activation(RESID)
    value = np.random.default_rng(2).standard_normal(value_shape).astype(np.float32)
    expected = np.where(selected(RESID, at), np.broadcast_to(value[expand], x.shape), x)
    np.testing.assert_array_equal(Replace(value, **at)(jnp.asarray(x), RESID), expected)


def test_one_row_for_each_number_of_a_list() -> None:
    x = activation(Z)
    rows = np.random.default_rng(2).standard_normal((2, 3)).astype(np.float32)
    changed = np.asarray(Replace(rows, pos=[3, 1], head=2)(jnp.asarray(x), Z))
    expected = x.copy()
    expected[:, 3, 2], expected[:, 1, 2] = rows
    np.testing.assert_array_equal(changed, expected)


def test_a_list_of_every_position_out_of_order_is_refused_as_ambiguous() -> None:
    x = activation(RESID)
    rows = np.random.default_rng(2).standard_normal((5, 6)).astype(np.float32)
    with pytest.raises(InterventionError, match=r"lists all 5 entries .* out of order: list them in order"):
        Replace(rows, pos=[4, 3, 2, 1, 0])(jnp.asarray(x), RESID)


def test_a_whole_activation_without_batch_axis_is_read_where_it_is_selected() -> None:
    x = activation(RESID)
    whole = np.random.default_rng(2).standard_normal((5, 6)).astype(np.float32)
    changed = np.asarray(Replace(whole, pos=3)(jnp.asarray(x), RESID))
    np.testing.assert_array_equal(changed[:, 3], np.stack([whole[3]] * 2))


@given(
    batch=st.none() | st.integers(-2, 1),
    pos=st.none() | st.integers(-5, 4) | st.lists(st.integers(-5, 4), min_size=1, max_size=4),
    head=st.none() | st.integers(-4, 3) | st.lists(st.booleans(), min_size=4, max_size=4),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_address_selects_what_numpy_selects(batch: Any, pos: Any, head: Any) -> None:
    at = {key: index for key, index in (("batch", batch), ("pos", pos), ("head", head)) if index is not None}
    zeroed = np.asarray(Zero(**at)(jnp.ones(SHAPES[Z]), Z)) == 0
    np.testing.assert_array_equal(zeroed, selected(Z, at))


def test_noise_is_reproducible_gaussian_and_confined() -> None:
    x = jnp.zeros((8, 5, 600))
    noise = np.asarray(Noise(2.0, seed=3, pos=[1, 2])(x, RESID))
    np.testing.assert_array_equal(noise, Noise(2.0, seed=3, pos=[1, 2])(x, RESID))
    assert np.abs(noise - np.asarray(Noise(2.0, seed=4, pos=[1, 2])(x, RESID))).max() > 1
    assert (noise[:, [0, 3, 4]] == 0).all()
    assert abs(noise[:, 1:3].std() - 2) < 0.1
    assert abs(noise[:, 1:3].mean()) < 0.1


def test_axis_aliases() -> None:
    neurons = HookPoint("mlp.hook_post", ("batch", "pos", "neuron"))
    x = jnp.ones((1, 2, 3))
    np.testing.assert_array_equal(Zero(d_mlp=1)(x, neurons), Zero(neuron=1)(x, neurons))
    p = jnp.asarray(activation(PATTERN))
    np.testing.assert_array_equal(Zero(dest=1, src=0)(p, PATTERN), Zero(query_pos=1, key_pos=0)(p, PATTERN))
    np.testing.assert_array_equal(Zero(pos=1)(p, PATTERN), Zero(query_pos=1)(p, PATTERN))
    np.testing.assert_array_equal(Zero(head_index=1)(p, PATTERN), Zero(head=1)(p, PATTERN))


ALL = [
    Replace(np.ones(3), pos=1, mask=np.ones((1, 1, 3), bool)), Add(1.0, head=[1, 2]), Scale(2.0, pos=slice(0, 3)),
    Zero(pos=np.array([True, False])), Mean(over=("batch", "pos")), Mean(np.ones((2, 2, 3)), pos=0),
    Project(np.ones(3)), ProjectOut(np.ones((2, 3)), batch=0), Noise(1.0, 3),
    Chain(Zero(pos=1), Chain(Add(1.0, head=2))),
]  # fmt: skip


@pytest.mark.parametrize("intervention", ALL, ids=repr)
def test_pytree_pickle_and_repr_round_trip(intervention: Intervention) -> None:
    leaves, treedef = jax.tree.flatten(intervention)
    again = jax.tree.unflatten(treedef, leaves)
    copies = [again, pickle.loads(pickle.dumps(intervention)), copy.deepcopy(intervention)]
    for other in copies:
        other_leaves, other_treedef = jax.tree.flatten(other)
        assert other_treedef == treedef
        for one, two in zip(leaves, other_leaves, strict=True):
            np.testing.assert_array_equal(one, two)
        assert repr(other) == repr(intervention)
    assert type(intervention).__name__ in repr(intervention)
    with pytest.raises(InterventionError, match="frozen"):
        intervention.value = 3  # type: ignore[attr-defined]


def test_leaves_are_floats_so_that_grad_takes_any_intervention() -> None:
    for intervention in ALL:
        for leaf in jax.tree.leaves(intervention):
            assert jnp.issubdtype(leaf.dtype, jnp.floating), intervention


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Zero(poss=3), "Zero has no axis 'poss'. Did you mean 'pos'"),
        (lambda: Zero(neurons=3), "Did you mean 'neuron'"),
        (lambda: Zero(pos=1.5), "pos= takes whole numbers, got dtype float"),
        (lambda: Zero(pos=True), "pos="),
        (lambda: Zero(pos=[[1, 2]]), r"got an array of shape \(1, 2\). For a mask over several axes use mask="),
        (lambda: Zero(head=1, head_index=2), "head"),
        (lambda: Chain(lambda x, hook: x), "Chain takes interventions, got function"),
    ],
)
def test_malformed_interventions_are_refused_when_made(make: Any, message: str) -> None:
    with pytest.raises(InterventionError, match=message):
        make()


@pytest.mark.parametrize(
    ("intervention", "point", "message"),
    [
        (Zero(head=1), RESID, r"Zero\(head=...\) cannot apply at blocks.0.hook_resid_post, which has axes"),
        (Zero(pos=5), RESID, r"pos=5 is out of range at blocks.0.hook_resid_post: the axis has 5 entries"),
        (Zero(pos=[0, -6]), RESID, "pos=-6 is out of range"),
        (Chain(Zero(), Zero(head=4)), Z, "head=4 is out of range"),
        (Zero(pos=np.ones(4, bool)), RESID, "The mask for axis 'pos' of .* has 4 entries; the axis has 5"),
        (Zero(mask=np.ones((2, 4, 1), bool)), RESID, r"The mask of shape \(2, 4, 1\) does not broadcast"),
        (Replace(np.ones(7)), RESID, r"Replace's value of shape \(7,\) does not fit"),
        (Add(np.ones((3, 6)), pos=[0, 1]), RESID, r"Add's value of shape \(3, 6\) does not fit"),
        (Mean(over="head"), RESID, r"Mean\(over='head'\) cannot apply"),
        (Mean(np.ones((5, 6)), over="batch"), RESID, "Mean"),
        (Project(np.ones(4)), RESID, r"Project needs directions of shape \[6\] or \[k, 6\]"),
        (Zero(pos=1, dest=2), PATTERN, "pos"),
    ],
    ids=repr,
)
def test_interventions_that_do_not_fit_are_refused(intervention: Any, point: HookPoint, message: str) -> None:
    with pytest.raises(InterventionError, match=message):
        intervention(jnp.asarray(activation(point)), point)


def test_dtype_is_kept() -> None:
    x = jnp.ones(SHAPES[RESID], jnp.bfloat16)
    for intervention in (
        Replace(np.float64(2)),
        Add(np.ones(6)),
        Scale(2),
        Zero(pos=1),
        Mean(),
        Noise(1.0),
        ProjectOut(np.ones(6)),
    ):
        assert intervention(x, RESID).dtype == jnp.bfloat16


def test_a_user_can_write_one() -> None:
    class Clip(tljax.Intervention):
        arrays = ("limit",)

        def __init__(self, limit: Any, **at: Any) -> None:
            super().__init__(**at)
            self._set("limit", jnp.asarray(limit, jnp.float32))

        def transform(self, value: jax.Array, hook: HookPoint) -> jax.Array:
            return jnp.clip(value, -self.limit, self.limit)

    x = activation(RESID)
    changed = jax.jit(lambda i, v: i(v, RESID))(Clip(0.5, pos=2), x)
    np.testing.assert_allclose(changed, np.where(selected(RESID, {"pos": 2}), np.clip(x, -0.5, 0.5), x))
