"""Feature circuits: edges are Jacobian-vector products with all else held, and add up; faithfulness is a masked run."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from double_precision import double_precision
from feature_models import METRIC, OTHERS, TOKENS, dictionary, plain_model, with_value

from tljax import HookedTransformer, Replace
from tljax.dictionaries.attribution import (
    FeatureCircuit,
    feature_circuit,
    feature_completeness,
    feature_effects,
    feature_faithfulness,
)
from tljax.errors import CheckpointError, InputError

SITES = [
    ("blocks.0.hook_resid_pre", None), ("blocks.1.hook_attn_out", None),
    ("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"), ("blocks.2.hook_resid_pre", None),
]  # fmt: skip
POINTS = tuple(written or read for read, written in SITES)


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with double_precision():
        yield


def model_of(gradient: Any = "stop") -> HookedTransformer:
    if gradient not in _made:
        given = [dictionary(*site, d_sae=10 + n, seed=n, dtype="float64") for n, site in enumerate(SITES)]
        _made[gradient] = plain_model(dtype="float64").with_dictionaries(given, gradient=gradient)
    return _made[gradient]


_made: dict[str, HookedTransformer] = {}


def held(model: HookedTransformer, tokens: Any = TOKENS) -> dict[str, np.ndarray]:
    cache = model.run_with_cache(tokens)[1]
    return {name: np.array(cache[name]) for name in cache if name.endswith(("hook_sae_acts_post", "hook_sae_error"))}


def whole(model: HookedTransformer, **options: Any) -> FeatureCircuit:
    usual = {"method": "gradient", "source": OTHERS, "node_threshold": 0.0, "edge_threshold": 0.0}
    return feature_circuit(model, TOKENS, METRIC, **(usual | options))


@pytest.mark.parametrize(("gradient", "by_position"), [("stop", False), ("stop", True), ("pass", True)])
def test_edges_out_of_a_node_add_up_to_its_effect(gradient: str, by_position: bool) -> None:
    """The chain rule: direct effects through other nodes, and that on the metric itself, are the whole effect."""
    circuit = whole(model_of(gradient), by_position=by_position)
    sums = np.bincount(circuit.source, circuit.weight, circuit.n_nodes)
    features = circuit.feature >= 0
    assert features.sum() > 10
    assert (~features).sum() >= 4
    np.testing.assert_allclose(sums, circuit.effect, rtol=1e-8, atol=1e-12)
    into_errors = circuit.feature[circuit.target[circuit.target < circuit.n_nodes]] < 0
    assert into_errors.any() == (gradient == "pass")


def test_edges_are_jacobian_vector_products_with_all_else_held() -> None:
    model = model_of()
    circuit, cache, values = whole(model, by_position=True), held(model), held(model, OTHERS)
    grads = model.run_with_grads(TOKENS, METRIC, [f"{point}.hook_sae_acts_post" for point in POINTS]).grads
    rng, checked = np.random.default_rng(0), 0
    inner = np.flatnonzero((circuit.target < circuit.n_nodes) & (np.abs(circuit.weight) > 1e-7))
    for number in rng.permutation(inner)[:8]:
        up, down = circuit.node(int(circuit.source[number])), circuit.node(int(circuit.target[number]))
        ends = "hook_sae_error" if up.feature < 0 else "hook_sae_acts_post"
        source, target = f"{up.point}.{ends}", f"{down.point}.hook_sae_acts_post"
        delta = np.zeros_like(cache[source])
        at = (slice(None), up.pos) if up.feature < 0 else (slice(None), up.pos, up.feature)
        delta[at] = (values[source] - cache[source])[at]
        frozen = [(name, Replace(value)) for name, value in cache.items() if not name.startswith(f"{down.point}.")]

        def through(step: float, frozen=frozen, source=source, delta=delta, target=target) -> np.ndarray:
            hooks = [*frozen, (source, Replace(cache[source] + step * delta))]
            with model.hooks(fwd_hooks=hooks) as hooked:
                return np.asarray(hooked.run_with_cache(TOKENS, names_filter=[target])[1][target])

        moved = (through(1e-6) - through(-1e-6)) / 2e-6  # a central difference
        at_target = (slice(None), down.pos, down.feature)
        right = (np.asarray(grads[target]) * moved)[at_target].sum() / 2
        assert circuit.weight[number] == pytest.approx(right, rel=1e-5, abs=1e-10)
        checked += 1
    assert checked == 8


@pytest.mark.parametrize("method", ["gradient", "exact"])
def test_nodes_are_effects_over_a_threshold(method: Any) -> None:
    model, points = model_of(), POINTS if method == "gradient" else POINTS[3:]
    options: Any = {"source": OTHERS, "method": method, "points": points}
    effects = feature_effects(model, TOKENS, METRIC, **options)
    circuit = feature_circuit(model, TOKENS, METRIC, node_threshold=0.002, edge_threshold=1e-4, **options)
    for number, point in enumerate(points):
        sums = effects.by_feature(point)
        own = (circuit.point == number) & (circuit.feature >= 0)
        assert set(circuit.feature[own]) == {feature for feature, value in sums.items() if abs(value) >= 0.002}
        np.testing.assert_allclose(circuit.effect[own], [sums[int(n)] for n in circuit.feature[own]], atol=1e-10)
        error = effects.error_effect[number].sum() / 2
        assert ((circuit.point == number) & (circuit.feature < 0)).any() == (abs(error) >= 0.002)
    assert 2 < circuit.n_nodes < whole(model, points=points).n_nodes
    assert (np.abs(circuit.weight) >= 1e-4).all()
    smaller = circuit.select(node_threshold=0.01)
    again = feature_circuit(model, TOKENS, METRIC, node_threshold=0.01, edge_threshold=1e-4, **options)
    assert smaller.edges == pytest.approx(again.edges)
    assert smaller.nodes == again.nodes
    with pytest.raises(InputError, match="Find it anew"):
        circuit.select(node_threshold=0.001)


def test_integrated_gradients_weight_edges_by_the_mean_gradient() -> None:
    """Edges into a node scale with the gradient that its own effect was found with."""
    model = model_of()
    mean, first = whole(model, method="ig", steps=4), whole(model)
    cache, values = held(model), held(model, OTHERS)
    name = f"{POINTS[3]}.hook_sae_acts_post"
    delta = values[name] - cache[name]
    edges, other = mean.edges, first.edges
    for target in (node for node in first.nodes if node.point == POINTS[3] and node.feature >= 0):
        if np.count_nonzero(delta[..., target.feature]) == 1 and (f"{POINTS[0]}:0", target.name) in edges:
            twin = next(node for node in mean.nodes if node.name == target.name)
            key = (f"{POINTS[0]}:0", target.name)
            assert edges[key] / other[key] == pytest.approx(twin.effect / target.effect)
    assert edges.keys() >= {(f"{POINTS[1]}:{n}", "metric") for n in range(3)} & other.keys()


def masked(model: HookedTransformer, circuit: FeatureCircuit, values: Any, keep_errors: Any, outside: bool) -> float:
    """The metric with all nodes on one side of a circuit replaced, by hooks that see the running values."""
    hooks = []
    for number, point in enumerate(circuit.points):
        own = circuit.point == number
        inside = np.isin(np.arange(circuit.widths[number]), circuit.feature[own])
        error = (circuit.feature[own] < 0).any() if keep_errors is None else keep_errors
        gone = ~inside if outside else inside
        name = f"{point}.hook_sae_acts_post"
        hooks.append((name, lambda act, hook, gone=gone, name=name: np.where(gone, values[name], act)))
        if not (error if outside or keep_errors is not None else not error):
            hooks.append((f"{point}.hook_sae_error", lambda act, hook: values[hook.name]))
    return float(np.mean(np.asarray(METRIC(model.run_with_hooks(TOKENS, fwd_hooks=hooks)))))


@pytest.mark.parametrize("ablation", ["mean", "zero", "patching"])
def test_faithfulness_equals_a_run_with_hooks(ablation: Any) -> None:
    model = model_of()
    circuit = whole(model, node_threshold=0.01)
    values = held(model, OTHERS)
    if ablation == "mean":
        values = {name: np.broadcast_to(value.mean(axis=0), value.shape) for name, value in values.items()}
    if ablation == "zero":
        values = {name: np.zeros_like(value) for name, value in values.items()}
    source = None if ablation == "zero" else OTHERS
    full = float(np.mean(np.asarray(METRIC(model(TOKENS)))))
    empty = with_value(model, TOKENS, values).mean()
    choices: list[tuple[Any, bool | None]] = [("default", None), ("keep", True), ("remove", False)]
    for errors, kept in choices:
        found = feature_faithfulness(model, circuit, TOKENS, METRIC, source=source, ablation=ablation, errors=errors)
        right = (masked(model, circuit, values, kept, True) - empty) / (full - empty)
        assert found.share == pytest.approx(right, abs=1e-8)
    found = feature_completeness(model, circuit, TOKENS, METRIC, source=source, ablation=ablation)
    right = (masked(model, circuit, values, None, False) - empty) / (full - empty)
    assert found.share == pytest.approx(right, abs=1e-8)


def test_the_whole_circuit_is_faithful_and_the_empty_one_is_not() -> None:
    model = model_of()
    every = whole(model, source=None)
    none = every.select(node_threshold=1e9)
    assert feature_faithfulness(model, every, TOKENS, METRIC, ablation="zero").share == pytest.approx(1.0)
    assert feature_faithfulness(model, none, TOKENS, METRIC, ablation="zero").share == pytest.approx(0.0)
    assert feature_completeness(model, none, TOKENS, METRIC, ablation="zero").share == pytest.approx(1.0)
    late = feature_faithfulness(model, none, TOKENS, METRIC, ablation="zero", start_layer=2)
    changed = {name: np.zeros_like(value) for name, value in held(model).items() if name.startswith("blocks.2.")}
    np.testing.assert_allclose(late.values, with_value(model, TOKENS, changed), atol=1e-8)
    by_position = whole(model, source=None, by_position=True)
    assert feature_faithfulness(model, by_position, TOKENS, METRIC, ablation="zero").share == pytest.approx(1.0)


def test_files_and_pictures(tmp_path: Any) -> None:
    model = model_of()
    circuit = whole(model, node_threshold=0.01, edge_threshold=1e-3)
    circuit.to_json(tmp_path / "circuit.json")
    again = FeatureCircuit.from_json(tmp_path / "circuit.json", model)
    assert again.nodes == circuit.nodes
    assert again.edges == circuit.edges
    assert again.convention == circuit.convention
    other = plain_model(dtype="float64").with_dictionaries(
        [dictionary(*site, d_sae=10 + n, seed=n + 7, dtype="float64") for n, site in enumerate(SITES)]
    )
    with pytest.raises(CheckpointError, match="another dictionary"):
        FeatureCircuit.from_json(tmp_path / "circuit.json", other)
    (tmp_path / "cut.json").write_bytes((tmp_path / "circuit.json").read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="damaged"):
        FeatureCircuit.from_json(tmp_path / "cut.json")
    picture = circuit.picture(k=20, title="A circuit", names={circuit.nodes[0].name: "names"})
    assert len(picture.names) == 20
    assert picture.names[-1] == " -> ".join(next(iter(circuit.edges)))
    page = picture.page().html
    assert "<svg" in page
    assert "metric" in page
    assert "resid_pre 2" in page
    picture.save(tmp_path / "circuit.svg")
    assert "FeatureCircuit(" in repr(circuit)
