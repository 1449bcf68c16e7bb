"""Pictures of circuits: every edge is drawn, nothing overlaps, pages are whole and escaped."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tljax.circuits import CircuitPicture, ResidualGraph, draw_circuit, plot_edge_matrix

GRAPHS = {
    "gpt2": ResidualGraph(12, 12, 12, 64),
    "llama with experts": ResidualGraph(2, 4, 2, 8, experts=(0, 3)),
    "neox": ResidualGraph(3, 4, 4, 8, parallel_attn_mlp=True),
    "attention only": ResidualGraph(2, 2, 2, 8, attn_only=True),
}


def some_edges(graph: ResidualGraph, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a mask of some edges among a quarter of the writers, and scores."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=graph.shape) * (rng.random(graph.n_writers) < 0.25)[:, None]
    scores[0] += 1
    scores[~graph.edges] = 0
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-np.abs(scores), axis=None, kind="stable")[:count]] = True
    return mask.reshape(graph.shape) & (scores != 0), scores


def data_of(picture: CircuitPicture) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', picture.page().html, re.DOTALL)
    return json.loads(text)


@pytest.mark.parametrize(("kind", "count"), [("gpt2", 300), *((kind, 20) for kind in GRAPHS)])
def test_every_edge_is_drawn_between_its_parts_and_no_boxes_overlap(kind: str, count: int) -> None:
    graph = GRAPHS[kind]
    mask, scores = some_edges(graph, count)
    picture = draw_circuit(graph, mask, scores)
    assert set(picture.names) == set(graph.names(mask))
    boxes = picture.diagram.boxes
    for one, other in itertools.combinations(boxes, 2):
        beside = abs(one.x - other.x) >= (one.width + other.width) / 2 + 0.05
        assert beside or abs(one.y - other.y) >= (one.height + other.height) / 2 + 0.05
    for name, line in zip(picture.names, picture.diagram.lines, strict=True):
        writer, _, reader = name.partition("->")
        start, end = boxes[line.start], boxes[line.end]
        assert (start.text, end.text) == (writer, reader.partition("<")[0])
        assert start.y + start.height / 2 < line.points[-1][1] == pytest.approx(end.y - end.height / 2)
        assert (line.colour == "#0072b2") == (scores[graph.edge(name)] > 0)
    widths = [line.width for line in picture.diagram.lines]
    assert widths == sorted(widths)
    assert picture.diagram == draw_circuit(graph, mask, scores).diagram


def test_names_fit_their_boxes() -> None:
    graph = GRAPHS["gpt2"]
    figure = draw_circuit(graph, graph.mask(["input->a11.h11<q>", "input->m11", "a11.h11->logits"])).plot()
    figure.canvas.draw()
    axes = figure.axes[0]
    texts = {text.get_text(): text.get_window_extent() for text in axes.texts}
    boxes = [patch.get_window_extent() for patch in axes.patches]
    for name in ("a11.h11", "m11", "input", "logits"):
        assert any(box.x0 <= texts[name].x0 and texts[name].x1 <= box.x1 and box.height < 60 for box in boxes)


def test_shared_keys_and_values_have_a_box_joined_to_their_heads() -> None:
    graph = GRAPHS["llama with experts"]
    picture = draw_circuit(graph, graph.mask(["input->a1.kv1<k>", "a1.h2->logits", "a1.h0->logits", "a0.h0->m1"]))
    assert {box.text for box in picture.diagram.boxes} == {"input", "a1.kv1", "a1.h2", "a1.h0", "logits", "a0.h0", "m1"}
    assert len(picture.diagram.plain_lines) == 1
    assert [letter for *_, letter in picture.diagram.inputs] == ["k"]


def test_the_page_says_names_and_scores_and_needs_no_network(tmp_path: Path) -> None:
    graph = GRAPHS["neox"]
    mask = graph.mask(["input->a1.h0<q>", "a1.h0->logits"])
    picture = draw_circuit(graph, mask, np.where(mask, -0.25, 0.0), title="</script><b>", score_name="<i>")
    picture.save(tmp_path / "deep" / "circuit.html")
    text = (tmp_path / "deep" / "circuit.html").read_text(encoding="utf-8")
    assert not re.search(r"http|@import|url\(|\bsrc\s*=|<link", text)
    assert "<b>" not in text
    assert "<i>" not in text
    assert text.count("</script>") == 2
    data = data_of(picture)
    assert [line["about"] for line in data["lines"]] == ["input->a1.h0<q>: -0.25", "a1.h0->logits: -0.25"]
    assert "a1.h0: 1 in, 1 out" in data["boxes"]
    assert picture._repr_html_() == picture.page().html


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_figures_are_saved_in_the_format_of_their_ending(tmp_path: Path, ending: str, start: bytes) -> None:
    mask, _ = some_edges(GRAPHS["neox"], 10)
    path = tmp_path / f"circuit.{ending}"
    draw_circuit(GRAPHS["neox"], mask).save(path)
    assert path.read_bytes().startswith(start)


def test_the_strongest_edges_alone_and_a_mask_of_numbers() -> None:
    graph = GRAPHS["neox"]
    mask, scores = some_edges(graph, 15)
    kept = draw_circuit(graph, mask, scores, k=4)
    order = sorted(graph.names(mask), key=lambda name: -abs(scores[graph.edge(name)]))
    assert set(kept.names) == set(order[:4])
    assert "4 strongest" in kept.diagram.note
    assert (
        draw_circuit(graph, np.where(mask, scores, 0)).diagram.lines == draw_circuit(graph, mask, scores).diagram.lines
    )


def test_the_matrix_of_all_edges_is_grey_where_there_is_none(tmp_path: Path) -> None:
    graph = GRAPHS["neox"]
    scores = np.random.default_rng(0).normal(size=graph.shape)
    scores[~graph.edges] = np.nan
    figure = plot_edge_matrix(scores, graph, path=tmp_path / "edges.png")
    shown = figure.axes[0].images[0].get_array()
    assert (np.ma.getmaskarray(shown) == ~graph.edges).all()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "input",
        "layer 0",
        "layer 1",
        "layer 2",
    ]
    assert (tmp_path / "edges.png").exists()
