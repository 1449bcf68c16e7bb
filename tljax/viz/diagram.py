"""Diagrams of boxes and curved lines, as a matplotlib figure and as SVG in a page."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from tljax.viz.drawing import new_figure, plain, save_figure
from tljax.viz.html import Html, render

_PIXELS = 96  # an inch, in pages
_MARGIN = 0.12
_BAND_LABEL = 0.62
_LEGEND_LINE = 0.24
_TITLE = 0.34
_POINTS = 72 / _PIXELS

Dash = tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class DiagramBox:
    """A box with a name in it: centre and size in inches, y upward; ``about`` is shown when hovered over."""

    x: float
    y: float
    width: float
    height: float
    text: str
    fill: str
    about: str
    rounded: bool = False


@dataclasses.dataclass(frozen=True)
class DiagramLine:
    """A cubic curve of four points in inches, from one box to another.

    Attributes:
        points: ``((x, y), ...)``.
        start, end: numbers of the boxes.
        colour: as ``#rrggbb``.
        width: in pixels of 1/96 inch.
        opacity: 0 to 1.
        dash: lengths drawn and left out in turn, in widths; empty for a whole line.
        about: shown when hovered over.
    """

    points: tuple[tuple[float, float], ...]
    start: int
    end: int
    colour: str
    width: float
    opacity: float
    dash: Dash
    about: str


@dataclasses.dataclass(frozen=True)
class DiagramBand:
    """A stripe behind boxes, from ``low`` to ``high`` in inches, with its name at the left."""

    low: float
    high: float
    name: str


@dataclasses.dataclass(frozen=True)
class LegendEntry:
    """What a kind of line means."""

    text: str
    colour: str
    width: float
    dash: Dash = ()


@dataclasses.dataclass(frozen=True)
class Diagram:
    """A picture of boxes and lines, drawn in the order given.

    Attributes:
        boxes, lines, bands, legend: what is in it.
        inputs: ``(x, y, letter)`` of letters that name a box's inputs, above where lines end at its lower edge.
        plain_lines: straight lines that are no connection, ``((x, y), (x, y))``.
        width, height: in inches, without margins, title and legend.
        title: a heading, or empty.
        note: a line under the heading, or empty.
    """

    boxes: tuple[DiagramBox, ...]
    lines: tuple[DiagramLine, ...]
    bands: tuple[DiagramBand, ...]
    legend: tuple[LegendEntry, ...]
    inputs: tuple[tuple[float, float, str], ...]
    plain_lines: tuple[tuple[tuple[float, float], tuple[float, float]], ...]
    width: float
    height: float
    title: str = ""
    note: str = ""

    def figure(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws the diagram as a matplotlib figure.

        Args:
            path: where to save it (its ending chooses the format: png, svg, pdf).
        """
        left, top = _BAND_LABEL + _MARGIN, _TITLE * bool(self.title) + 0.2 * bool(self.note) + _MARGIN
        bottom = _LEGEND_LINE * len(self._legend_lines()) + 2 * _MARGIN
        width, height = max(left + self.width + _MARGIN, 3.6), bottom + self.height + top
        figure = new_figure(width, height)
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(-left, width - left), ylim=(-bottom, self.height + top))
        axes.axis("off")
        _draw_parts(axes, self, left, width)
        for number, entries in enumerate(self._legend_lines()):
            _draw_legend(axes, entries, -left + _MARGIN, -_LEGEND_LINE * (number + 0.5) - _MARGIN)
        if self.title:
            axes.text(
                -left + _MARGIN, self.height + top - 0.08, plain(self.title, 90), fontsize=11, va="top", weight="bold"
            )
        if self.note:
            axes.text(-left + _MARGIN, self.height + 0.08 + _MARGIN, plain(self.note, 120), fontsize=7, color="#555555")
        save_figure(figure, path)
        return figure

    def page(self) -> Html:
        """Returns the diagram as SVG in HTML, which says names and scores when hovered over."""
        data = {
            "lines": [{"start": line.start, "end": line.end, "about": line.about} for line in self.lines],
            "boxes": [box.about for box in self.boxes],
        }
        return render(
            "diagram.html.jinja", title=self.title or None, kind="circuit", data=data, svg=self._svg(), note=self.note
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a page if the path ends in ``.html``, otherwise a figure in the format of its ending."""
        if Path(path).suffix.lower() in (".html", ".htm"):
            self.page().save(path)
        else:
            self.figure(path)

    def _legend_lines(self) -> list[list[LegendEntry]]:
        """Returns the legend's entries by lines, as many in each as there is room for."""
        lines: list[list[LegendEntry]] = []
        room, used = max(self.width, 3.0), 0.0
        for entry in self.legend:
            needed = 0.42 + 0.062 * len(entry.text)
            if not lines or used + needed > room:
                lines, used = [*lines, []], 0.0
            lines[-1].append(entry)
            used += needed
        return lines

    def _svg(self) -> dict[str, Any]:
        """Returns what the template places, in pixels, y downward."""

        def across(x: float) -> float:
            return round((x + _BAND_LABEL + _MARGIN) * _PIXELS, 1)

        def down(y: float) -> float:
            return round((self.height - y + _MARGIN) * _PIXELS, 1)

        lines = [
            {
                "path": _path([(across(x), down(y)) for x, y in line.points]),
                "colour": line.colour,
                "width": round(line.width, 2),
                "opacity": round(line.opacity, 3),
                "dash": _dashes(line.dash, line.width),
                "about": line.about,
            }
            for line in self.lines
        ]
        boxes = [
            {
                "x": across(box.x - box.width / 2), "y": down(box.y + box.height / 2),
                "width": round(box.width * _PIXELS, 1), "height": round(box.height * _PIXELS, 1),
                "middle": across(box.x), "baseline": down(_text_height(box) - 0.035), "text": box.text,
                "fill": box.fill,
                "radius": 8 if box.rounded else 2, "about": box.about,
            }
            for box in self.boxes
        ]  # fmt: skip
        bands = [
            {"y": down(band.high), "height": round((band.high - band.low) * _PIXELS, 1), "name": band.name,
             "middle": down((band.low + band.high) / 2)}
            for band in self.bands
        ]  # fmt: skip
        return {
            "width": across(self.width) + round(_MARGIN * _PIXELS), "height": down(0) + round(_MARGIN * _PIXELS),
            "lines": lines, "boxes": boxes, "bands": bands, "label": round(_MARGIN * _PIXELS),
            "inputs": [{"x": across(x), "y": down(y + 0.035), "text": text} for x, y, text in self.inputs],
            "plain": [[across(a), down(b), across(c), down(d)] for (a, b), (c, d) in self.plain_lines],
            "legend": [
                {"text": one.text, "colour": one.colour, "width": one.width, "dash": _dashes(one.dash, one.width)}
                for one in self.legend
            ],
        }  # fmt: skip


def _text_height(box: DiagramBox) -> float:
    """Returns where a box's name goes: the middle, or above the letters of its inputs if it is high."""
    return box.y + max(0.0, box.height - 0.2) / 2


def _path(points: list[tuple[float, float]]) -> str:
    (a, b, c, d) = (f"{x} {y}" for x, y in points)
    return f"M{a}C{b} {c} {d}"


def _dashes(dash: Dash, width: float) -> str:
    return " ".join(f"{each * max(width, 1.0):.1f}" for each in dash)


def _draw_parts(axes: Any, diagram: Diagram, left: float, width: float) -> None:
    """Draws bands, lines, boxes and dots, one over the other."""
    from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle
    from matplotlib.path import Path as Curve

    for number, band in enumerate(diagram.bands):
        colour = "#f4f4f4" if number % 2 else "#ffffff"
        axes.add_patch(
            Rectangle((-left, band.low), width, band.high - band.low, facecolor=colour, edgecolor="none", zorder=0)
        )
        axes.text(
            -left + _MARGIN, (band.low + band.high) / 2, plain(band.name), fontsize=7, color="#777777", va="center"
        )
    for (x, y), (to_x, to_y) in diagram.plain_lines:
        axes.plot([x, to_x], [y, to_y], color="#bbbbbb", lw=1.0, zorder=1)
    for line in diagram.lines:
        curve = Curve(list(line.points), [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
        axes.add_patch(PathPatch(
            curve, facecolor="none", edgecolor=line.colour, alpha=line.opacity, lw=line.width * _POINTS,
            linestyle=(0, line.dash) if line.dash else "solid", capstyle="butt", zorder=2,
        ))  # fmt: skip
    for box in diagram.boxes:
        shape = "round,pad=0,rounding_size=0.08" if box.rounded else "round,pad=0,rounding_size=0.02"
        corner = box.x - box.width / 2, box.y - box.height / 2
        axes.add_patch(FancyBboxPatch(
            corner, box.width, box.height, boxstyle=shape, facecolor=box.fill, edgecolor="#333333", lw=0.7, zorder=3
        ))  # fmt: skip
        axes.text(box.x, _text_height(box) - 0.005, plain(box.text), fontsize=6.5, ha="center", va="center", zorder=4)
    for x, y, letter in diagram.inputs:
        axes.text(x, y + 0.055, letter, fontsize=5, color="#555555", ha="center", va="center", zorder=4)


def _draw_legend(axes: Any, entries: list[LegendEntry], x: float, y: float) -> None:
    for entry in entries:
        style = (0, entry.dash) if entry.dash else "solid"
        points = entry.width * _POINTS
        axes.plot([x, x + 0.28], [y, y], color=entry.colour, lw=points, linestyle=style, dash_capstyle="butt")
        axes.text(x + 0.34, y, plain(entry.text, 60), fontsize=7, va="center", color="#333333")
        x += 0.42 + 0.062 * len(entry.text)
