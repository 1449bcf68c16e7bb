"""Heat maps of results, drawn with matplotlib."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tljax.errors import InputError


def heatmap(
    values: Any,
    *,
    x_labels: Sequence[str] | None = None,
    y_labels: Sequence[str] | None = None,
    title: str = "",
    x_title: str = "",
    y_title: str = "",
    colour_title: str = "",
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Draws a matrix on a red-white-blue scale centred on zero.

    Args:
        values: ``[row, column]``.
        x_labels, y_labels: one label for each column and row, such as the prompt's tokens.
        title, x_title, y_title, colour_title: texts.
        path: where to save the picture (its ending chooses the format).

    Returns:
        The matplotlib figure (shown by a notebook when it ends a cell).

    Raises:
        InputError: ``values`` is not a matrix, or labels do not match it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matrix = np.asarray(values, dtype=np.float32)
    if matrix.ndim != 2:
        raise InputError(
            f"heatmap draws a matrix, got shape {matrix.shape}. Pick or average over the other axes first."
        )
    for labels, size, axis in ((x_labels, matrix.shape[1], "x"), (y_labels, matrix.shape[0], "y")):
        if labels is not None and len(labels) != size:
            raise InputError(f"{axis}_labels has {len(labels)} entries; the matrix has {size} along that axis.")
    rows, columns = matrix.shape
    figure = Figure(figsize=(max(4.5, 0.5 * columns + 2.2), max(2.6, 0.42 * rows + 1.9)), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    limit = float(np.nanmax(np.abs(matrix))) or 1.0
    image = axes.imshow(matrix, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    _label(axes.set_xticks, x_labels, columns, rotation=60, ha="right", rotation_mode="anchor")
    _label(axes.set_yticks, y_labels, rows)
    axes.set_title(title)
    axes.set_xlabel(x_title)
    axes.set_ylabel(y_title)
    figure.colorbar(image, ax=axes, label=colour_title)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return figure


def _label(set_ticks: Any, labels: Sequence[str] | None, size: int, **style: Any) -> None:
    if labels is not None:
        set_ticks(range(size), [label.replace("$", r"\$") for label in labels], **style)
    elif size <= 30:
        set_ticks(range(size))


def text_heatmap(values: Any, x_labels: Sequence[str], y_labels: Sequence[str]) -> str:
    """The same matrix as a table of numbers for a terminal, with its largest entry marked ``*``."""
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
