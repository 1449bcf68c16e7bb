"""Exact effects of edges: equal to whole runs in which one edge is absent, and to path patching with one receiver."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from variants import build

from tljax import HookedTransformer
from tljax.attribution import Verify
from tljax.circuits.graph import ResidualGraph
from tljax.circuits.masked import masked_stream
from tljax.circuits.scores.edges import edge_scores
from tljax.circuits.scores.exact import ExactEffects, exact_edge_effects, exact_points
from tljax.circuits.scores.verification import verify_edges
from tljax.circuits.writers import writer_outputs, writer_points
from tljax.patching import KL, LogitDiff, path_patch
from tljax.patching.engine.base_run import BaseRun, run_base
from tljax.patching.engine.run import prepare_metric
from tljax.text.inputs import prepare

SOURCE = np.random.default_rng(3).integers(1, 13, (2, 6))
PROMPT = np.where(np.arange(6) == 2, (SOURCE + 4) % 12 + 1, SOURCE)
METRIC = LogitDiff(np.asarray([1, 2]), np.asarray([3, 4]))
PADDED = {"none": [6, 6], "left": [4, 6], "right": [6, 5]}


@functools.cache
def runs(model: HookedTransformer, padding: str = "none") -> tuple[ResidualGraph, BaseRun, BaseRun]:
    """The graph, the base run and the source's run."""
    graph = ResidualGraph.of(model, experts=model.cfg.num_experts is not None)
    positions, lengths = np.arange(6), np.asarray(PADDED[padding])[:, None]
    mask = positions >= 6 - lengths if padding == "left" else positions < lengths
    both = [prepare(model.cfg, None, np.where(mask, tokens, 0), attention_mask=mask) for tokens in (PROMPT, SOURCE)]
    return graph, run_base(model, both[0], exact_points(graph)), run_base(model, both[1], writer_points(graph))


def exact(model: HookedTransformer, metric: Any = METRIC, padding: str = "none", **options: Any) -> ExactEffects:
    graph, base, source = runs(model, padding)
    return exact_edge_effects(model, base, graph, source.activations, metric, progress=False, **options)


def edge_by_edge(model: HookedTransformer, padding: str = "none", metric: Any = METRIC) -> np.ndarray:
    """The effect of each edge by a whole run of the circuit that lacks it, ``[writer, reader, batch]``."""
    graph, base, source = runs(model, padding)
    edges = np.argwhere(graph.edges)
    masks = np.ones((len(edges), *graph.shape), np.float32)
    masks[np.arange(len(edges)), edges[:, 0], edges[:, 1]] = 0
    replacement = writer_outputs(model.cfg, model.params, graph, source.activations)
    finals = masked_stream(
        model.cfg, model.params, graph, base.tokens, base.context, masks[:, None, None], replacement
    )  # fmt: skip
    measure = prepare_metric(metric, model, base)
    effects = np.zeros((*graph.shape, base.batch))
    effects[tuple(edges.T)] = np.asarray(measure(finals[:, :, : base.length])) - np.asarray(measure.baseline)
    return effects


CASES = [
    ("gpt2", "none"), ("gpt2", "left"), ("neox", "right"), ("llama", "left"), ("sandwich", "right"), ("moe", "none"),
    ("latent", "none"), ("attn_only", "none"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "padding"), CASES)
def test_equals_whole_runs_without_one_edge(kind: str, padding: str) -> None:
    model = build(kind)
    got, expected = exact(model, padding=padding).values, edge_by_edge(model, padding)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(got, expected, atol=1e-5 * max(1, np.abs(expected).max()))


def test_equals_path_patching_with_one_receiver() -> None:
    model = build("sandwich")
    graph, got = runs(model)[0], exact(model).values
    for receiver, reader in {("q", 1, 2): "a1.h2<q>", ("v", 1, 0): None, ("mlp", 0): "m0"}.items():
        number = graph.readers_of(1, "v").start if reader is None else graph.reader(reader)
        patched = path_patch(model, PROMPT, SOURCE, METRIC, [receiver], freeze_mlps=True, layers=0, reduce="none")
        np.testing.assert_allclose(got[1:5, number], patched.effect()[0], atol=1e-5)
    logits = path_patch(model, PROMPT, SOURCE, METRIC, "logits", "mlp_out", (), freeze_mlps=True, reduce="none")
    np.testing.assert_allclose(got[[5, 10], -1], logits.effect(), atol=1e-5)


def test_a_metric_may_be_any_function_and_read_any_positions() -> None:
    model = build("llama")
    base = runs(model)[1]
    logits = model(PROMPT)

    def moved(logits: Any) -> Any:
        return np.abs(np.asarray(logits)[:, 3:]).max(axis=(1, 2))

    for metric in (moved, KL(logits, pos=None)):
        np.testing.assert_allclose(
            exact(model, metric).values, edge_by_edge(model, metric=metric), atol=2e-5 * base.length
        )
    number = exact(model, lambda logits: logits[:, -1, 1].mean()).values
    assert number.shape == runs(model)[0].shape


def test_only_the_edges_asked_for_are_measured() -> None:
    model = build("gpt2")
    graph = runs(model)[0]
    names = ["input->a0.h1<k>", "a0.h3->m0", "m0->a1.h0<q>", "m1->logits"]
    got, every = exact(model, edges=graph.mask(names)), exact(model)
    for name in names:
        np.testing.assert_allclose(got.values[graph.edge(name)], every.values[graph.edge(name)], atol=1e-6)
    assert np.isnan(got.values[..., 0]).sum() == graph.n_edges - 4
    assert (got.values[~graph.edges] == 0).all()
    assert got.report.floor_flops < every.report.floor_flops / 5


def test_edge_scores_and_their_verification() -> None:
    model = build("gpt2")
    got = exact(model).values
    scores = edge_scores(model, PROMPT, SOURCE, METRIC, "exact", progress=False)
    np.testing.assert_allclose(scores.values, got.mean(axis=2), atol=1e-6)
    each = edge_scores(model, PROMPT, SOURCE, METRIC, "exact", reduce="none", progress=False)
    np.testing.assert_allclose(each.values, np.moveaxis(got, 2, 0), atol=1e-6)
    right = verify_edges(model, PROMPT, SOURCE, METRIC, scores, verify=Verify(k=12, subsets=3), progress=False)
    assert min(right.r_squared, right.rank_correlation) > 1 - 1e-6
    assert right.n_others == scores.graph.n_edges - 12
    estimate = edge_scores(model, PROMPT, SOURCE, METRIC, progress=False)
    rough = verify_edges(model, PROMPT, SOURCE, METRIC, estimate, verify=Verify(k=12, subsets=3), progress=False)
    places = [scores.graph.edge(name) for name in rough.labels]
    np.testing.assert_allclose(rough.exact, [scores.values[place] for place in places], atol=1e-6)
    assert rough.r_squared < right.r_squared
    half = scores.graph.edges & (np.abs(np.asarray(estimate.values)) < np.abs(rough.estimate).min())
    assert half.sum() == rough.n_others
    assert np.abs(rough.joint_exact - rough.joint_estimate).max() < np.abs(np.asarray(estimate.values)).sum()


def test_a_second_call_compiles_nothing_and_deeper_models_compile_no_more(compilations: Any) -> None:
    counts = []
    for n_layers in (6, 8):
        jax.clear_caches()
        model = build("gpt2", n_layers=n_layers, d_mlp=24)
        runs(model)
        before = compilations.count
        exact(model)
        counts.append(compilations.count - before)
        before = compilations.count
        exact(model, LogitDiff(np.asarray([5, 6]), np.asarray([7, 8])))
        assert compilations.count == before
    assert counts[1] <= counts[0], counts
