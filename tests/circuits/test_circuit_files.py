"""Files of circuits and scores: they come back as they were, and damaged ones are refused with a reason."""

import json
import pathlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from test_masked import model_of

from tljax.circuits import Circuit, EdgeConvention, EdgeScores, ResidualGraph
from tljax.errors import CheckpointError, InputError
from tljax.fingerprint import fingerprint_of

GRAPH = ResidualGraph(2, 4, 4, 32)
GROUPED = ResidualGraph(2, 4, 2, 32)


def some_circuit(graph: ResidualGraph, *stack: int) -> Circuit:
    return Circuit(np.random.default_rng(0).random((*stack, *graph.shape)) < 0.3, graph, ("circuit",) * len(stack), "c")


def some_scores(graph: ResidualGraph, *axes: int, **fields: object) -> EdgeScores:
    values = jnp.asarray(np.random.default_rng(1).normal(size=(*axes, *graph.shape)) * graph.edges, jnp.float32)
    names = (("batch",) * len(axes)) + ("writer", "reader")
    return EdgeScores(
        values, axis_names=names, graph=graph, convention=EdgeConvention("eap", steps=3, grid="gauss"), **fields
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("graph", [GRAPH, GROUPED, ResidualGraph(2, 4, 4, 32, experts=(3, 0))])
def test_circuits_come_back(tmp_path: pathlib.Path, graph: ResidualGraph) -> None:
    soft = Circuit(np.random.default_rng(2).random(graph.shape).astype(np.float32), graph)
    for circuit in (some_circuit(graph), some_circuit(graph, 3), soft, Circuit.empty(graph)):
        circuit.to_json(tmp_path / "circuit.json")
        read = Circuit.from_json(tmp_path / "circuit.json")
        assert (read.graph, read.axes, read.name, read.mask.dtype) == (
            circuit.graph, circuit.axes, circuit.name, circuit.mask.dtype,
        )  # fmt: skip
        assert (read.mask == circuit.mask).all()


def test_eap_ig_files_hold_circuits_and_scores_of_a_loss(tmp_path: pathlib.Path) -> None:
    circuit, scores = some_circuit(GRAPH).prune(), some_scores(GRAPH)
    for suffix in ("json", "pt"):
        path = tmp_path / f"graph.{suffix}"
        if suffix == "json":
            scores.to_json(path, layout="eap-ig", circuit=circuit)
            read = Circuit.from_json(path), EdgeScores.from_json(path)
            stored = json.loads(path.read_text())
            assert stored["edges"]["a0.h1->m1"]["score"] == -float(scores["a0.h1->m1"])
            assert [name for name, node in stored["nodes"].items() if node["in_graph"]] == list(circuit.nodes)
            assert list(stored["edges"])[:4] == [
                "input->a0.h0<q>",
                "input->a0.h0<k>",
                "input->a0.h0<v>",
                "input->a0.h1<q>",
            ]
        else:
            scores.to_pt(path, circuit=circuit)
            read = Circuit.from_pt(path), EdgeScores.from_pt(path)
        assert (read[0].mask == circuit.mask).all()
        assert read[0].graph == GRAPH
        assert (read[1].values == scores.values).all()


def test_eap_ig_counts_grouped_heads_by_query_head(tmp_path: pathlib.Path) -> None:
    Circuit.of(GROUPED, ["input->a1.kv1<k>", "m0->a1.h0<q>"]).to_json(tmp_path / "graph.json", layout="eap-ig")
    read = Circuit.from_json(tmp_path / "graph.json")
    assert read.names() == ["input->a1.h2<k>", "input->a1.h3<k>", "m0->a1.h0<q>"]
    with pytest.raises(InputError, match="set_ungroup_grouped_query_attention"):
        some_scores(GROUPED).to_json(tmp_path / "graph.json", layout="eap-ig")


def test_scores_come_back_with_their_convention_and_model(tmp_path: pathlib.Path) -> None:
    model = model_of("gpt2")
    scores = some_scores(
        ResidualGraph.of(model), 3, fingerprint=fingerprint_of(model), baseline=jnp.arange(3.0), n_prompts=3
    )
    scores.to_json(tmp_path / "scores.json")
    read = EdgeScores.from_json(tmp_path / "scores.json", model)
    assert (read.values == scores.values).all()
    assert (read.baseline == scores.baseline).all()
    assert (read.axis_names, read.convention, read.n_prompts) == (scores.axis_names, scores.convention, 3)
    assert read.convention == scores.convention
    other = model.replace(params={**model.params, "unembed": {**model.params["unembed"], "W_U": model.W_U + 1}})
    with pytest.raises(CheckpointError, match="another model"):
        EdgeScores.from_json(tmp_path / "scores.json", other)


def rename(stored: dict, old: str, new: str) -> None:
    stored["edges"][new] = stored["edges"].pop(old)


DAMAGED: dict[str, tuple[Callable[[dict], object], str]] = {
    "a score is NaN": (lambda d: d["edges"]["input->m0"].update(score=float("nan")), "input->m0.*nan"),
    "an edge is missing": (lambda d: d["edges"].pop("input->m0"), "lacks the edge 'input->m0'"),
    "an edge that does not exist": (lambda d: rename(d, "input->m0", "m0->m0"), "no edge 'm0->m0'"),
    "a node is missing": (lambda d: d["nodes"].pop("m1"), "nodes besides the logits"),
    "a node that does not exist": (lambda d: d["nodes"].update(m7=d["nodes"].pop("m1")), "no node 'm7'"),
    "another model's cfg": (lambda d: d["cfg"].update(n_layers=3), "3 layers of 4 heads"),
    "a huge cfg": (lambda d: d["cfg"].update(n_layers=10**9), "1000000000 layers"),
    "cfg without heads": (lambda d: d["cfg"].pop("n_heads"), "lacks 'n_heads'"),
    "in_graph is a number": (lambda d: d["edges"]["input->m0"].update(in_graph=2), "in_graph.*expected bool"),
    "a node's neurons are too few": (lambda d: d["nodes"]["m0"].update(neurons=[True]), "neurons of node m0"),
    "parallel blocks": (lambda d: d["cfg"].update(parallel_attn_mlp=True), "no edge 'a0.h0->m0'"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_files_of_eap_ig_are_refused(tmp_path: pathlib.Path, how: str) -> None:
    path, (damage, reason) = tmp_path / "graph.json", DAMAGED[how]
    some_circuit(GRAPH).to_json(path, layout="eap-ig")
    stored = json.loads(path.read_text())
    damage(stored)
    path.write_text(json.dumps(stored))
    for read in (Circuit.from_json, EdgeScores.from_json):
        with pytest.raises(CheckpointError, match=reason):
            read(path)


def test_half_written_and_foreign_files_are_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "graph.json"
    some_circuit(GRAPH).to_json(path)
    whole = path.read_text()
    stored = json.loads(whole)
    cases = {
        whole[:200]: "damaged or incomplete",
        "[1, 2]": "does not hold a circuit",
        json.dumps(stored | {"edges": ["input->a0.h0<x>"]}): "a0.h0<q>",
        json.dumps(stored | {"graph": stored["graph"] | {"n_kv_heads": 3}}): "no model",
        json.dumps({key: value for key, value in stored.items() if key != "axes"}): "lacks 'axes'",
    }
    for text, reason in cases.items():
        path.write_text(text)
        with pytest.raises(CheckpointError, match=reason):
            Circuit.from_json(path)
    some_scores(GRAPH).to_json(path)
    with pytest.raises(CheckpointError, match="does not hold a circuit, but 'tljax-edge-scores-1'"):
        Circuit.from_json(path)
    pickle = tmp_path / "graph.pt"
    some_circuit(GRAPH).to_pt(pickle)
    pickle.write_bytes(pickle.read_bytes()[:300])
    with pytest.raises(CheckpointError, match="damaged"):
        Circuit.from_pt(pickle)
    with pytest.raises(CheckpointError, match="There is no file"):
        Circuit.from_pt(tmp_path / "none.pt")
