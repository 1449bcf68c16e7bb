"""The boxes of a circuit's picture: which heads, MLPs and ends it has, and what joins them."""

import dataclasses
from typing import Literal

import numpy as np

from tljax.circuits.graph import Reader, ResidualGraph, Writer

BoxKind = Literal["input", "head", "group", "mlp", "expert", "logits", "feature", "error"]


@dataclasses.dataclass(frozen=True)
class Box:
    """A part of the model.

    Attributes:
        name: such as ``"a3.h5"``, ``"m3"``; ``"a3.kv1"`` for the keys and values that several heads share.
        kind: what it is.
        row: 0 at the bottom; the parts of a layer that read one another are in rows of their own.
        layer: its layer, -1 for the input, ``n_layers`` for the logits.
        number: where it is in its row before anything is moved.
    """

    name: str
    kind: BoxKind
    row: int
    layer: int
    number: int


@dataclasses.dataclass(frozen=True)
class Join:
    """A line between two boxes: an edge, or what a part is made of.

    Attributes:
        start, end: numbers of the boxes.
        port: what the end reads: ``"q"``, ``"k"``, ``"v"``, or ``""`` for its only input.
        name: the edge's name; ``""`` for a line that is no edge.
        score: the edge's score.
    """

    start: int
    end: int
    port: str = ""
    name: str = ""
    score: float = 1.0


def parts_of(graph: ResidualGraph, mask: np.ndarray, scores: np.ndarray) -> tuple[list[Box], list[Join], list[Join]]:
    """Finds the boxes of a circuit and the lines between them.

    Args:
        graph: the graph.
        mask: its edges, boolean ``[writer, reader]``, at least one.
        scores: their scores, ``[writer, reader]``.

    Returns:
        The boxes from the bottom up, the edges, and the lines that are none: from shared keys and values to the heads
        that use them, from a mixture's input to its experts.
    """
    edges = [tuple(edge) for edge in np.argwhere(mask)]
    found = {_of_writer(graph.writers[writer]) for writer, _ in edges}
    found |= {_of_reader(graph, graph.readers[reader]) for _, reader in edges}
    rows = {row: number for number, row in enumerate(sorted({_place(graph, part)[:2] for part in found}))}
    ordered = sorted(found, key=lambda part: (*_place(graph, part), part[0]))
    boxes = [
        Box(
            name,
            kind,
            rows[_place(graph, (name, kind, layer, number))[:2]],
            layer,
            _place(graph, (name, kind, layer, number))[2],
        )
        for name, kind, layer, number in ordered
    ]
    numbers = {box.name: number for number, box in enumerate(boxes)}
    joins = []
    for writer, reader in edges:
        read = graph.readers[reader]
        start, end = (numbers[part[0]] for part in (_of_writer(graph.writers[writer]), _of_reader(graph, read)))
        port = read.kind if read.kind in "qkv" else ""
        joins.append(Join(start, end, port, graph.edge_name(writer, reader), float(scores[writer, reader])))
    return boxes, joins, [Join(*pair) for pair in _made_of(graph, boxes, numbers)]


_Part = tuple[str, BoxKind, int, int]


def _of_writer(writer: Writer) -> _Part:
    return writer.name, writer.kind, writer.layer, writer.number


def _of_reader(graph: ResidualGraph, reader: Reader) -> _Part:
    name = reader.name.partition("<")[0]
    if reader.kind in ("mlp", "logits"):
        return name, reader.kind, reader.layer, 0
    shared = reader.kind != "q" and graph.n_kv_heads != graph.n_heads
    return name, "group" if shared else "head", reader.layer, reader.number


def _place(graph: ResidualGraph, part: _Part) -> tuple[int, int, int]:
    """Returns a part's layer, its row within the layer, and its place in that row."""
    _, kind, layer, number = part
    level = {"input": 0, "group": 0, "head": 1, "mlp": 2, "expert": 3, "logits": 0}[kind]
    if kind == "mlp" and graph.parallel_attn_mlp:
        return layer, 1, graph.n_heads
    return layer, level, number


def _made_of(graph: ResidualGraph, boxes: list[Box], numbers: dict[str, int]) -> list[tuple[int, int]]:
    """Returns pairs of boxes, the lower first, of which one is a part of what the other does."""
    share, pairs = graph.n_heads // graph.n_kv_heads, []
    for number, box in enumerate(boxes):
        owner = None
        if box.kind == "head":
            owner = numbers.get(f"a{box.layer}.kv{box.number // share}")
        elif box.kind == "expert":
            owner = numbers.get(f"m{box.layer}")
        if owner is not None:
            pairs.append((owner, number))
    return pairs
