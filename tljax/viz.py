"""Heat maps of results, drawn with matplotlib."""

import dataclasses
import functools
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tljax.errors import InputError
from tljax.patching.result import PatchingResult

MAX_PANELS = 36

_LONGEST_LABEL = 24
_WIDEST_INCHES = 24.0
_NARROWEST_LABEL_INCHES = 0.17

_POSITIONS = ("pos", "query_pos", "key_pos", "dest_pos", "src_pos")
_AXIS_TITLES = {
    "pos": "position", "query_pos": "query position", "key_pos": "key position", "dest_pos": "destination position",
    "src_pos": "source position", "head_index": "head", "row": "",
}  # fmt: skip
_MEASURES = {
    "effect": "effect: patched − baseline",
    "normalized": "normalised effect: 0 unpatched, 1 source run",
    "values": "metric",
}


@dataclasses.dataclass(frozen=True)
class _Picture:
    """What is drawn: matrices that share both axes."""

    panels: tuple[np.ndarray, ...]
    panel_titles: tuple[str, ...] = ("",)
    x_labels: Sequence[str] | None = None
    y_labels: Sequence[str] | None = None
    title: str = ""
    x_title: str = ""
    y_title: str = ""
    colour_title: str = ""
    one_scale: bool = True


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
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Draws a result or a matrix on a red-white-blue scale centred on zero; cells without a value are grey.

    A result brings its own labels and titles and is averaged over prompts. Metrics, kinds of activation and a third
    axis become panels; several metrics have a scale each.

    Args:
        values: a :class:`~tljax.patching.PatchingResult`, or a matrix ``[row, column]``.
        of: for a result: ``"effect"`` (the default where the baseline is known), ``"values"`` or ``"normalized"``.
        facet: for a result with three axes: the one whose entries get a panel each; by default the first.
        x_labels, y_labels: one label for each column and row, such as the prompt's tokens.
        title, x_title, y_title, colour_title: texts.
        path: where to save the picture (its ending chooses the format).

    Returns:
        The matplotlib figure (shown by a notebook when it ends a cell).

    Raises:
        InputError: too many axes or panels to draw, or labels that do not match.
    """
    picture = _of_result(values, of, facet) if isinstance(values, PatchingResult) else _of_matrix(values, of, facet)
    texts = {
        "x_labels": x_labels, "y_labels": y_labels, "title": title, "x_title": x_title, "y_title": y_title,
        "colour_title": colour_title,
    }  # fmt: skip
    picture = dataclasses.replace(picture, **{name: text for name, text in texts.items() if text is not None})
    rows, columns = picture.panels[0].shape
    for labels, size, axis in ((picture.x_labels, columns, "x"), (picture.y_labels, rows, "y")):
        if labels is not None and len(labels) != size:
            raise InputError(f"{axis}_labels has {len(labels)} entries; the matrix has {size} along that axis.")
    figure = _draw(picture)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return figure


def _of_matrix(values: Any, of: str | None, facet: str | None) -> _Picture:
    matrix = np.asarray(values, dtype=np.float32)
    if of is not None or facet is not None:
        raise InputError("of= and facet= choose what to draw of a PatchingResult; this is an array: leave them out.")
    if matrix.ndim != 2 or not matrix.size:
        raise InputError(
            f"heatmap draws a matrix, got shape {matrix.shape}. Pick or average over the other axes first."
        )
    return _Picture((matrix,))


def _of_result(result: PatchingResult, of: str | None, facet: str | None) -> _Picture:
    of = of or ("values" if result.baseline is None else "effect")
    if of not in _MEASURES:
        raise InputError(f"of= is one of {', '.join(map(repr, _MEASURES))}; got {of!r}.")
    measured = result.values if of == "values" else getattr(result, of)()
    array = np.asarray(measured, np.float32)
    array = array if result.reduced else array.mean(axis=-1)
    axes = [axis for axis in result.axis_names if axis != "batch"]
    if "metric" in axes and array.shape[0] == 1:
        array, axes = array[0], axes[1:]
    array, axes, panel_axis = _panels_first(result, array, axes, facet)
    titles = ("",) if panel_axis is None else tuple(_panel_title(result, panel_axis, n) for n in range(len(array)))
    if len(axes) == 1:
        alone = axes[0] == "row"
        array, axes = (array[:, :, None], [axes[0], ""]) if alone else (array[:, None], ["", axes[0]])
    elif axes[0] in _POSITIONS and axes[1] not in _POSITIONS:
        array, axes = array.swapaxes(1, 2), axes[::-1]
    y_axis, x_axis = axes
    average = "" if result.reduced else f", mean of {result.sizes['batch']} prompts"
    return _Picture(
        tuple(array), titles, _axis_labels(result, x_axis), _axis_labels(result, y_axis), result.activation_name,
        _AXIS_TITLES.get(x_axis, x_axis), _AXIS_TITLES.get(y_axis, y_axis), _MEASURES[of] + average,
        one_scale=panel_axis != "metric",
    )  # fmt: skip


def _panels_first(
    result: PatchingResult, array: np.ndarray, axes: list[str], facet: str | None
) -> tuple[np.ndarray, list[str], str | None]:
    """The array as ``[panel, *the other axes]``, those axes, and the axis of the panels if there is one."""
    panel_axis = facet or next((axis for axis in axes if axis in ("metric", "patch_type")), None)
    if panel_axis is None and len(axes) > 2:
        panel_axis = axes[0]
    if panel_axis is not None and panel_axis not in axes:
        raise InputError(f"facet={panel_axis!r} is not among the axes {axes}.")
    rest = [axis for axis in axes if axis != panel_axis]
    if not 1 <= len(rest) <= 2 or not array.size:
        raise InputError(
            f"A heat map has one or two axes, and panels for one more; this result has {dict(result.sizes)}. "
            f"Choose an entry of the others first: result.select({rest[0] if rest else 'layer'}=0)."
        )
    if panel_axis is None:
        return array[None], rest, None
    array = np.moveaxis(array, axes.index(panel_axis), 0)
    if len(array) > MAX_PANELS:
        raise InputError(
            f"One panel for each of {len(array)} entries of {panel_axis!r} is more than the {MAX_PANELS} that stay "
            f"readable. Choose one with result.select({panel_axis}=0), or other panels with facet={rest[-1]!r}."
        )
    return array, rest, panel_axis


def _panel_title(result: PatchingResult, axis: str, number: int) -> str:
    texts = result.metric_names if axis == "metric" else result.labels.get(axis)
    if texts is None:
        return f"{_AXIS_TITLES.get(axis, axis)} {number}"
    return f"{number} {texts[number]}" if axis in _POSITIONS else texts[number]


def _axis_labels(result: PatchingResult, axis: str) -> Sequence[str] | None:
    if axis == "":
        return ("",)
    if axis == "row" and result.rows is not None:
        return [
            ", ".join(f"{name} {value}" for name, value in zip(result.rows.columns, row, strict=True))
            for row in result.rows.itertuples(index=False)
        ]
    return result.metric_names if axis == "metric" else result.labels.get(axis)


def _draw(picture: _Picture) -> Any:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(picture.panels)
    rows, columns = picture.panels[0].shape
    cell_width, cell_height = _cell_size(rows, columns, count)
    across = _panels_across(count, columns * cell_width + 0.8)
    down = math.ceil(count / across)
    size = (
        max(4.5, across * (columns * cell_width + 0.5) + 1.7),
        max(2.6, down * (rows * cell_height + 0.6) + 1.3),
    )
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    figure._repr_png_ = functools.partial(_as_png, figure)  # type: ignore[attr-defined]  # how notebooks show it
    grid = figure.subplots(down, across, squeeze=False).ravel()
    colours = colormaps["RdBu"].with_extremes(bad="0.8")
    limits = [_limit(panel) for panel in picture.panels]
    for number, (axes, panel, name) in enumerate(zip(grid, picture.panels, picture.panel_titles, strict=False)):
        limit = max(limits) if picture.one_scale else limits[number]
        image = axes.imshow(panel, cmap=colours, vmin=-limit, vmax=limit, aspect="auto")
        axes.set_title(_plain(name), fontsize=10)
        last_row, first_column = number + across >= count, number % across == 0
        slant = {"rotation": 90} if cell_width < 0.4 else {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
        _label(axes.set_xticks, picture.x_labels, columns, cell_width, last_row, **slant)
        _label(axes.set_yticks, picture.y_labels, rows, cell_height, first_column)
        axes.set_xlabel(picture.x_title if last_row else "")
        axes.set_ylabel(picture.y_title if first_column else "")
        if not picture.one_scale or count == 1:
            figure.colorbar(image, ax=axes, label=picture.colour_title)
    for unused in grid[count:]:
        unused.set_visible(False)
    if picture.one_scale and count > 1:
        figure.colorbar(image, ax=grid.tolist(), label=picture.colour_title)
    if count == 1:
        grid[0].set_title(picture.title)
    else:
        figure.suptitle(picture.title)
    return figure


def _as_png(figure: Any) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _cell_size(rows: int, columns: int, panels: int) -> tuple[float, float]:
    """Width and height of a cell in inches."""
    if panels > 1:
        return max(0.2, min(0.28, 7.0 / columns)) if columns < 60 else _WIDEST_INCHES / 2 / columns, 0.24
    width = 0.5 if columns <= 20 else max(0.24, 10.0 / columns)
    height = 0.42 if rows <= 20 else max(0.2, 8.4 / rows)
    return min(width, _WIDEST_INCHES / columns), min(height, _WIDEST_INCHES / rows)


def _panels_across(count: int, panel_inches: float) -> int:
    widest = max(1, int(_WIDEST_INCHES * 0.75 // panel_inches))
    return min(count, widest, max(3, math.ceil(math.sqrt(count))))


def _limit(panel: np.ndarray) -> float:
    finite = np.abs(panel[np.isfinite(panel)])
    return float(finite.max(initial=0.0)) or 1.0


def _label(set_ticks: Any, labels: Sequence[str] | None, size: int, cell: float, shown: bool, **style: Any) -> None:
    """Ticks with labels, or numbers; only every so many where cells are too small for all of them."""
    step = math.ceil(_NARROWEST_LABEL_INCHES / cell)
    ticks = range(0, size, step)
    if not shown or labels == ("",):
        set_ticks([])
    elif labels is not None:
        set_ticks(ticks, [_plain(labels[n]) for n in ticks], fontsize=10 if cell > 0.3 else 8, **style)
    else:
        set_ticks(ticks, [str(n) for n in ticks], fontsize=10 if cell > 0.3 else 8)


def _plain(label: str) -> str:
    """A label as matplotlib should show it: control characters spelt out, no mathematics, not too long."""
    spelt = "".join(char if char.isprintable() else repr(char)[1:-1] for char in label).replace("$", r"\$")
    return spelt if len(spelt) <= _LONGEST_LABEL else spelt[: _LONGEST_LABEL - 1] + "…"


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
