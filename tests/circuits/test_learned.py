"""Circuits learned by gradient descent: a known one is found; draws, padding, ablations, stacks, reproducibility."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from induction import CIRCUIT, LENGTH, V, induction_model, induction_prompts
from test_masked import model_of

from tljax import Batch, HookedTransformer
from tljax.circuits import LearnedCircuit, ResidualGraph, learn_circuit, optimal_constants
from tljax.circuits.search.gates import hard_concrete, open_chance, uniform_gradient
from tljax.circuits.search.pairs import read_pairs, replacement_of
from tljax.circuits.writers import writer_outputs, writer_points
from tljax.patching import LogitDiff

QUICK: dict[str, Any] = {"batch_size": 16, "progress": False}


@pytest.fixture(scope="module")
def toy() -> HookedTransformer:
    return induction_model()


def auroc(scores: np.ndarray, truth: np.ndarray, edges: np.ndarray) -> float:
    inside, outside = scores[truth][:, None], scores[edges & ~truth][None]
    return float((inside > outside).mean() + (inside == outside).mean() / 2)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("edge_pruning", {"target": 24 / 29}),
        ("ugs", {"penalty": 0.02, "learning_rate": 0.1}),
        ("subnetwork_probing", {"penalty": 3.0}),
    ],
)
def test_a_known_circuit_is_found(toy: HookedTransformer, method: Any, options: dict[str, Any]) -> None:
    base, source, answers = induction_prompts(64, seed=0)
    assert (np.asarray(toy(base))[:, -1].argmax(axis=-1) == answers).all()
    graph = ResidualGraph.of(toy)
    truth = graph.mask(CIRCUIT)
    found = learn_circuit(toy, base, source, method=method, steps=150, **options, **QUICK)
    assert auroc(found.scores, truth, graph.edges) == 1.0
    assert set(graph.names(found.mask)) == set(CIRCUIT)
    assert (found.top(5) == truth).all()
    assert found.distance < 1e-4 < 3 < found.empty_distance
    assert found.history["kept"].shape == (150,)
    assert "5 of 29 edges" in repr(found)


def test_a_stack_is_what_each_circuit_is_alone_and_other_numbers_compile_nothing(
    toy: HookedTransformer, compilations: Any
) -> None:
    base, source, _ = induction_prompts(40, seed=1)

    def learned(seed: Any, target: Any, **options: Any) -> LearnedCircuit:
        return learn_circuit(toy, base, source, seed=seed, target=target, steps=12, **options, **QUICK)

    stack = learned([3, 5], [0.5, 0.8])
    assert stack.mask.shape == (2, *stack.graph.shape)
    one, again = (learned(5, 0.8) for _ in range(2))
    np.testing.assert_array_equal(one.scores, again.scores)
    np.testing.assert_allclose(stack[1].scores, one.scores, atol=1e-3)
    assert (stack[1].settings.seed, stack[1].settings.target) == ((5,), (0.8,))
    edges = one.graph.edges
    assert np.abs(stack[0].scores[edges] - one.scores[edges]).max() > 0.01
    before = compilations.count
    learned(6, 0.7, learning_rate=0.3)
    assert compilations.count == before


def test_draws_have_the_chances_and_gradients_they_should() -> None:
    uniform = jnp.asarray((np.arange(20_000) + 0.5) / 20_000, jnp.float32)
    for log_alpha in (-2.0, 0.0, 1.5):
        drawn = hard_concrete(jnp.full(20_000, log_alpha), uniform)
        assert float((drawn > 0).mean()) == pytest.approx(float(open_chance(jnp.float32(log_alpha))), abs=1e-3)
        theta = jnp.full(20_000, log_alpha)
        chance = float(jax.nn.sigmoid(log_alpha))
        slope = jax.grad(lambda t: uniform_gradient(t, uniform).sum())(theta)
        assert float(uniform_gradient(theta, uniform).mean()) == pytest.approx(chance, abs=1e-3)
        assert float(slope.mean()) == pytest.approx(chance * (1 - chance), rel=1e-2)  # that of the chance itself


@pytest.mark.parametrize(("kind", "padding"), [("gemma2", "left"), ("mixtral", "right")])
def test_without_edges_a_circuit_is_the_source_run_whatever_the_block_and_the_padding(kind: str, padding: str) -> None:
    model, rng = model_of(kind), np.random.default_rng(0)
    base = rng.integers(1, 50, (3, 7))
    source = np.where(np.arange(7) == 3, rng.integers(1, 50, (3, 1)), base)
    mask = np.ones((3, 7), bool)
    mask[0] = np.arange(7) >= 2 if padding == "left" else np.arange(7) < 5
    last = (np.arange(3), (mask * np.arange(7)).max(axis=1))
    clean, corrupted = (jax.nn.log_softmax(model(ids, attention_mask=mask)[last]) for ids in (base, source))
    expected = float((jnp.exp(clean) * (clean - corrupted)).sum(axis=-1).mean())
    batches = [Batch.from_mask(ids, mask) for ids in (base, source)]
    graph = ResidualGraph.of(model, experts=kind == "mixtral")
    found = learn_circuit(model, *batches, steps=2, target=0.5, graph=graph, batch_size=2, progress=False)
    assert found.empty_distance == pytest.approx(expected, rel=1e-4)
    assert found.mask.shape == graph.shape


def test_what_absent_edges_carry_is_what_was_asked_for(toy: HookedTransformer) -> None:
    base, source, _ = induction_prompts(5, seed=2)
    graph, mask = ResidualGraph.of(toy), np.ones((5, LENGTH), bool)
    mask[0, -2:] = False
    batch = Batch.from_mask(source, mask)
    _, cache = toy.run_with_cache(batch, names_filter=list(writer_points(graph)))
    every = np.asarray(writer_outputs(toy.cfg, toy.params, graph, cache.cache_dict))
    weights = (mask / mask.sum(axis=1, keepdims=True))[..., None, None]
    wanted = {
        "mean": (every * weights).sum(axis=1).mean(axis=0)[None, None],
        "positional_mean": ((every * mask[..., None, None]).sum(axis=0) / mask.sum(axis=0)[:, None, None])[None],
        "zero": np.zeros((1, 1, graph.n_writers, graph.d_model)),
    }
    for ablation, right in wanted.items():
        pairs, _ = read_pairs(toy, graph, base, batch, ablation, None, None, 2)
        got = replacement_of(toy.cfg, toy.params, graph, pairs)
        np.testing.assert_allclose(got, np.broadcast_to(right, got.shape), atol=1e-5)


def test_prompts_of_other_lengths_go_by_their_alignment(toy: HookedTransformer) -> None:
    base, source, _ = induction_prompts(3, seed=3)
    aligned = np.tile([0, 2, -1, 3, 4, 5], (3, 1))
    graph = ResidualGraph.of(toy)
    pairs, _ = read_pairs(toy, graph, base[:, :6], source, "patching", None, aligned, 2)
    runs = [toy.run_with_cache(ids, names_filter=list(writer_points(graph)))[1] for ids in (base[:, :6], source)]
    own, other = (np.asarray(writer_outputs(toy.cfg, toy.params, graph, run.cache_dict)) for run in runs)
    wanted = np.where((aligned >= 0)[..., None, None], other[:, np.maximum(aligned[0], 0)], own)
    np.testing.assert_allclose(replacement_of(toy.cfg, toy.params, graph, pairs), wanted, atol=1e-5)


def test_a_metric_is_kept_and_its_numbers_go_with_their_prompts(toy: HookedTransformer) -> None:
    base, source, answers = induction_prompts(12, seed=4)
    metric = LogitDiff(answers, (answers + 1) % V)
    found = learn_circuit(toy, base, source, metric, target=0.5, steps=2, batch_size=5, progress=False)
    logits = toy(base), toy(source)
    expected = float(((metric(logits[1]) - metric(logits[0])) ** 2).mean())
    assert found.empty_distance == pytest.approx(expected, rel=1e-4)


def test_learned_constants_do_less_harm_than_means(toy: HookedTransformer) -> None:
    base, _, _ = induction_prompts(32, seed=5)
    graph = ResidualGraph.of(toy)
    mask = graph.mask(CIRCUIT[1:])
    empty = optimal_constants(toy, base, graph.mask(), steps=60, **QUICK)
    constants = optimal_constants(toy, base, np.stack([mask, ~mask & graph.edges]), steps=60, **QUICK)
    assert {name: value.shape[1:] for name, value in constants.items()} == {
        name: value.shape for name, value in empty.items()
    }

    def harm(ablation: Any) -> float:
        return learn_circuit(toy, base, ablation=ablation, steps=1, target=0.5, **QUICK).empty_distance

    assert harm(empty) < harm("mean") - 1e-3
    together = learn_circuit(toy, base, ablation="optimal", target=0.5, steps=5, **QUICK)
    alone = together.circuit().run(toy, base, ablation=together.constants)[:, -1]
    model, circuit = (jax.nn.log_softmax(logits) for logits in (toy(base)[:, -1], alone))
    far = float((jnp.exp(model) * (model - circuit)).sum(axis=-1).mean())
    assert together.distance == pytest.approx(far, rel=1e-3)
