"""Scatter plots of pairs of numbers that should agree."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from tljax.errors import InputError
from tljax.viz.drawing import new_figure, plain, save_figure

_LABELLED = 12


def scatter(
    x: Any,
    y: Any,
    *,
    labels: Sequence[str] | None = None,
    title: str = "",
    x_title: str = "",
    y_title: str = "",
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Draws points, with the line where both numbers are equal.

    Args:
        x, y: the numbers, ``[point]`` each.
        labels: a text for each point; the points largest in ``y`` show theirs.
        title, x_title, y_title: titles of the figure and its axes.
        path: where to save the picture (its ending chooses the format).

    Returns:
        The matplotlib figure (shown by a notebook when it ends a cell).

    Raises:
        InputError: the numbers do not pair up.
    """
    across, up = np.asarray(x, np.float32), np.asarray(y, np.float32)
    if across.ndim != 1 or across.shape != up.shape or (labels is not None and len(labels) != len(across)):
        raise InputError(
            f"scatter draws one point for each pair: x has shape {across.shape}, y {up.shape}"
            + ("." if labels is None else f", and there are {len(labels)} labels.")
        )
    figure = new_figure(5.0, 4.5)
    axes = figure.subplots()
    finite = np.concatenate([values[np.isfinite(values)] for values in (across, up)])
    low, high = float(finite.min(initial=0.0)), float(finite.max(initial=0.0))
    axes.plot([low, high], [low, high], color="0.7", linewidth=1, zorder=1)
    axes.scatter(across, up, s=18, color="#b2182b", zorder=2)
    largest = np.argsort(-np.abs(np.nan_to_num(up)))[:_LABELLED]
    for number, label in [] if labels is None else [(int(n), labels[int(n)]) for n in largest]:
        axes.annotate(plain(label), (across[number], up[number]), (3, 3), textcoords="offset points", fontsize=7)
    axes.set_title(title)
    axes.set_xlabel(x_title)
    axes.set_ylabel(y_title)
    save_figure(figure, path)
    return figure
