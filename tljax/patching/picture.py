"""Chooses the axes, panels and labels of a result's heat map."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tljax.errors import InputError
from tljax.viz.drawing import MAX_PANELS, Picture

if TYPE_CHECKING:
    from tljax.patching.result import PatchingResult

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


def picture_of(result: "PatchingResult", of: str | None = None, facet: str | None = None) -> Picture:
    """Returns the picture of a result; the options are those of :func:`tljax.viz.heatmap`."""
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
    result: "PatchingResult", array: np.ndarray, axes: list[str], facet: str | None
) -> tuple[np.ndarray, list[str], str | None]:
    """Returns the array as ``[panel, *other axes]``, the other axes, and the axis of the panels if there is one."""
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


def _panel_title(result: "PatchingResult", axis: str, number: int) -> str:
    texts = result.metric_names if axis == "metric" else result.labels.get(axis)
    if texts is None:
        return f"{_AXIS_TITLES.get(axis, axis)} {number}"
    return f"{number} {texts[number]}" if axis in _POSITIONS else texts[number]


def _axis_labels(result: "PatchingResult", axis: str) -> Sequence[str] | None:
    if axis == "":
        return ("",)
    if axis == "row" and result.rows is not None:
        return [
            ", ".join(f"{name} {value}" for name, value in zip(result.rows.columns, row, strict=True))
            for row in result.rows.itertuples(index=False)
        ]
    return result.metric_names if axis == "metric" else result.labels.get(axis)
