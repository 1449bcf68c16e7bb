"""Every array of the golden numbers of circuits: what tljax computes is within 1e-5 of its largest entry.

The numbers are a float64 brute force's (``brute``), EAP-IG's (``eapig``) and TransformerLens 4.3's (``tl43``).
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from published_circuits import FOLDER, METHODS, TAGS, Golden

from tljax.circuits import Circuit, EdgeScores, edge_scores, faithfulness_curve, minimality
from tljax.patching import LogitDiff

pytestmark = pytest.mark.skipif(not TAGS, reason="shared/goldens/circuits is not here")
TOLERANCE = 1e-5

ELSEWHERE = {
    r"acdc\..*": "tests/circuits/test_acdc.py",
    r"atpstar\.(q|k)_(plain|fix)|atpstar\.node_graddrop": "tests/attribution/test_circuit_goldens.py",
    r"node\.EAP-IG-(inputs|activations)\.steps5": "tests/attribution/test_circuit_goldens.py",
    r"das\.rank\d\.(basis|logits)": "tests/interchange/test_training_interchanges.py",
}
"""Arrays by name: the test that compares them."""
NOT_COMPARED = {
    r"edge\.EAP\.mean": "one vector for all writers and positions, which is no mean (quirk 5)",
    r"evaluate\..*\.mean": "likewise",
    r"select\..*\.raw\.nodes": "nodes of edges that pruning would remove: no circuit of tljax has such a field",
    r"select\.node\..*\.nodes": "counts pairs that are no edges (quirk 9)",
}
"""Arrays of EAP-IG that are no right numbers, nor what an option should reproduce: why."""

Compute = Callable[..., Any]
BRUTE: dict[str, Compute] = {
    r"(?:metric|logits)\..*": lambda golden, found: golden.runs[found[0]],
    r"edge\.EAP\.per_example_per_position": lambda golden, found: golden.by_position,
    r"edge\.EAP-IG-activations\.steps5\.reference_quirk\.per_example": (
        lambda golden, found: golden.without_gradient_at_inputs("patching")
    ),
    r"edge\.(EAP(?:\.zero|\.mean|\.mean-positional)?|mask-IG\.gauss64)\.per_example": (
        lambda golden, found: golden.edges(found[1], "exact")
    ),
    r"edge\.(.*)\.per_example": lambda golden, found: golden.edges(found[1]),
    r"node\.exact\.per_example": lambda golden, found: -golden.patched().T,
    r"node\.EAP\.per_example": lambda golden, found: golden.products["right"].sum(axis=(1, 3)),
    r"node\.EAP\.mlp_in_quirk\.per_example": lambda golden, found: golden.products["mlp_in_quirk"].sum(axis=(1, 3)),
    r"neuron\.EAP\.per_example": lambda golden, found: golden.products["right"].sum(axis=1),
    r"native_gqa\.edge\.(EAP|exact)\.per_example": lambda golden, found: golden.native_edges(METHODS[found[1]][0]),
    r"mean(_positional)?_replacement": lambda golden, found: golden.means(bool(found[1])),
    r"evaluate\..*": lambda golden, found: golden.evaluations[found[0]],
    r"atpstar\.([qk])_exact": lambda golden, found: golden.heads(found[1]),
    r"atpstar\.node_plain": lambda golden, found: -np.moveaxis(golden.products["right"].sum(axis=3), 1, 2),
    r"atpstar\.node_exact": lambda golden, found: np.moveaxis(golden.patched("pos"), -1, 0),
}
"""Arrays of the brute force by name: what tljax has for them."""
REFERENCE: dict[str, Compute] = {
    r"edge\.EAP\.batches_of_4_and_2": lambda golden, found: golden.in_batches(4),
    r"edge\.EAP\.mean_over_d_model": lambda golden, found: golden.twice_averaged("EAP") / golden.model.cfg.d_model,
    r"edge\.(exact(?:\.zero)?|information-flow-routes)": lambda golden, found: golden.edges(found[1]).mean(axis=0),
    r"edge\.(.*)": lambda golden, found: golden.twice_averaged(found[1]),
    r"node\.EAP": lambda golden, found: (
        golden.products["mlp_in_quirk"].sum(axis=(1, 3)).mean(axis=0) / golden.n_prompts
    ),
    r"node\.EAP\.neuron": lambda golden, found: (
        golden.products["mlp_in_quirk"].sum(axis=1).mean(axis=0) / golden.n_prompts
    ),
    r"node\.exact": lambda golden, found: -golden.patched().mean(axis=1)[:1],
    r"baseline\.(clean|corrupt)(?:ed)?": lambda golden, found: golden.runs[f"metric.{found[1]}"],
    r"evaluate\..*": lambda golden, found: golden.evaluations[found[0]],
    r"(select\..*)\.nodes": lambda golden, found: golden.nodes_of(found[1]),
    r"select\..*": lambda golden, found: golden.selected(found[0]),
}
"""Arrays of EAP-IG, likewise. Its scores are divided by the number of prompts twice, its mean is over d_model too."""


golden_of = functools.cache(Golden)
here = pytest.mark.skipif("gpt2_a" not in TAGS, reason="not here")


@pytest.fixture(scope="module", params=TAGS or ["none"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return golden_of(request.param)


@pytest.fixture(scope="module")
def gpt2() -> Golden:
    return golden_of("gpt2_a")


def compare(golden: Golden, stored: dict[str, np.ndarray], rows: dict[str, Compute]) -> None:
    """Compares every array, and fails for one that has no row, or is neither elsewhere nor left out for a reason."""
    wrong = []
    for name, right in stored.items():
        if any(re.fullmatch(pattern, name) for pattern in (*ELSEWHERE, *(NOT_COMPARED if rows is REFERENCE else ()))):
            continue
        pattern = next(pattern for pattern in rows if re.fullmatch(pattern, name))
        found = np.asarray(rows[pattern](golden, re.fullmatch(pattern, name)))
        if right.dtype == bool:
            right = right & golden.graph.edges if "select.node" in name else right  # it marks whole rows (quirk 9)
            error = float((found != right).sum())
        else:
            assert found.shape == right.shape or name == "node.exact", name
            right = right[: len(found)]
            error = float(
                np.abs(found - right).max() / max(np.abs(right).max(), 1e-3)
            )  # zero ablation of all leaves 1e-17
        print(f"{golden.path.name} {name}: {error:.1e}")
        if not error < TOLERANCE:
            wrong.append(f"{name}: {error:.2g}")
    assert not wrong, wrong


def test_brute_force(golden: Golden) -> None:
    compare(golden, golden.stored["brute_unprocessed"], BRUTE)


def test_eap_ig(golden: Golden) -> None:
    compare(golden, golden.stored["eapig_unprocessed"], REFERENCE)


@here
def test_eap_ig_with_processed_weights() -> None:
    golden = golden_of("gpt2_a", processed=True)
    compare(golden, golden.stored["eapig_processed"], REFERENCE)


def test_areas_of_the_benchmark(golden: Golden) -> None:
    """CPR, CMD and the curve behind them; those of information flow depend on how ties are sorted."""
    told = golden.told(golden.reference)["areas"]
    assert {name.rsplit(".", 2)[0] for name in told} == {
        "EAP",
        "EAP-IG-inputs.steps5",
        "exact",
        "information-flow-routes",
    }
    for name, right in told.items():
        scores, sign, rule = name.rsplit(".", 2)
        if scores == "information-flow-routes":
            continue
        by: Any = "absolute" if sign == "abs" else "lowers"
        curve = faithfulness_curve(
            golden.model, -golden.edges(scores).mean(axis=0), golden.clean, golden.corrupted, golden.metric,
            by=by, greedy=rule == "greedy", progress=False,
        )  # fmt: skip
        np.testing.assert_array_equal(curve.n_edges, right["weighted_edge_counts"], err_msg=name)
        found = {"area_under_CPR": curve.cpr(), "area_from_1_CMD": curve.cmd(), "average": curve.average(),
                 "faithfulnesses": curve.faithfulness()}  # fmt: skip
        for key, value in found.items():
            np.testing.assert_allclose(value, right[key], rtol=0, atol=TOLERANCE, err_msg=f"{name} {key}")


def test_graph_of_eap_ig(golden: Golden) -> None:
    """Its JSON holds EAP's scores and the best fifth of the edges."""
    path = golden.path / "eapig_graph_unprocessed.json"
    scores, right = EdgeScores.from_json(path, golden.model), -golden.twice_averaged("EAP")
    assert np.abs(np.asarray(scores.values) - right).max() < TOLERANCE * np.abs(right).max()
    mask = golden.selected(f"select.EAP.topn{int(0.2 * golden.graph.n_edges)}.abs.pruned")
    np.testing.assert_array_equal(Circuit.from_json(path, golden.model).mask, mask)


@pytest.fixture(scope="module")
def tl43() -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / "gpt2_a" / "tl43.npz"))


@pytest.fixture(scope="module")
def places(gpt2: Golden, tl43: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Position, writer and reader of each stored edge, which is ``writer kind, layer, head, position, reader ...``."""
    kinds, graph = gpt2.told("tl43")["node_kinds"], gpt2.graph

    def name(kind: int, layer: int, head: int) -> str:
        names = {"embed": "input", "attn_head_out": f"a{layer}.h{head}", "logits": "logits"}
        letter = kinds[kind][0]
        return names.get(kinds[kind], f"m{layer}" if letter == "m" else f"a{layer}.h{head}<{letter}>")

    keys = tl43["batch.edge.edge_keys"].tolist()
    assert all(key[3] == key[7] for key in keys)
    rows = [(key[3], graph.writer(name(*key[:3])), graph.reader(name(*key[4:7]))) for key in keys]
    return tuple(np.asarray(rows).T)


@here
def test_edges_of_transformer_lens(gpt2: Golden, tl43: dict[str, np.ndarray], places: tuple[np.ndarray, ...]) -> None:
    """All prompts by one metric, and prompts alone by their own; node scores are the sums of edges."""
    told = gpt2.told("tl43")["batch_metric"]
    one = {"reduce": "none", "axes": ("pos",), "progress": False}
    metrics = {"batch": LogitDiff(told["answer"], told["wrong"]), "pair": gpt2.metric}
    found = {name: np.asarray(edge_scores(gpt2.model, gpt2.corrupted, gpt2.clean, metric, **one).values)
             for name, metric in metrics.items()}  # type: ignore[arg-type]  # fmt: skip
    scores = {"batch": found["batch"].mean(axis=0), "pair0": found["pair"][0], "pair1": found["pair"][1]}
    nodes = [(key[3], gpt2.graph.writer({0: "input", 1: f"a{key[1]}.h{key[2]}", 2: f"m{key[1]}"}[key[0]]))
             for key in tl43["batch.edge.node_keys"].tolist()]  # fmt: skip
    for name, values in scores.items():
        pairs = (values[places], tl43[f"{name}.edge.edge_scores"]), (
            values.sum(axis=2)[tuple(np.asarray(nodes).T)], tl43[f"{name}.edge.node_scores"]
        )  # fmt: skip
        for ours, right in pairs:
            print(f"tl43 {name}: {np.abs(ours - right).max() / np.abs(right).max():.1e}")
            assert np.abs(ours - right).max() < TOLERANCE * np.abs(right).max()


@here
def test_faithfulness_of_transformer_lens(gpt2: Golden, places: tuple[np.ndarray, ...]) -> None:
    """Its share is of the gap to the corrupted run, also where absent edges carry means."""
    means = np.concatenate([gpt2.clean.tokens[2:6], gpt2.corrupted.tokens[2:6]])
    for said in gpt2.told("tl43")["faithfulness"]:
        row = slice(said["pair"], said["pair"] + 1)
        metric = LogitDiff(gpt2.metric.answer[row], gpt2.metric.wrong[row])
        mask = np.zeros((gpt2.clean.shape[1], *gpt2.graph.shape), bool)
        mask[tuple(place[said["edge_ids"]] for place in places)] = True
        corrupted = said["ablation"] == "corrupt"
        found = minimality(
            gpt2.model, Circuit(mask, gpt2.graph, ("pos",)), gpt2.clean.tokens[row],
            gpt2.corrupted.tokens[row] if corrupted else means, metric, "classes",
            ablation="patching" if corrupted else "positional_mean", progress=False,
        )  # fmt: skip
        low, high = (gpt2.runs[f"metric.{side}"][row] for side in ("corrupt", "clean"))
        np.testing.assert_allclose([low, high], [[said["corrupt_metric"]], [said["full_metric"]]], rtol=TOLERANCE)
        share = (np.stack([found.circuit, *found.values]) - low) / (high - low)
        right = [said["recovered"], *said["edge_class_recovered"].values()]
        print(f"tl43 faithfulness: {np.abs(share[:, 0] - right).max():.1e}")
        np.testing.assert_allclose(share[:, 0], right, rtol=0, atol=TOLERANCE)
        assert list(said["edge_class_recovered"]) == found.labels["edge"]


@here
def test_targets_of_das(gpt2: Golden, tl43: dict[str, np.ndarray]) -> None:
    """What the interchanged token should be: the source's own."""
    both = np.concatenate([gpt2.runs["logits.corrupt.last"], gpt2.runs["logits.clean.last"]])
    np.testing.assert_array_equal(both.argmax(axis=1), tl43["das.targets"])


@here
def test_every_array_of_transformer_lens_is_compared(tl43: dict[str, np.ndarray]) -> None:
    compared = r"(batch|pair\d)\.(node|edge)\.(node|edge)_(keys|scores)|das\.targets"
    assert [name for name in tl43 if not any(re.fullmatch(one, name) for one in (compared, *ELSEWHERE))] == []
