"""Every array of the golden numbers of circuits: what tljax computes is within 1e-5 of its largest entry.

The numbers are a float64 brute force's (``brute``), EAP-IG's (``eapig``) and TransformerLens 4.3's (``tl43``).
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from published_circuits import FOLDER, METHODS, TAGS, Golden, selection

from tljax.circuits import Circuit, EdgeScores, edge_scores, faithfulness, faithfulness_curve
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
    r"node\.EAP": lambda golden, found: golden.products["mlp_in_quirk"].sum(axis=(1, 3)).mean(axis=0) / golden.n_prompts,
    r"node\.EAP\.neuron": lambda golden, found: golden.products["mlp_in_quirk"].sum(axis=1).mean(axis=0) / golden.n_prompts,
    r"node\.exact": lambda golden, found: -golden.patched().mean(axis=1)[:1],
    r"baseline\.(clean|corrupt)(?:ed)?": lambda golden, found: golden.runs[f"metric.{found[1]}"],
    r"evaluate\..*": lambda golden, found: golden.evaluations[found[0]],
    r"(select\..*)\.nodes": lambda golden, found: golden.nodes_of(found[1]),
    r"select\..*": lambda golden, found: golden.selected(found[0]),
}
"""Arrays of EAP-IG, likewise. Its scores are divided by the number of prompts twice, its mean is over d_model too."""


@pytest.fixture(scope="module", params=TAGS or ["none"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


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
            error = float(np.abs(found - right).max() / max(np.abs(right).max(), 1e-3))  # zero ablation of all leaves 1e-17
        print(f"{golden.path.name} {name}: {error:.1e}")
        if not error < TOLERANCE:
            wrong.append(f"{name}: {error:.2g}")
    assert not wrong, wrong


def test_brute_force(golden: Golden) -> None:
    compare(golden, golden.stored["brute_unprocessed"], BRUTE)


def test_eap_ig(golden: Golden) -> None:
    compare(golden, golden.stored["eapig_unprocessed"], REFERENCE)


@pytest.mark.skipif("gpt2_a" not in TAGS, reason="not here")
def test_eap_ig_with_processed_weights() -> None:
    golden = Golden("gpt2_a", processed=True)
    compare(golden, golden.stored["eapig_processed"], REFERENCE)


def test_areas_of_the_benchmark(golden: Golden) -> None:
    """CPR, CMD and the curve behind them; those of information flow depend on how ties are sorted."""
    told = golden.told(golden.reference)["areas"]
    assert {name.rsplit(".", 2)[0] for name in told} == {"EAP", "EAP-IG-inputs.steps5", "exact", "information-flow-routes"}
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
