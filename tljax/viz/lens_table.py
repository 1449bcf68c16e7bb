"""The logit lens as a table: the next token that each layer predicts at each position."""

import os
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np

from tljax.errors import InputError
from tljax.viz.checks import (
    Tokens,
    between_zero_and_one,
    checked_array,
    checked_names,
    checked_tokens,
    one_prompt,
    shown_token,
)
from tljax.viz.drawing import colour_bar, new_figure, plain, save_figure, show_matrix
from tljax.viz.html import Html, render, spelt, token_label
from tljax.viz.scale import Scale, scale_of

_BAND = 16
_CELL_LETTERS = 9
_CELL_INCHES = (0.78, 0.27)


class TableOptions(TypedDict, total=False):
    """Options of :func:`logit_lens_table`, documented there."""

    colour_values: Any
    colour_title: str
    title: str | None


class FigureOptions(TableOptions, total=False):
    """Options of :func:`logit_lens_figure`, documented there."""

    path: str | os.PathLike[str] | None


def logit_lens_table(
    top_tokens: Any,
    probabilities: Any,
    labels: Sequence[str],
    tokens: Tokens,
    *,
    colour_values: Any = None,
    colour_title: str = "probability",
    title: str | None = None,
) -> Html:
    """Shows the likeliest next token at each layer (row, the last at the bottom) and each position (column).

    Hovering over a cell lists its ``k`` tokens. Probabilities are rounded to four places.

    Args:
        top_tokens: the likeliest tokens as strings or ids, ``[layer, pos, k]``.
        probabilities: their probabilities, ``[layer, pos, k]``.
        labels: a name for each layer, first to last.
        tokens: the prompt's tokens as strings or ids.
        colour_values: values ``[layer, pos]`` to colour by, such as the entropy in nats; by default the probability
            of the likeliest token, on a scale from 0 to 1.
        colour_title: title of the colour scale.
        title: a heading.

    A leading batch axis of one is dropped from arrays and tokens.

    Raises:
        InputError: shapes, tokens and labels that do not match, more than one prompt, probabilities outside 0 to 1.
    """
    words, chances, names, texts = _checked(top_tokens, probabilities, labels, tokens)
    colours, scale = _colours(chances, colour_values)
    data = {
        "tokens": [token_label(text) for text in texts],
        "layers": names,
        "top": [[[token_label(word) for word in cell] for cell in row] for row in words],
        "probabilities": np.round(chances.astype(np.float64), 4).tolist(),
        "colours": None if colour_values is None else np.round(colours.astype(np.float64), 4).tolist(),
        "colour_title": colour_title,
    }
    return render(
        "lens_table.html.jinja", title=title, kind="logit lens", data=data, palette=scale.palette(),
        levels=scale.levels(colours).tolist(), low=f"{scale.low:.3g}", high=f"{scale.high:.3g}",
    )  # fmt: skip


def logit_lens_figure(
    top_tokens: Any,
    probabilities: Any,
    labels: Sequence[str],
    tokens: Tokens,
    *,
    colour_values: Any = None,
    colour_title: str = "probability",
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Draws the table of :func:`logit_lens_table` as a matplotlib figure; long prompts are wrapped.

    Args:
        top_tokens, probabilities, labels, tokens, colour_values, colour_title, title: as for that function.
        path: where to save the picture (its ending chooses the format).

    Raises:
        InputError: as that function.
    """
    words, chances, names, texts = _checked(top_tokens, probabilities, labels, tokens)
    colours, scale = _colours(chances, colour_values)
    width = min(_BAND, len(texts))
    bands = [slice(start, start + width) for start in range(0, len(texts), width)]
    figure = new_figure(
        width * _CELL_INCHES[0] + 2.2, len(bands) * (len(names) * _CELL_INCHES[1] + 0.75) + (0.4 if title else 0.1)
    )
    grid = figure.subplots(len(bands), 1, squeeze=False).ravel()
    for axes, band in zip(grid, bands, strict=True):
        image = show_matrix(axes, colours[:, band], scale)
        _fill(axes, words[:, band, 0], colours[:, band], scale)
        axes.set_xlim(-0.5, width - 0.5)
        heads = [f"{position}\n{_short(texts[position])}" for position in range(len(texts))[band]]
        axes.set_xticks(range(len(heads)), heads, fontsize=8)
        axes.set_yticks(range(len(names)), [plain(name) for name in names], fontsize=8)
        axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
        axes.spines[:].set_visible(False)
    colour_bar(figure, image, grid.tolist(), colour_title)
    figure.suptitle(plain(title or "", 100))
    save_figure(figure, path)
    return figure


def _fill(axes: Any, words: np.ndarray, colours: np.ndarray, scale: Scale) -> None:
    """Writes a token into each cell."""
    for row, line in enumerate(words):
        for column, ((_, ink), word) in enumerate(zip(scale.paints(colours[row]), line, strict=True)):
            axes.text(column, row, _short(word), color=ink, fontsize=8, ha="center", va="center", clip_on=True)


def _short(token: str) -> str:
    return plain(token_label(token), _CELL_LETTERS)


def _colours(chances: np.ndarray, colour_values: Any) -> tuple[np.ndarray, Scale]:
    """Returns the values that colour the cells, ``[layer, pos]``, and the scale."""
    if colour_values is None:
        return chances[:, :, 0], Scale(0.0, 1.0)
    values = checked_array(colour_values, "colour_values")
    if values.ndim == 3:
        one_prompt(len(values), "colour_values")
        values = values[0]
    if values.shape != chances.shape[:2]:
        raise InputError(f"colour_values is [layer, pos] = {list(chances.shape[:2])}; got shape {values.shape}.")
    return values, scale_of(values)


def _as_shown(words: np.ndarray) -> np.ndarray:
    texts = np.array([shown_token(word, "top_tokens") for word in words.flat], dtype=object)
    return texts.reshape(words.shape)


def _checked(
    top_tokens: Any, probabilities: Any, labels: Sequence[str], tokens: Any
) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """Returns the checked tokens and probabilities ``[layer, pos, k]``, likeliest first, the labels and the prompt."""
    texts = checked_tokens(tokens)
    chances, words = checked_array(probabilities, "probabilities"), np.asarray(top_tokens, dtype=object)
    if chances.ndim == 4:
        one_prompt(len(chances), "probabilities")
        chances = chances[0]
    if words.ndim == 4:
        one_prompt(len(words), "top_tokens")
        words = words[0]
    if words.ndim != 3 or words.shape != chances.shape:
        raise InputError(
            f"top_tokens and probabilities are [layer, pos, k], of one shape; got {words.shape} and {chances.shape}."
        )
    words = _as_shown(words)
    if words.shape[1] != len(texts):
        raise InputError(
            f"top_tokens of shape {words.shape} has {words.shape[1]} positions; there are {len(texts)} tokens."
        )
    chances = between_zero_and_one(chances, "probabilities", "Give probabilities, not logits: jax.nn.softmax(logits).")
    order = np.argsort(-chances, axis=-1, kind="stable")
    names = [spelt(name) for name in checked_names(labels, len(words), "labels", "layer")]
    return np.take_along_axis(words, order, -1), np.take_along_axis(chances, order, -1), names, texts
