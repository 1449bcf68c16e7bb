"""Circuits as they run: held to plain runs, to hooks that write the replacement, and to path patching."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_masked import KINDS, model_of

from tljax import Batch, HookedTransformer, Replace
from tljax.circuits import Circuit, ResidualGraph, mean_activations
from tljax.circuits.writers import writer_points
from tljax.patching import LogitDiff, path_patch

RNG = np.random.default_rng(0)
METRIC = LogitDiff([3, 5, 7], [4, 6, 8])
CLEAN = [RNG.integers(1, 50, length) for length in (7, 5, 6)]
CORRUPTED = [np.where(np.arange(len(row)) == 2, (row + 11) % 49 + 1, row) for row in CLEAN]
MODELS: dict[str, HookedTransformer] = {}


def model_once(kind: str) -> HookedTransformer:
    return MODELS.setdefault(kind, model_of(kind))


def plain(model: HookedTransformer, rows: Any, hooks: Any = ()) -> np.ndarray:
    """The metric of prompts in a plain run."""
    batch = Batch.from_rows(rows, "right")
    return np.asarray(METRIC.in_text(batch)(model.run_with_hooks(batch, fwd_hooks=list(hooks))))


def random_masks(graph: ResidualGraph, *shape: int, share: float = 0.7) -> np.ndarray:
    return (np.random.default_rng(1).random((*shape, *graph.shape)) < share) & graph.edges


@pytest.mark.parametrize("kind", KINDS)
def test_all_edges_are_the_clean_run_and_none_the_corrupted_one_whatever_the_padding(kind: str) -> None:
    model = model_once(kind)
    graph = ResidualGraph.of(model, experts=kind == "mixtral")
    some = Circuit(random_masks(graph), graph)
    circuits = Circuit.stack([Circuit.full(graph), Circuit.empty(graph), some, some.complement()])
    left, right = (Batch.from_rows(CLEAN, side) for side in ("left", "right"))
    got = circuits.run(model, left, Batch.from_rows(CORRUPTED, "right"), metric=METRIC)  # the source padded elsewhere
    np.testing.assert_allclose(got[0], plain(model, CLEAN), atol=2e-5)
    np.testing.assert_allclose(got[1], plain(model, CORRUPTED), atol=2e-5)
    other = circuits.run(model, right, Batch.from_rows(CORRUPTED, "left"), metric=METRIC)
    np.testing.assert_allclose(got, other, atol=2e-5)
    assert jnp.abs(got[2] - got[0]).max() > 1e-3
    assert jnp.abs(got[3] - got[1]).max() > 1e-3


@pytest.mark.parametrize("kind", ["gpt2", "neox"])
def test_one_absent_edge_is_path_patching_with_frozen_mlps(kind: str) -> None:
    model = model_once(kind)
    graph = ResidualGraph.of(model)
    base, source = np.stack([row[:5] for row in CLEAN]), np.stack([row[:5] for row in CORRUPTED])
    masks = np.repeat(graph.edges[None], 4, axis=0)
    for head in range(4):
        masks[(head, *graph.edge(f"a0.h{head}->a1.h2<k>"))] = False
    got = Circuit(masks, graph).run(model, base, source, metric=METRIC)
    expected = path_patch(model, base, source, METRIC, [("k", 1, 2)], "z", layers=[0], freeze_mlps=True, reduce="none")
    assert jnp.abs(expected.effect()).max() > 0.01
    np.testing.assert_allclose(got, expected.values[0], atol=2e-5)


def brute_means(model: HookedTransformer, rows: Any, by_position: bool) -> dict[str, list[np.ndarray]]:
    """Means of each writer's activations over prompts: a list over positions, or of one entry."""
    names = list(writer_points(ResidualGraph.of(model)))
    cache = model.run_with_cache(Batch.from_rows(rows, "right"), names_filter=names)[1]
    means: dict[str, list[np.ndarray]] = {}
    for name in names:
        values = [np.asarray(cache[name], np.float64)[n, : len(row)] for n, row in enumerate(rows)]
        longest = max(map(len, values))
        means[name] = (
            [np.mean([value[p] for value in values if len(value) > p], axis=0) for p in range(longest)]
            if by_position
            else [np.mean([value.mean(axis=0) for value in values], axis=0)]
        )
    return means


@pytest.mark.parametrize(
    ("ablation", "kind"), [(one, "gpt2") for one in ("zero", "positional_mean", "mean")] + [("mean", "gemma2")]
)
def test_without_edges_every_writer_is_replaced(ablation: Any, kind: str) -> None:
    model = model_once(kind)
    references = [*CORRUPTED, (CLEAN[0] + 5) % 49 + 1]
    means = brute_means(model, references, ablation == "positional_mean")
    hooks = []
    for name, mean in means.items():
        value = np.stack(mean if len(mean) > 1 else mean * 7)[None] * (ablation != "zero")
        hooks.append((name, Replace(jnp.asarray(np.repeat(value, 3, axis=0), jnp.float32))))
    expected = plain(model, CLEAN, hooks), plain(model, CLEAN)
    graph = ResidualGraph.of(model)
    circuits = Circuit(np.stack([np.zeros(graph.shape, bool), graph.edges, *random_masks(graph, 2)]), graph)
    got = jnp.zeros(())
    for side in ("left", "right"):
        source = None if ablation == "zero" else Batch.from_rows(references, side)
        got = circuits.run(model, Batch.from_rows(CLEAN, side), source, metric=METRIC, ablation=ablation)
        np.testing.assert_allclose(got[:2], expected, atol=3e-5)
    if ablation == "mean":
        once = mean_activations(model, Batch.from_rows(references), batch_size=3)
        for given in (once, {name: value[0] for name, value in once.items()}):
            again = circuits.run(model, Batch.from_rows(CLEAN, "right"), metric=METRIC, ablation=given)
            np.testing.assert_allclose(again, got, atol=2e-5)


def test_unequal_lengths_go_by_an_alignment() -> None:
    model = model_once("gpt2")
    graph, names = ResidualGraph.of(model), writer_points(ResidualGraph.of(model))
    source = [np.insert(row, 3, 9)[:7] for row in CORRUPTED]  # one token more, and the longest cut
    source[1] = CORRUPTED[1][1:]  # one less
    base, other = Batch.from_rows(CLEAN, "right"), Batch.from_rows(source, "left")
    aligned = np.full(base.shape, -1)
    own, cache = (model.run_with_cache(batch, names_filter=list(names))[1] for batch in (base, other))
    values = {name: np.array(own[name]) for name in names}
    for number, row in enumerate(CLEAN):
        there = np.flatnonzero(other.mask[number])
        for place in range(len(row)):
            counterpart = place - 1 if number == 1 else place + (place > 2)
            if 0 <= counterpart < len(there):
                aligned[number, place] = there[counterpart]
                for name in names:
                    values[name][number, place] = cache[name][number, there[counterpart]]
    assert (aligned[np.asarray(base.mask)] == -1).sum() == 2
    hooks = [(name, Replace(jnp.asarray(value))) for name, value in values.items()]
    circuits = Circuit(np.stack([np.zeros(graph.shape, bool), graph.edges, *random_masks(graph, 2)]), graph)
    got = circuits.run(model, base, other, metric=METRIC, align=aligned)
    np.testing.assert_allclose(got[:2], [plain(model, CLEAN, hooks), plain(model, CLEAN)], atol=2e-5)
    chunked = circuits.run(model, base, other, metric=METRIC, align=aligned, batch_size=2)
    np.testing.assert_allclose(chunked, got, atol=2e-5)


def test_masks_of_each_prompt_and_position() -> None:
    model = model_once("gpt2")
    graph = ResidualGraph.of(model)
    base, source = Batch.from_rows(CLEAN, "left"), Batch.from_rows(CORRUPTED, "left")
    by_prompt = random_masks(graph, 4, 3)
    got = Circuit(by_prompt, graph, ("circuit", "batch")).run(model, base, source, metric=METRIC)
    for prompt in range(3):
        own = Circuit(by_prompt[:, prompt], graph).run(model, base, source, metric=METRIC)
        np.testing.assert_allclose(got[:, prompt], own[:, prompt], atol=2e-5)
    edge = graph.edge("a0.h1->logits")  # at one position of the text, all prompts' last but one
    last = np.repeat(graph.edges[None, None], 7, axis=1).repeat(4, axis=0)
    for circuit, pos in enumerate((4, 5, 6, 0)):
        last[(circuit, pos, *edge)] = False
    got = Circuit(last, graph, ("circuit", "pos")).run(model, base, source, metric=METRIC)
    whole = Circuit(graph.edges & ~graph.mask(["a0.h1->logits"]), graph).run(model, base, source, metric=METRIC)
    clean = plain(model, CLEAN)
    for circuit, prompt in ((0, 1), (1, 2), (2, 0)):  # prompts have 7, 5 and 6 tokens: each reads its own last one
        expected = clean.copy()
        expected[prompt] = whole[prompt]
        np.testing.assert_allclose(got[circuit], expected, atol=2e-5)
    np.testing.assert_allclose(got[3], clean, atol=2e-5)
    assert np.abs(np.asarray(whole) - clean).max() > 1e-3


def test_gradients_traces_and_other_numbers(compilations: Any) -> None:
    model = model_once("gpt2")
    graph = ResidualGraph.of(model)
    base, source = CLEAN[0][None], CORRUPTED[0][None]
    metric = LogitDiff(3, 4)
    soft = jnp.asarray(np.random.default_rng(2).random(graph.shape), jnp.float32)

    def measured(mask: Any) -> jax.Array:
        return Circuit(mask, graph).run(model, base, source, metric=metric)[0]

    value, gradient = jax.jit(jax.value_and_grad(measured))(soft)
    direction = jnp.asarray(np.random.default_rng(3).normal(size=graph.shape), jnp.float32)
    steps = jnp.stack([soft + 1e-2 * direction, soft - 1e-2 * direction])
    apart = Circuit(steps, graph).run(model, base, source, metric=metric)[:, 0]
    np.testing.assert_allclose(measured(soft), value, atol=2e-5)
    np.testing.assert_allclose((apart[0] - apart[1]) / 2e-2, (gradient * direction).sum(), rtol=2e-2)
    np.testing.assert_allclose(jax.vmap(measured)(steps), apart, atol=2e-5)
    assert (np.asarray(gradient)[~graph.edges] == 0).all()
    before = compilations.count
    shorter = np.concatenate([base, base])[:1, :6], np.concatenate([source, source])[:1, :6]
    Circuit(1 - steps, graph).run(model, *shorter, metric=LogitDiff(7, 8))
    assert compilations.count - before <= 2  # of another length: how the logits' position is cut
