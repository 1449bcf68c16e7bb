"""A prompt with a colour behind each token, for one value a token or several to choose from."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from tljax.errors import InputError
from tljax.viz.checks import Tokens, checked_array, checked_names, checked_tokens, one_prompt
from tljax.viz.drawing import MAX_PANELS, new_figure, plain, save_figure
from tljax.viz.html import Html, render, running_token, token_label
from tljax.viz.scale import Scale, scale_of

_LINE_LETTERS = 90
_LETTER_INCHES, _LINE_INCHES = 0.09, 0.28


def colored_tokens(
    tokens: Tokens,
    values: Any,
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
    min_value: float | None = None,
    max_value: float | None = None,
) -> Html:
    """Colours the text behind each token: blue from zero, or red and blue around zero if any value is negative.

    Hovering over a token shows its value, to four digits. One feature is shown at a time; each has its own colour scale
    unless both ends are given.

    Args:
        tokens: the prompt's tokens as strings, ``model.to_str_tokens(prompt)``, or as ids.
        values: one value a token, ``[pos]``, or several, ``[pos, feature]``. A leading batch axis of one is dropped.
        names: one name for each feature; by default ``value``, or ``feature 0``, ``feature 1``, ...
        title: a heading.
        min_value, max_value: ends of the colour scale instead of zero and the largest value; around zero both sides
            are as long as the larger of the two.

    Raises:
        InputError: shapes, tokens and names that do not match, more than one prompt, values that are not finite.
    """
    texts, columns, labels = _checked(tokens, values, names)
    scales = [scale_of(column, min_value, max_value) for column in columns]
    data = {
        "tokens": [token_label(text) for text in texts],
        "text": [running_token(text) for text in texts],
        "features": [
            {
                "name": name,
                "values": [float(f"{value:.4g}") for value in column],
                "levels": scale.levels(column).tolist(),
                "low": f"{scale.low:.3g}",
                "high": f"{scale.high:.3g}",
                "colours": scale.colours,
            }
            for name, column, scale in zip(labels, columns, scales, strict=True)
        ],
        "palettes": {scale.colours: scale.palette() for scale in scales},
    }
    return render("tokens.html.jinja", title=title, kind="coloured tokens", data=data)


def colored_tokens_figure(
    tokens: Tokens,
    values: Any,
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
    min_value: float | None = None,
    max_value: float | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Draws the picture of :func:`colored_tokens` as a matplotlib figure, with features one below the other.

    Args:
        tokens, values, names, title, min_value, max_value: as for :func:`colored_tokens`.
        path: where to save the picture (its ending chooses the format).

    Raises:
        InputError: as :func:`colored_tokens`, or more features than stay readable.
    """
    texts, columns, labels = _checked(tokens, values, names)
    if len(columns) > MAX_PANELS:
        raise InputError(
            f"values has {len(columns)} features; {MAX_PANELS} stay readable in a figure. Draw some of them, "
            f"values[:, :{MAX_PANELS}], or use colored_tokens, which shows one at a time."
        )
    places, lines = _lines([running_token(text) for text in texts])
    several = len(columns) > 1 or names is not None
    height = len(columns) * (lines * _LINE_INCHES + (0.35 if several else 0.1)) + (0.35 if title else 0.1)
    figure = new_figure(_LINE_LETTERS * _LETTER_INCHES + 0.8, height)
    grid = figure.subplots(len(columns), 1, squeeze=False).ravel()
    for axes, column, label in zip(grid, columns, labels, strict=True):
        _write(axes, places, lines, column, scale_of(column, min_value, max_value))
        axes.set_title(plain(label) if several else "", fontsize=10, loc="left")
    figure.suptitle(plain(title or "", 80))
    save_figure(figure, path)
    return figure


def _checked(tokens: Any, values: Any, names: Sequence[str] | None) -> tuple[list[str], np.ndarray, list[str]]:
    """Returns the checked tokens, values ``[feature, pos]`` and names of the features."""
    texts, array = checked_tokens(tokens), checked_array(values, "values")
    shape, count = array.shape, len(texts)
    if array.ndim == 3 or (array.ndim == 2 and shape[1] == count != shape[0]):
        one_prompt(shape[0], "values")
        array = array[0]
    if array.ndim not in (1, 2):
        raise InputError(f"values is [pos] or [pos, feature]; got shape {shape}.")
    if len(array) != count:
        raise InputError(f"values of shape {shape} has {len(array)} positions; there are {count} tokens.")
    if array.ndim == 1:
        return texts, array[None], checked_names(["value"] if names is None else names, 1, "names", "feature")
    return texts, array.T, checked_names(names, array.shape[1], "names", "feature")


def _lines(words: list[str]) -> tuple[list[tuple[int, int, str]], int]:
    """Returns ``(line, first letter, text)`` of each word in lines of equally wide letters, and the number of lines."""
    places, line, column = [], 0, 0
    for word in words:
        text = word.replace("\n", "")
        if column and column + len(text) > _LINE_LETTERS:
            line, column = line + 1, 0
        places.append((line, column, text))
        line, column = (line + 1, 0) if word.endswith("\n") else (line, column + len(text))
    return places, places[-1][0] + 1


def _write(axes: Any, places: list[tuple[int, int, str]], lines: int, column: np.ndarray, scale: Scale) -> None:
    """Draws one feature: a coloured box with its text for each token, and a colour bar."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    axes.set(xlim=(0, _LINE_LETTERS), ylim=(lines, 0))
    axes.axis("off")
    for (line, start, text), (background, ink) in zip(places, scale.paints(column), strict=True):
        axes.add_patch(Rectangle((start, line + 0.06), len(text), 0.88, facecolor=background, edgecolor="0.8", lw=0.5))
        for offset, letter in enumerate(text):
            axes.text(
                start + offset + 0.5, line + 0.5, plain(letter), color=ink, family="monospace", fontsize=10,
                ha="center", va="center",
            )  # fmt: skip
    colours = ScalarMappable(Normalize(scale.low, scale.high), scale.colours)
    bar = axes.figure.colorbar(colours, ax=axes, pad=0.01, fraction=0.02, aspect=2 * lines)
    bar.set_ticks([scale.low, scale.high], labels=[f"{scale.low:.3g}", f"{scale.high:.3g}"], fontsize=8)
