"""Draws matrices as a matplotlib figure, for heat maps and attention."""

import abc
import dataclasses
import functools
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tljax.safetensors_files import replace_file
from tljax.viz.html import spelt
from tljax.viz.scale import DIVERGING, Scale

MAX_PANELS = 36

_LONGEST_LABEL = 24
_WIDEST_INCHES = 24.0
_NARROWEST_LABEL_INCHES = 0.17
_SQUARE_PANEL_INCHES = 4.0
_WHOLE: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.1}
"""How figures are saved: as large as their content, including labels that stick out."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """The content of a figure: matrices that share both axes.

    Attributes:
        panels: the matrices, of one shape.
        panel_titles: a title for each panel.
        x_labels, y_labels: a label for each column and row; ``None`` for numbers.
        title, x_title, y_title, colour_title: titles of the figure, its axes and its colour scale.
        one_scale: whether panels share colours; otherwise each has a colour bar.
        scale: the colours; by default red, white and blue centred on zero, up to the largest absolute value.
        square: cells are as high as wide.
    """

    panels: tuple[np.ndarray, ...]
    panel_titles: Sequence[str] = ("",)
    x_labels: Sequence[str] | None = None
    y_labels: Sequence[str] | None = None
    title: str = ""
    x_title: str = ""
    y_title: str = ""
    colour_title: str = ""
    one_scale: bool = True
    scale: Scale | None = None
    square: bool = False


class Drawable(abc.ABC):
    """Base of results that :func:`tljax.viz.heatmap` can draw, which know their own axes and labels."""

    @abc.abstractmethod
    def picture(self, of: str | None = None, facet: str | None = None) -> Picture:
        """Returns the picture to draw; ``of`` chooses one of its measures, ``facet`` the axis that becomes panels."""


def draw(picture: Picture) -> Any:
    """Draws a picture as a matplotlib figure."""
    count = len(picture.panels)
    rows, columns = picture.panels[0].shape
    cell_width, cell_height = _cell_size(rows, columns, count, picture.square)
    across = _panels_across(count, columns * cell_width + 0.8, picture.square)
    down = math.ceil(count / across)
    width, height = across * (columns * cell_width + 0.5) + 1.7, down * (rows * cell_height + 0.6) + 1.3
    if picture.square:  # other figures take the space for labels from their cells
        width, height = width + _label_inches(picture.y_labels), height + _label_inches(picture.x_labels) - 0.5
    figure = new_figure(max(4.5, width), max(2.6, height))
    grid = figure.subplots(down, across, squeeze=False).ravel()
    scales = _scales(picture)
    for number, (axes, panel, name) in enumerate(zip(grid, picture.panels, picture.panel_titles, strict=False)):
        image = show_matrix(axes, panel, scales[number], aspect="equal" if picture.square else "auto")
        axes.set_title(plain(name), fontsize=10)
        last_row, first_column = number + across >= count, number % across == 0
        slant = {"rotation": 90} if cell_width < 0.4 else {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
        _label(axes.set_xticks, picture.x_labels, columns, cell_width, last_row, **slant)
        _label(axes.set_yticks, picture.y_labels, rows, cell_height, first_column)
        axes.set_xlabel(picture.x_title if last_row else "")
        axes.set_ylabel(picture.y_title if first_column else "")
        if not picture.one_scale or count == 1:
            colour_bar(figure, image, axes, picture.colour_title)
    for unused in grid[count:]:
        unused.set_visible(False)
    if picture.one_scale and count > 1:
        colour_bar(figure, image, grid.tolist(), picture.colour_title)
    if count == 1:
        grid[0].set_title(picture.title or plain(picture.panel_titles[0]))
    else:
        figure.suptitle(picture.title)
    return figure


def new_figure(width: float, height: float) -> Any:
    """Returns an empty figure, sized in inches, that belongs to no window and that a notebook shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    figure._repr_png_ = functools.partial(_as_png, figure)  # type: ignore[attr-defined]  # how notebooks show it
    return figure


def show_matrix(axes: Any, matrix: np.ndarray, scale: Scale, aspect: str = "auto") -> Any:
    """Draws a matrix in the colours of a scale; cells without a value are grey."""
    from matplotlib import colormaps

    colours = colormaps[scale.colours].with_extremes(bad="0.8")
    return axes.imshow(matrix, cmap=colours, vmin=scale.low, vmax=scale.high, aspect=aspect, interpolation="nearest")


def colour_bar(figure: Any, image: Any, axes: Any, title: str) -> None:
    """Draws a colour bar beside the axes, about as wide in tall figures as in others."""
    figure.colorbar(image, ax=axes, label=title, aspect=max(20, 4 * figure.get_figheight()), pad=0.01)


def save_figure(figure: Any, path: str | os.PathLike[str] | None) -> None:
    """Saves a figure if there is a path, making its folder."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        kind = Path(path).suffix.removeprefix(".").lower() or "png"
        with replace_file(Path(path) if Path(path).suffix else Path(f"{os.fspath(path)}.png")) as stream:
            figure.savefig(stream, format=kind, **_WHOLE)


def plain(label: str, longest: int = _LONGEST_LABEL) -> str:
    """Prepares a label for matplotlib: control characters escaped, ``$`` not as mathematics, long labels cut."""
    text = spelt(label)
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return text.replace("$", r"\$")


def _as_png(figure: Any) -> bytes:
    """Returns the figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **_WHOLE)
    return buffer.getvalue()


def _scales(picture: Picture) -> list[Scale]:
    """Returns the colour scale of each panel."""
    if picture.scale is not None:
        return [picture.scale] * len(picture.panels)
    limits = [_limit(panel) for panel in picture.panels]
    limits = [max(limits)] * len(limits) if picture.one_scale else limits
    return [Scale(-limit, limit, DIVERGING) for limit in limits]


def _limit(panel: np.ndarray) -> float:
    finite = np.abs(panel[np.isfinite(panel)])
    return float(finite.max(initial=0.0)) or 1.0


def _cell_size(rows: int, columns: int, panels: int, square: bool) -> tuple[float, float]:
    """Returns the width and height of a cell in inches."""
    if square and panels > 1:
        side = min(0.28, _SQUARE_PANEL_INCHES / max(rows, columns))
        return side, side
    if panels > 1:
        return max(0.2, min(0.28, 7.0 / columns)) if columns < 60 else _WIDEST_INCHES / 2 / columns, 0.24
    width = 0.5 if columns <= 20 else max(0.24, 10.0 / columns)
    height = 0.42 if rows <= 20 else max(0.2, 8.4 / rows)
    width, height = min(width, _WIDEST_INCHES / columns), min(height, _WIDEST_INCHES / rows)
    side = min(width, height)
    return (side, side) if square else (width, height)


def _panels_across(count: int, panel_inches: float, square: bool) -> int:
    widest = max(1, int(_WIDEST_INCHES * 0.75 // panel_inches))
    least = 2 if square and count == 4 else 3
    return min(count, widest, max(least, math.ceil(math.sqrt(count))))


def _label_inches(labels: Sequence[str] | None) -> float:
    return 0.07 * max(map(len, map(plain, labels or [""])))


def _label(set_ticks: Any, labels: Sequence[str] | None, size: int, cell: float, shown: bool, **style: Any) -> None:
    """Sets ticks with labels or numbers, skipping some where cells are too small for all of them."""
    step = math.ceil(_NARROWEST_LABEL_INCHES / cell)
    ticks = range(0, size, step)
    if not shown or labels == ("",):
        set_ticks([])
    elif labels is not None:
        set_ticks(ticks, [plain(labels[n]) for n in ticks], fontsize=10 if cell > 0.3 else 8, **style)
    else:
        set_ticks(ticks, [str(n) for n in ticks], fontsize=10 if cell > 0.3 else 8)
