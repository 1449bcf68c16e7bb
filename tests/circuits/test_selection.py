"""Selection and pruning of edges, held to plain searches; stored masks of EAP-IG where they lie beside the project."""

import pathlib
import re

import numpy as np
import pytest

from tljax.circuits import ResidualGraph, select, stability, top_nodes
from tljax.circuits.selection import pruned, reads_of

GOLDENS = pathlib.Path(__file__).parents[2] / "../shared/goldens/circuits"
GRAPHS = {
    "sequential": ResidualGraph(3, 4, 4, 8),
    "parallel": ResidualGraph(3, 4, 4, 8, parallel_attn_mlp=True),
    "grouped": ResidualGraph(2, 4, 2, 8),
    "experts": ResidualGraph(2, 2, 2, 8, experts=(3, 0)),
    "attention only": ResidualGraph(2, 3, 3, 8, attn_only=True),
}


def random_scores(graph: ResidualGraph, seed: int = 0) -> np.ndarray:
    return np.where(graph.edges, np.random.default_rng(seed).normal(size=graph.shape), 0)


def on_a_way(mask: np.ndarray, graph: ResidualGraph) -> np.ndarray:
    """The edges on a way from the token embedding to the logits, by a search from both ends."""
    reads = reads_of(graph)
    forward, backward = {0}, {graph.n_readers - 1}
    for writer in range(1, graph.n_writers):  # writers come in order
        heard = {int(r) for r in np.flatnonzero(reads[writer]) if any(mask[u, r] for u in forward)}
        forward |= {writer} if heard else set()
    for writer in reversed(range(graph.n_writers)):
        if any(mask[writer, reader] for reader in backward):
            backward |= {int(reader) for reader in np.flatnonzero(reads[writer])}
    kept = np.zeros_like(mask)
    kept[np.ix_(sorted(forward), sorted(backward))] = True
    return mask & kept


@pytest.mark.parametrize("kind", GRAPHS)
def test_pruning_keeps_what_is_on_a_way_from_input_to_logits_and_is_idempotent(kind: str) -> None:
    graph = GRAPHS[kind]
    masks = np.random.default_rng(1).random((40, *graph.shape)) < np.linspace(0.02, 0.5, 40)[:, None, None]
    masks &= graph.edges
    once = pruned(masks, graph)
    assert (once == [on_a_way(mask, graph) for mask in masks]).all()
    assert (pruned(once, graph) == once).all()
    assert once.any()
    assert (once != masks).any()
    assert (pruned(graph.edges, graph) == graph.edges).all()


@pytest.mark.parametrize("kind", GRAPHS)
def test_greedy_takes_the_best_edge_into_the_circuit_each_time(kind: str) -> None:
    graph = GRAPHS[kind]
    scores, reads = random_scores(graph), reads_of(graph)
    mask, open_readers = np.zeros(graph.shape, bool), np.arange(graph.n_readers) == graph.n_readers - 1
    for n in range(1, 30):
        best = np.where(graph.edges & open_readers & ~mask, np.abs(scores), -1)
        at = np.unravel_index(np.argmax(best), best.shape)
        mask[at] = True
        open_readers = open_readers | reads[at[0]]
        assert (select(scores, graph, top=n, greedy=True, prune=False) == mask).all()


def test_sizes_and_directions() -> None:
    graph = GRAPHS["sequential"]
    scores = random_scores(graph)
    ranked = np.sort(np.abs(scores[graph.edges]))[::-1]
    assert select(scores, graph, fraction=0.1, prune=False).sum() == int(0.1 * graph.n_edges)
    by_size = select(scores, graph, threshold=ranked[19], prune=False)
    assert (by_size == select(scores, graph, top=20, prune=False)).all()
    lowers = select(scores, graph, top=15, by="lowers", prune=False)
    assert scores[lowers].max() <= np.sort(scores[graph.edges])[15]
    assert (select(-scores, graph, top=15, by="raises", prune=False) == lowers).all()
    stack = select(np.stack([scores, -scores]), graph, top=15, by="lowers", prune=False)
    assert (stack[0] == lowers).all()
    assert (stack[1] != lowers).any()
    equal = select(np.ones(graph.shape), graph, top=3, prune=False)
    assert graph.names(equal) == graph.names(graph.edges)[:3]
    nodes = top_nodes(-np.arange(graph.n_writers), graph, 2, by="lowers", prune=False)
    assert (np.flatnonzero(nodes.any(axis=1)) == np.arange(graph.n_writers)[-2:]).all()


def test_circuits_of_resampled_prompts_agree_where_prompts_do() -> None:
    graph = GRAPHS["sequential"]
    alike = np.repeat(random_scores(graph)[None], 6, axis=0)
    assert stability(alike, graph, top=20, n_resamples=5).mean_jaccard == 1
    apart = np.stack([random_scores(graph, seed) for seed in range(6)])
    found = stability(apart, graph, top=20, prune=False, n_resamples=8)
    one, two = found.circuits[0], found.circuits[1]
    np.testing.assert_allclose(found.jaccard[0, 1], one.jaccard(two))
    np.testing.assert_allclose(
        found.jaccard[0, 1], len({*one.names()} & {*two.names()}) / len({*one.names(), *two.names()})
    )
    assert found.mean_jaccard < 0.8
    whole = stability(np.repeat(apart[:2], 3, axis=0), graph, top=20, n_resamples=30, clusters=[0, 0, 0, 1, 1, 1])
    assert len({mask.tobytes() for mask in np.asarray(whole.circuits.mask)}) <= 3  # either cluster alone, or both


@pytest.mark.skipif(not GOLDENS.is_dir(), reason="the goldens lie beside the project only where it is developed")
@pytest.mark.parametrize("folder", ["gpt2_a", "llama_b"])
def test_masks_of_eap_ig(folder: str) -> None:
    stored = np.load(GOLDENS / folder / "eapig_unprocessed.npz")
    layers = (stored["edge.EAP"].shape[0] - 1) // 5
    graph, count = ResidualGraph(layers, 4, 4, 32), 0
    for key in stored.files:
        found = re.match(r"select\.(.+)\.(topn|greedy|threshold)([\d.]+)\.(abs|signed)\.(raw|pruned)$", key)
        if found is None:
            continue
        method, rule, size, sign, kept = found.groups()
        count += 1
        if method.startswith("node"):
            mask = top_nodes(-stored[method], graph, int(size), whole_rows=True)
            assert (mask == (stored[key] & graph.edges)).all(), key
            continue
        how = {"threshold": float(size)} if rule == "threshold" else {"top": int(size), "greedy": rule == "greedy"}
        by = "absolute" if sign == "abs" else "lowers"
        mask = select(-stored[f"edge.{method}"], graph, **how, by=by, prune=kept == "pruned")
        assert (mask == stored[key]).all(), key
    assert count > 90
