"""Attention: all heads of a layer on one prompt, as a page to explore and as a figure."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from tljax.errors import InputError
from tljax.viz.checks import Tokens, between_zero_and_one, checked_array, checked_names, checked_tokens, one_prompt
from tljax.viz.drawing import MAX_PANELS, Picture, draw, plain, save_figure
from tljax.viz.html import Html, render, running_token, token_label
from tljax.viz.scale import Scale

_SCALE = Scale(0.0, 1.0)


def attention_patterns(
    tokens: Tokens, attention: Any, *, head_names: Sequence[str] | None = None, title: str | None = None
) -> Html:
    """Shows all heads small and one of them large; hovering over a token shows what the head attends to from there.

    Values are rounded to thousandths. The colours always run from 0 to 1, so that heads can be compared.

    Args:
        tokens: the prompt's tokens as strings, ``model.to_str_tokens(prompt)``, or as ids.
        attention: attention after the softmax, ``[head, query, key]`` or ``[query, key]``, such as
            ``cache["pattern", layer]``. A leading batch axis of one is dropped.
        head_names: one name for each head; by default ``head 0``, ``head 1``, ..., and none for a head alone.
        title: a heading.

    Raises:
        InputError: shapes, tokens and names that do not match, more than one prompt, values outside 0 to 1.
    """
    texts, heads, names = _checked(tokens, attention, head_names)
    thousandths = np.round(heads.astype(np.float64) * 1000).astype(int)
    data = {
        "tokens": [token_label(text) for text in texts],
        "text": [running_token(text) for text in texts],
        "heads": names,
        "attention": [[np.trim_zeros(row, "b").tolist() for row in head] for head in thousandths],
        "palette": _SCALE.palette(),
    }
    return render("attention.html.jinja", title=title, kind="attention patterns", data=data)


def attention_figure(
    tokens: Tokens,
    attention: Any,
    *,
    head_names: Sequence[str] | None = None,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Draws all heads as panels of a matplotlib figure: queries down, keys across, colours from 0 to 1.

    Args:
        tokens, attention, head_names, title: as for :func:`attention_patterns`.
        path: where to save the picture (its ending chooses the format).

    Raises:
        InputError: as :func:`attention_patterns`, or more heads than stay readable.
    """
    words, heads, names = _checked(tokens, attention, head_names)
    if len(heads) > MAX_PANELS:
        raise InputError(
            f"attention has {len(heads)} heads; {MAX_PANELS} panels stay readable. Draw some of them, "
            f"attention[:{MAX_PANELS}], or use attention_patterns, which shows one large at a time."
        )
    labels = [token_label(word) for word in words]
    heading = plain(title or "", 100)
    figure = draw(
        Picture(tuple(heads), names, labels, labels, heading, "key", "query", "attention", scale=_SCALE, square=True)
    )
    save_figure(figure, path)
    return figure


def _checked(tokens: Any, attention: Any, head_names: Sequence[str] | None) -> tuple[list[str], np.ndarray, list[str]]:
    """Returns the checked tokens, attention ``[head, query, key]`` and names of the heads."""
    texts, array = checked_tokens(tokens), checked_array(attention, "attention")
    if array.ndim == 4:
        one_prompt(len(array), "attention")
        array = array[0]
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3:
        raise InputError(f"attention is [head, query, key] or [query, key]; got shape {array.shape}.")
    if array.shape[1:] != (len(texts), len(texts)):
        raise InputError(
            f"attention of shape {array.shape} has {array.shape[1]} queries and {array.shape[2]} keys; there are "
            f"{len(texts)} tokens, and each is a query and a key."
        )
    fix = "Give the pattern (after the softmax), not the scores; tljax.viz.heatmap draws any matrix."
    array = between_zero_and_one(array, "attention", fix)
    if len(array) == 1 and head_names is None:
        return texts, array, [""]
    return texts, array, checked_names(head_names, len(array), "head_names", "head")
