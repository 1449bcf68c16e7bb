"""Pictures of circuits: parts of the model as boxes, layers upward, and edges as lines between them."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from tljax.checks import typed, whole
from tljax.circuits.graph import ResidualGraph
from tljax.circuits.layout import Layout, lay_out, ports_of
from tljax.circuits.parts import Box, Join, parts_of
from tljax.errors import InputError
from tljax.viz.diagram import Dash, Diagram, DiagramBand, DiagramBox, DiagramLine, LegendEntry
from tljax.viz.drawing import colour_bar, new_figure, plain, save_figure, show_matrix
from tljax.viz.html import Html
from tljax.viz.scale import DIVERGING, Scale

_ABOVE, _BELOW, _UNSIGNED = "#0072b2", "#d55e00", "#555555"  # blue and vermilion, which all eyes tell apart
_FILLS = {
    "input": "#e8e8e8", "logits": "#e8e8e8", "head": "#fdf3d0", "group": "#ffffff", "mlp": "#dcefe6",
    "expert": "#dcefe6", "feature": "#e3ecf7", "error": "#f3e3e3",
}  # fmt: skip
_DASHES: dict[str, Dash] = {"q": (4.0, 1.5), "k": (1.2, 1.2), "v": (), "": ()}
_WIDEST, _NARROWEST, _FAINTEST = 4.0, 0.6, 0.25
_MOST = 1000
READABLE = 300
"""The most edges that a picture shows legibly."""


@dataclasses.dataclass(frozen=True, repr=False)
class CircuitPicture:
    """A picture of a circuit, which a notebook shows when it ends a cell.

    Attributes:
        diagram: what is drawn where.
        names: names of the edges drawn, strongest last.
    """

    diagram: Diagram
    names: tuple[str, ...]

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws a matplotlib figure; ``path`` saves it (its ending chooses the format: png, svg, pdf)."""
        return self.diagram.figure(path)

    def page(self) -> Html:
        """Returns the picture as SVG in HTML: hovering shows names and scores, and a part's edges alone."""
        return self.diagram.page()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a page that opens without a network if the path ends in ``.html``, otherwise a figure."""
        self.diagram.save(path)

    def _repr_html_(self) -> str:
        return self.page().html

    def __repr__(self) -> str:
        return f"CircuitPicture({len(self.names)} edges between {len(self.diagram.boxes)} parts; .save(path) writes it)"


@typed
def draw_circuit(
    graph: ResidualGraph,
    mask: Any,
    scores: Any = None,
    *,
    k: int | None = None,
    title: str | None = None,
    score_name: str = "effect",
) -> CircuitPicture:
    """Draws a circuit: the input at the bottom, the logits at the top, and the heads and MLPs that it has between.

    Lines are as wide and as dark as their score is large in size, blue above zero and vermilion below. A line into a
    head ends at its query (left, dashed), key (middle, dotted) or value (right, drawn through). Where heads share keys
    and values, these have a box of their own below the heads, joined to them in grey.

    Args:
        graph: the model's graph.
        mask: the edges, boolean ``[writer, reader]``; or numbers, of which those that are not zero are drawn, and are
            the scores if there are no others.
        scores: a score for each edge, ``[writer, reader]``; ``None`` draws all edges alike.
        k: how many edges to draw, those with the largest scores in size; all by default.
        title: a heading.
        score_name: what the scores are, for the legend.

    Raises:
        InputError: shapes that do not match the graph, no edges or too many, a score that is not finite.

    Example:
        >>> graph = ResidualGraph(n_layers=1, n_heads=2, n_kv_heads=2, d_model=8)
        >>> draw_circuit(graph, graph.mask(["input->a0.h1<q>", "a0.h1->logits"]))
        CircuitPicture(2 edges between 3 parts; .save(path) writes it)
    """
    chosen, values, signed = _checked(graph, mask, scores, k)
    boxes, joins, made_of = parts_of(graph, chosen, values)
    joins = sorted(joins, key=lambda one: abs(one.score))  # the strongest are drawn last, over the others
    count, every = int(chosen.sum()), _count_of(graph, mask)
    note = (
        f"{count} of {graph.n_edges} edges" if count == every else f"the {count} strongest of a circuit's {every} edges"
    )
    bands = {layer: f"layer {layer}" for layer in range(graph.n_layers)}
    diagram = diagram_of(
        boxes, joins, made_of, signed=signed, bands=bands, score_name=score_name, title=title or "", note=note
    )
    return CircuitPicture(diagram, tuple(one.name for one in joins))


def diagram_of(
    boxes: list[Box],
    joins: list[Join],
    made_of: list[Join],
    *,
    signed: bool,
    bands: Mapping[int, str],
    score_name: str,
    title: str,
    note: str,
) -> Diagram:
    """Lays out boxes and lines.

    Args:
        boxes: the boxes, from the bottom up.
        joins: the edges between them, strongest last.
        made_of: lines that are no edges.
        signed: whether scores say anything.
        bands: for each layer of the boxes its name, if it has one.
        score_name: what the scores are.
        title, note: a heading and a line below it.
    """
    layout = lay_out(boxes, joins, made_of)
    largest = max(abs(one.score) for one in joins)
    crowd = min(1.0, len(joins) / READABLE)
    lines = tuple(_line(one, layout.curves[n], largest, signed, crowd) for n, one in enumerate(joins))
    return Diagram(
        tuple(_box(box, n, joins, layout) for n, box in enumerate(boxes)), lines, _bands(boxes, layout, bands),
        _legend(joins, largest if signed else None, score_name), _inputs(joins, layout),
        tuple((tuple(a), tuple(b)) for a, b in layout.made_of.tolist()), layout.width, layout.height, title, note,
    )  # fmt: skip


@typed
def plot_edge_matrix(
    scores: Any,
    graph: ResidualGraph,
    *,
    title: str | None = None,
    score_name: str = "effect",
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Draws scores of all edges as a heat map, writers down and readers across, with a line between layers.

    Args:
        scores: ``[writer, reader]``; entries that are no edges are grey, whatever they are.
        graph: the model's graph.
        title: a heading.
        score_name: what the scores are, for the colour bar.
        path: where to save the picture (its ending chooses the format).

    Returns:
        The matplotlib figure.

    Raises:
        InputError: a shape that does not match the graph, a score that is not finite.
    """
    values = _matrix(scores, graph, "scores")
    matrix = np.where(graph.edges, _finite(values, graph.edges, graph), np.nan)
    limit = float(np.abs(values[graph.edges]).max(initial=0.0)) or 1.0
    rows, columns = graph.shape
    side = float(np.clip(8 / max(rows, columns), 0.012, 0.2))
    figure = new_figure(max(4.5, columns * side + 1.9), max(2.6, rows * side + 1.1))
    axes = figure.subplots()
    image = show_matrix(axes, matrix, Scale(-limit, limit, DIVERGING))
    layers = range(graph.n_layers)
    writers = [("input", graph.writers_of(-1)), *((f"layer {n}", graph.writers_of(n)) for n in layers)]
    readers = [*((f"layer {n}", graph.readers_of(n)) for n in layers), ("logits", graph.readers_of(graph.n_layers))]
    for set_ticks, draw_line, parts, slant in (
        (axes.set_yticks, axes.axhline, writers, {}),
        (axes.set_xticks, axes.axvline, readers, {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}),
    ):
        shown = [part for n, part in enumerate(parts) if n % max(1, len(parts) // 24) == 0 or n == len(parts) - 1]
        middles = [(part.start + part.stop - 1) / 2 for _, part in shown]
        set_ticks(middles, [name for name, _ in shown], fontsize=8, **slant)
        for _, part in parts[1:]:
            draw_line(part.start - 0.5, color="0.55", lw=0.4)
    axes.tick_params(length=0)
    axes.set(xlabel="reader", ylabel="writer", title=plain(title or "", 80))
    colour_bar(figure, image, axes, plain(score_name, 60))
    save_figure(figure, path)
    return figure


def _checked(graph: ResidualGraph, mask: Any, scores: Any, k: int | None) -> tuple[np.ndarray, np.ndarray, bool]:
    """Returns the mask of the edges to draw, their scores, and whether these say anything."""
    given = _matrix(mask, graph, "mask")
    chosen = (_finite(given, graph.edges, graph, "mask") != 0) & graph.edges
    soft = scores is None and bool((given[chosen] != 1).any())
    values = given if soft else np.ones(graph.shape) if scores is None else _matrix(scores, graph, "scores")
    _finite(values, chosen, graph)
    signed = soft or scores is not None
    if not chosen.any():
        raise InputError("The mask has no edge, so that there is nothing to draw.")
    if k is not None:
        if not signed:
            raise InputError(f"k={k} draws the edges with the largest scores: pass scores=.")
        order = np.argsort(-np.where(chosen, np.abs(values), -np.inf), axis=None, kind="stable")
        kept = np.zeros(chosen.size, bool)
        kept[order[: min(whole(k, "k", 1), int(chosen.sum()))]] = True
        chosen = kept.reshape(chosen.shape)
    if chosen.sum() > _MOST:
        raise InputError(
            f"A picture of {int(chosen.sum())} edges cannot be read; up to {READABLE} can. Draw the strongest, "
            f"draw_circuit(graph, mask, scores, k={READABLE}), or all scores with plot_edge_matrix(scores, graph)."
        )
    return chosen, values, signed


def _matrix(values: Any, graph: ResidualGraph, name: str) -> np.ndarray:
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is not an array of numbers: {error}") from error
    if array.shape != graph.shape:
        more = f" It has leading axes: choose one, {name}[0], or average over them." if array.ndim > 2 else ""
        raise InputError(f"{name} has shape {array.shape}; this graph's is [writer, reader] = {graph.shape}.{more}")
    return array


def _finite(values: np.ndarray, where: np.ndarray, graph: ResidualGraph, name: str = "scores") -> np.ndarray:
    wrong = np.argwhere(where & ~np.isfinite(values))
    if len(wrong):
        edge = tuple(map(int, wrong[0]))
        raise InputError(f"{name} holds {values[edge]} at {graph.edge_name(*edge)}; a picture needs finite numbers.")
    return values


def _count_of(graph: ResidualGraph, mask: Any) -> int:
    return int(((np.asarray(mask, np.float64) != 0) & graph.edges).sum())


def _line(one: Join, points: np.ndarray, largest: float, signed: bool, crowd: float) -> DiagramLine:
    """Returns an edge's line; the more there are (``crowd``, 0 to 1), the more weak ones stand back."""
    share = abs(one.score) / largest if signed and largest else 0.35
    colour = (_ABOVE if one.score >= 0 else _BELOW) if signed else _UNSIGNED
    share = share ** (1 + crowd)
    opacity = _FAINTEST + (1 - _FAINTEST) * share**0.5 if signed else 0.6
    about = f"{one.name}: {one.score:+.4g}" if signed else one.name
    width = _NARROWEST + (_WIDEST - _NARROWEST) * share
    where = tuple((float(x), float(y)) for x, y in points)
    return DiagramLine(where, one.start, one.end, colour, width, opacity, _DASHES[one.port], about)


def _box(box: Box, number: int, joins: list[Join], layout: Layout) -> DiagramBox:
    coming = sum(one.end == number for one in joins)
    going = sum(one.start == number for one in joins)
    x, y = map(float, layout.centres[number])
    width, height = map(float, layout.sizes[number])
    about = f"{box.name}: {coming} in, {going} out"
    return DiagramBox(x, y, width, height, box.name, _FILLS[box.kind], about, box.kind in ("mlp", "expert"))


def _bands(boxes: list[Box], layout: Layout, named: Mapping[int, str]) -> tuple[DiagramBand, ...]:
    """Returns a band for each layer that has boxes, each up to the middle of the gap to the next."""
    low_edges, high_edges = (layout.centres[:, 1] + sign * layout.sizes[:, 1] / 2 for sign in (-1, 1))
    layers = [box.layer for box in boxes]
    order = sorted(set(layers))
    members = [[n for n, each in enumerate(layers) if each == layer] for layer in order]
    lows, highs = [low_edges[own].min() for own in members], [high_edges[own].max() for own in members]
    between = [(high + low) / 2 for high, low in zip(highs, lows[1:], strict=False)]
    bounds = [lows[0] - 0.1, *between, highs[-1] + 0.1]
    names = [named.get(layer, "") for layer in order]
    return tuple(
        DiagramBand(float(low), float(high), name) for low, high, name in zip(bounds, bounds[1:], names, strict=False)
    )


def _inputs(joins: list[Join], layout: Layout) -> tuple[tuple[float, float, str], ...]:
    """Returns a letter for each query, key and value that is read."""
    read = sorted({(one.end, one.port) for one in joins if one.port})
    return tuple((*ports_of(layout, end, port), port) for end, port in read)


def _legend(joins: list[Join], largest: float | None, score_name: str) -> tuple[LegendEntry, ...]:
    entries = []
    if largest is not None:
        entries += [
            LegendEntry(f"{score_name} {sign}{largest:.3g}", colour, _WIDEST)
            for sign, colour, there in (
                ("+", _ABOVE, any(one.score >= 0 for one in joins)), ("−", _BELOW, any(one.score < 0 for one in joins)),
            )
            if there
        ]  # fmt: skip
    names = {"q": "into a query (q)", "k": "into a key (k)", "v": "into a value (v)"}
    ports = sorted({one.port for one in joins if one.port}, key="qkv".index)
    return (*entries, *(LegendEntry(names[port], _UNSIGNED, 1.5, _DASHES[port]) for port in ports))
