"""Heat maps of results, drawn with matplotlib."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from tljax.checks import typed
from tljax.errors import InputError
from tljax.patching.result import PatchingResult
from tljax.viz.drawing import MAX_PANELS, Picture, draw, save_figure
from tljax.viz.scale import scale_of

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
        title, x_title, y_title, colour_title: texts.
        signed: ``False`` colours from white at zero to blue, for what has no sign: norms, probabilities, scores.
        path: where to save the picture (its ending chooses the format).

    Returns:
        The matplotlib figure (shown by a notebook when it ends a cell).

    Raises:
        InputError: too many axes or panels to draw, labels that do not match, negative values with ``signed=False``.
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


def _of_result(result: PatchingResult, of: str | None, facet: str | None) -> Picture:
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
    return Picture(
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
