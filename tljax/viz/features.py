"""Which features are active on a prompt: each token's strongest, and each feature's tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tljax.checks import typed, whole
from tljax.errors import InputError
from tljax.viz.checks import Tokens, checked_array, checked_names, checked_tokens
from tljax.viz.html import Html, render, running_token, spelt, token_label
from tljax.viz.scale import Scale


@typed
def feature_activations(
    tokens: Tokens,
    values: Any,
    *,
    names: Sequence[str] | None = None,
    k: int = 10,
    title: str | None = None,
) -> Html:
    """Shows which features are active on a prompt.

    Pointing at a token lists its strongest features; choosing a feature colours the tokens at which it is active.
    ``tljax.dictionaries.pages.feature_activations`` makes this picture of a model, a dictionary and a prompt.

    Args:
        tokens: the prompt's tokens as strings, ``model.to_str_tokens(prompt)``, or as ids.
        values: activations of features, ``[pos, feature]``; a leading batch axis of one is dropped.
        names: one name for each feature; by default ``feature 0``, ``feature 1``, ...
        k: features listed for a token; a feature that is among them at no token is left out.
        title: a heading.

    Raises:
        InputError: shapes, tokens and names that do not match, values that are not finite.
    """
    texts, table = checked_tokens(tokens), checked_array(values, "values")
    table = table[0] if table.ndim == 3 and table.shape[0] == 1 else table
    if table.ndim != 2 or len(table) != len(texts):
        raise InputError(
            f"values is [pos, feature] with one row for each of the {len(texts)} tokens; got shape {table.shape}."
        )
    whole(k, "k", at_least=1)
    labels = checked_names(names, table.shape[1], "names", "feature")
    order = np.argsort(-np.abs(table), axis=1, kind="stable")
    best = np.zeros(table.shape, bool)
    np.put_along_axis(best, order[:, :k], True, axis=1)
    kept = np.flatnonzero((best & (table != 0)).any(0))
    kept = kept[np.argsort(-np.abs(table[:, kept]).max(0), kind="stable")]
    place = {int(feature): number for number, feature in enumerate(kept)}
    active = [
        [[place[int(one)], _short(row[one])] for one in ranked if int(one) in place and row[one] != 0]
        for row, ranked in zip(table, order, strict=True)
    ]
    data = {
        "tokens": [token_label(text) for text in texts],
        "text": [running_token(text) for text in texts],
        "features": [
            {"name": spelt(labels[one]), "largest": _short(table[np.abs(table[:, one]).argmax(), one])} for one in kept
        ],
        "active": active,
        "counts": (table != 0).sum(1).tolist(),
        "palette": Scale(0.0, 1.0).palette(),
        "k": k,
    }
    return render("feature_activations.html.jinja", title=title, kind="features of a prompt", data=data)


def _short(value: Any) -> float:
    return float(f"{value:.4g}")
