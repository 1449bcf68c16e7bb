"""Heat maps of results, drawn with matplotlib."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np

from tljax.checks import typed
from tljax.errors import InputError
from tljax.viz.drawing import Drawable, Picture, draw, save_figure
from tljax.viz.scale import scale_of


class HeatmapOptions(TypedDict, total=False):
    """Options of :func:`heatmap`, documented there."""

    of: str | None
    facet: str | None
    x_labels: Sequence[str] | None
    y_labels: Sequence[str] | None
    title: str | None
    x_title: str | None
    y_title: str | None
    colour_title: str | None
    signed: bool
    path: str | os.PathLike[str] | None


@typed
def heatmap(
    values: Any,
    *,
    of: str | None = None,
    facet: str | None = None,
    x_labels: Sequence[str] | None = None,
    y_labels: Sequence[str] | None = None,
    title: str | None = None,
    x_title: str | None = None,
    y_title: str | None = None,
    colour_title: str | None = None,
    signed: bool = True,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Draws a result or a matrix, in red, white and blue centred on zero; cells without a value are grey.

    A result brings its own labels and titles and is averaged over prompts. Metrics, kinds of activation and a third
    axis become panels; several metrics have a scale each.

    Args:
        values: a :class:`~tljax.patching.PatchingResult`, or a matrix ``[row, column]``.
        of: for a result: ``"effect"`` (the default where the baseline is known), ``"values"`` or ``"normalized"``.
        facet: for a result with three axes: the one whose entries get a panel each; by default the first.
        x_labels, y_labels: one label for each column and row, such as the prompt's tokens.
        title, x_title, y_title, colour_title: titles of the figure, its axes and its colour scale.
        signed: ``False`` colours from white at zero to blue, for values without a sign: norms, probabilities, scores.
        path: where to save the picture (its ending chooses the format).

    Returns:
        The matplotlib figure (shown by a notebook when it ends a cell).

    Raises:
        InputError: too many axes or panels to draw, labels that do not match, negative values with ``signed=False``.
    """
    picture = values.picture(of, facet) if isinstance(values, Drawable) else _of_matrix(values, of, facet)
    texts = {
        "x_labels": x_labels, "y_labels": y_labels, "title": title, "x_title": x_title, "y_title": y_title,
        "colour_title": colour_title,
    }  # fmt: skip
    picture = dataclasses.replace(picture, **{name: text for name, text in texts.items() if text is not None})
    rows, columns = picture.panels[0].shape
    for labels, size, axis in ((picture.x_labels, columns, "x"), (picture.y_labels, rows, "y")):
        if labels is not None and len(labels) != size:
            raise InputError(f"{axis}_labels has {len(labels)} entries; the matrix has {size} along that axis.")
    if not signed:
        finite = np.concatenate([panel[np.isfinite(panel)] for panel in picture.panels])
        if finite.min(initial=0.0) < 0:
            raise InputError(f"signed=False draws values from zero up; there is {finite.min():.3g}. Leave it out.")
        picture = dataclasses.replace(picture, scale=scale_of(finite))
    figure = draw(picture)
    save_figure(figure, path)
    return figure


def _of_matrix(values: Any, of: str | None, facet: str | None) -> Picture:
    matrix = np.asarray(values, dtype=np.float32)
    if of is not None or facet is not None:
        raise InputError("of= and facet= choose what to draw of a PatchingResult; this is an array: leave them out.")
    if matrix.ndim != 2 or not matrix.size:
        raise InputError(
            f"heatmap draws a matrix, got shape {matrix.shape}. Pick or average over the other axes first."
        )
    return Picture((matrix,))


def text_heatmap(values: Any, x_labels: Sequence[str], y_labels: Sequence[str]) -> str:
    """Formats a matrix as a table of numbers for a terminal, with the entry largest in size marked ``*``."""
    matrix = np.asarray(values, dtype=np.float32)
    cells = [[f"{value:+.2f}" for value in row] for row in matrix]
    row, column = np.unravel_index(np.argmax(np.abs(matrix)), matrix.shape)
    cells[row][column] += "*"
    widths = [max(len(label), *(len(line[n]) for line in cells)) for n, label in enumerate(x_labels)]
    side = max(map(len, y_labels))
    header = " " * side + "  " + "  ".join(label.rjust(width) for label, width in zip(x_labels, widths, strict=True))
    lines = [
        f"{label.rjust(side)}  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for label, line in zip(y_labels, cells, strict=True)
    ]
    return "\n".join([header, *lines])
