"""Faithfulness and its kin: one call holds what separate runs give, and statistics are those of plain loops."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_circuit_runs import CLEAN, CORRUPTED, METRIC, model_once, plain, random_masks

from tljax import Batch
from tljax.circuits import (
    MIB_FRACTIONS,
    Circuit,
    CircuitResult,
    ResidualGraph,
    completeness,
    faithfulness,
    faithfulness_curve,
    minimality,
    select,
)
from tljax.patching import KL

BASE, SOURCE = Batch.from_rows(CLEAN), Batch.from_rows(CORRUPTED)


def ratio(values: Any, full: Any, empty: Any) -> np.ndarray:
    return (np.mean(values, axis=-1) - np.mean(empty)) / (np.mean(full) - np.mean(empty))


def test_a_curve_in_one_call_is_separate_runs() -> None:
    model = model_once("gpt2")
    graph = ResidualGraph.of(model)
    scores = np.random.default_rng(0).normal(size=graph.shape)
    curve = faithfulness_curve(model, scores, BASE, SOURCE, METRIC, fractions=(0.001, 0.3, 0.6, 0.9, 1.0), by="lowers")
    full, empty = plain(model, CLEAN), plain(model, CORRUPTED)
    assert (curve.n_edges == [select(scores, graph, fraction=f, by="lowers").sum() for f in curve.fractions]).all()
    for number, fraction in enumerate(curve.fractions):
        circuit = Circuit(select(scores, graph, fraction=fraction, by="lowers"), graph)
        one = faithfulness(model, circuit, BASE, SOURCE, METRIC)
        np.testing.assert_allclose(one.values, curve.values[number], atol=2e-5)
        assert one.n_edges == curve.n_edges[number] == circuit.n_edges
    np.testing.assert_allclose(curve.full, full, atol=2e-5)
    np.testing.assert_allclose(curve.empty, empty, atol=2e-5)
    np.testing.assert_allclose(curve.faithfulness(), ratio(curve.values, full, empty), atol=2e-5)
    assert abs(float(curve.faithfulness()[0])) < 1e-5  # no edge
    assert float(curve.faithfulness()[-1]) == 1
    assert np.ptp(np.asarray(curve.faithfulness())[1:4]) > 0.01
    several = faithfulness_curve(
        model, np.stack([scores, -scores]), BASE, SOURCE, METRIC, fractions=(0.3, 1.0), by="lowers", max_batch=2
    )
    np.testing.assert_allclose(several.faithfulness()[0], curve.faithfulness()[jnp.asarray([1, 4])], atol=2e-5)
    assert several.cpr().shape == (2,)
    assert several.plot() is not None


def test_completeness_and_minimality() -> None:
    model = model_once("gpt2")
    graph = ResidualGraph.of(model)
    circuit = Circuit(random_masks(graph), graph)
    rest = completeness(model, circuit, BASE, SOURCE, METRIC)
    np.testing.assert_allclose(
        rest.faithfulness(), faithfulness(model, circuit.complement(), BASE, SOURCE, METRIC).faithfulness(), atol=1e-5
    )
    edges = circuit.names()[5:8]
    found = minimality(model, circuit, BASE, SOURCE, METRIC, edges)
    whole = float(faithfulness(model, circuit, BASE, SOURCE, METRIC).faithfulness())
    for name, drop in zip(edges, found.drop(), strict=True):
        less = Circuit(circuit.mask & ~graph.mask([name]), graph)
        np.testing.assert_allclose(
            drop, whole - float(faithfulness(model, less, BASE, SOURCE, METRIC).faithfulness()), atol=2e-5
        )
    assert found.labels["edge"] == edges
    together = minimality(model, circuit, BASE, SOURCE, METRIC, {"all three": edges, "none": []})
    less = Circuit(circuit.mask & ~graph.mask(edges), graph)
    np.testing.assert_allclose(
        together.faithfulness(),
        [float(faithfulness(model, less, BASE, SOURCE, METRIC).faithfulness()), whole], atol=2e-5,
    )  # fmt: skip


def test_edges_left_out_by_the_class_of_their_readers() -> None:
    """Of a circuit that differs by position; every edge is in one class."""
    model = model_once("gpt2")
    graph = ResidualGraph.of(model)
    masks = np.stack([random_masks(graph) for _ in range(BASE.shape[1])])
    masks[0] = graph.edges
    circuit = Circuit(masks, graph, ("pos",))
    found = minimality(model, circuit, BASE, SOURCE, METRIC, "classes")
    assert found.labels["edge"] == ["into_qk", "into_v", "into_mlp", "into_logits"]
    whole = faithfulness(model, circuit, BASE, SOURCE, METRIC)
    np.testing.assert_allclose((float(whole.n_edges) - found.n_edges).sum(), float(whole.n_edges), rtol=1e-6)
    assert abs(found.faithfulness()[-1]) < 2e-5
    values = masks.copy()
    values[:, :, [number for number, reader in enumerate(graph.readers) if reader.kind == "v"]] = 0
    without = faithfulness(model, Circuit(values, graph, ("pos",)), BASE, SOURCE, METRIC)
    np.testing.assert_allclose(found.values[1], without.values, atol=2e-5)


def test_divergences_count_from_the_empty_circuit() -> None:
    model = model_once("gpt2")
    metric = KL(model(BASE), attention_mask=BASE.mask)
    result = faithfulness(model, Circuit.full(model), BASE, SOURCE, metric)
    np.testing.assert_allclose(result.full, 0, atol=1e-5)
    assert float(result.empty.mean()) > 0.01
    assert float(result.faithfulness()) == 1


def made(shares: Any, fractions: tuple[float, ...] = MIB_FRACTIONS) -> CircuitResult:
    """A curve of eight prompts with the given mean shares."""
    spread = np.random.default_rng(0).normal(size=(len(shares), 8))
    values = np.asarray(shares)[:, None] * 2 + 1 + spread - spread.mean(axis=1, keepdims=True)
    full, empty = jnp.full(8, 3.0), jnp.full(8, 1.0)
    return CircuitResult(
        jnp.asarray(values, jnp.float32), full, empty, np.zeros(len(shares)), ("fraction",), 9, fractions=fractions
    )


def test_areas_are_those_of_the_benchmark() -> None:
    np.testing.assert_allclose(made(np.ones(10)).cpr(), 0.999, atol=1e-6)
    np.testing.assert_allclose(made(np.ones(10)).cmd(), 0, atol=1e-6)
    np.testing.assert_allclose(made(np.ones(10)).cmd(from_zero=True), 0.0005, atol=1e-6)
    line = made(MIB_FRACTIONS)
    np.testing.assert_allclose([line.cpr(), line.cpr(from_zero=True)], [(1 - 1e-6) / 2, 0.5], atol=1e-6)
    np.testing.assert_allclose(line.average(), np.mean(MIB_FRACTIONS), atol=1e-6)
    above = made([0.0, 2.0], (0.5, 1.0))
    np.testing.assert_allclose([above.cpr(), above.cmd()], [0.5, 0.5], atol=1e-6)


def test_intervals_resample_prompts_or_clusters_and_take_the_ratio_last() -> None:
    result = made([0.2, 0.7, 1.0], (0.1, 0.5, 1.0))
    low, high = result.bootstrap_ci(n_resamples=400)
    assert (np.asarray(low) < np.asarray(result.faithfulness())).all()
    assert (np.asarray(high) > np.asarray(result.faithfulness())).all()
    clusters = np.repeat([0, 1], 4)
    ends = result.bootstrap_ci(n_resamples=400, clusters=clusters, confidence=0.999)
    parts = [np.asarray(result.values)[:, clusters == number] for number in (0, 1)]
    shares = np.stack([ratio(part, 3.0, 1.0) for part in parts])
    np.testing.assert_allclose(ends, [shares.min(axis=0), shares.max(axis=0)], atol=1e-5)
    cpr = result.bootstrap_ci(of="cpr", n_resamples=400)
    assert cpr[0] < result.cpr() < cpr[1]


def test_a_result_is_a_pytree() -> None:
    result = made([0.2, 0.7, 1.0], (0.1, 0.5, 1.0))
    np.testing.assert_allclose(jax.jit(lambda one: one.faithfulness())(result), result.faithfulness(), atol=1e-6)
    assert "CPR" in repr(result)


def test_operations_on_circuits() -> None:
    graph = ResidualGraph(2, 2, 2, 8)
    one, two = Circuit(random_masks(graph), graph), Circuit(random_masks(graph, share=0.4), graph)
    assert {*one.union(two).names()} == {*one.names(), *two.names()}
    assert {*one.intersection(two).names()} == {*one.names()} & {*two.names()}
    assert {*one.difference(two).names()} == {*one.names()} - {*two.names()}
    assert one.jaccard(one) == 1
    assert one.complement().complement().names() == one.names()
    assert one.n_edges + one.complement().n_edges == graph.n_edges
    assert one.names()[0] in one
    assert one.nodes[-1] == "logits"
    stack = Circuit.stack([one, two])
    assert stack[1].names() == two.names()
    assert [circuit.n_edges for circuit in stack] == list(stack.n_edges)
    assert Circuit.of(graph, one.names()).names() == one.names()
    with pytest.raises(TypeError):
        hash(one.mask)
