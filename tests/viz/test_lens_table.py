"""The logit lens as a table."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tljax.errors import InputError
from tljax.viz import Html, logit_lens_figure, logit_lens_table
from tljax.viz.scale import Scale

TOKENS = ["<s>", " John", "\n"]
LABELS = ["0_pre", "<final>"]
TOP = [
    [["The", "It"], [" and", "<script>"], ["$", "b"]],
    [["c", "d"], [" the", "e"], ["f", " Mary"]],
]
CHANCES = np.array([[[0.5, 0.25], [0.9, 0.05], [0.2, 0.1]], [[1.0, 0.0], [0.33335, 0.1], [0.4, 0.6]]])
CELL = re.compile(r'<td style="background:(#\w{6});color:(#\w{6})">(.*?)</td>')


def data_of(page: Html) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', page.html, re.DOTALL)
    return json.loads(text)


def test_cells_hold_the_likeliest_token_in_its_colour() -> None:
    page = logit_lens_table(TOP, jnp.asarray(CHANCES), LABELS, TOKENS, title="lens")
    cells = CELL.findall(page.html)
    assert [cell[2] for cell in cells] == ["The", "·and", "$", "c", "·the", "·Mary"]
    assert [cell[:2] for cell in cells] == Scale(0, 1).paints(np.array([0.5, 0.9, 0.2, 1.0, 0.33335, 0.6]))
    assert re.findall(r"<tr><th>(.*?)</th>", page.html) == ["", "0_pre", "&lt;final&gt;"]  # the last layer below
    assert re.findall(r"<br>(.*?)</th>", page.html) == ["&lt;s&gt;", "·John", "↵"]
    assert "http" not in page.html
    assert "<script>" not in page.html.replace("<script>\n(() =>", "")


def test_the_page_lists_all_tokens_likeliest_first() -> None:
    data = data_of(logit_lens_table(TOP, CHANCES, LABELS, TOKENS))
    assert data["top"][1][2] == ["·Mary", "f"]
    assert data["top"][0][1] == ["·and", "<script>"]
    ordered = np.sort(CHANCES, axis=-1)[..., ::-1]
    np.testing.assert_allclose(data["probabilities"], ordered, atol=0.00005)
    assert data["layers"] == LABELS
    assert data["colours"] is None


def test_other_values_colour_the_cells() -> None:
    entropy = np.array([[0.0, 1.0, 2.0], [4.0, 3.0, 0.5]])
    page = logit_lens_table(TOP, CHANCES, LABELS, TOKENS, colour_values=entropy, colour_title="entropy (nats)")
    assert [cell[:2] for cell in CELL.findall(page.html)] == Scale(0, 4).paints(entropy.ravel())
    assert data_of(page)["colours"] == entropy.tolist()
    assert "<span>entropy (nats)</span>" in page.html


def test_a_batch_axis_of_one_is_dropped() -> None:
    page = logit_lens_table([TOP], CHANCES[None], LABELS, [TOKENS], colour_values=CHANCES[None, ..., 0])
    other = logit_lens_table(TOP, CHANCES, LABELS, TOKENS, colour_values=CHANCES[..., 0])
    assert page == other


def test_the_figure_writes_tokens_into_cells(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "lens.png"
    figure = logit_lens_figure(TOP, CHANCES, LABELS, TOKENS, title="t", path=path)
    axes, bar = figure.axes
    np.testing.assert_allclose(axes.images[0].get_array(), CHANCES.max(-1), rtol=1e-6)
    assert axes.images[0].get_clim() == (0.0, 1.0)
    assert [text.get_text() for text in axes.texts] == ["The", "·and", r"\$", "c", "·the", "·Mary"]
    assert [text.get_color() for text in axes.texts] == [ink for _, ink in Scale(0, 1).paints(CHANCES.max(-1).ravel())]
    assert [label.get_text() for label in axes.get_yticklabels()] == LABELS
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0\n<s>", "1\n·John", "2\n↵"]
    assert axes.yaxis_inverted()  # the first layer above
    assert bar.get_ylabel() == "probability"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_long_prompts_go_on_below() -> None:
    top = [[[f"t{n}"] for n in range(40)]] * 2
    chances = np.linspace(0, 1, 80).reshape(2, 40, 1)
    figure = logit_lens_figure(top, chances, LABELS, ["a-long-token"] * 40)
    bands = [axes for axes in figure.axes if axes.images]
    assert [axes.images[0].get_array().shape for axes in bands] == [(2, 16), (2, 16), (2, 8)]
    assert bands[2].texts[0].get_text() == "t32"
    assert bands[2].get_xticklabels()[0].get_text() == "32\na-long-t…"
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in bands[0].get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


@pytest.mark.parametrize("draw", [logit_lens_table, logit_lens_figure])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": TOKENS[:2]}, r"top_tokens of shape \(2, 3, 2\) has 3 positions; there are 2 tokens"),
        ({"labels": ["0_pre"]}, "labels has 1 entries; it must be a list of 2, one for each layer"),
        ({"probabilities": CHANCES[..., 0]}, r"of one shape; got \(2, 3, 2\) and \(2, 3\)"),
        ({"top_tokens": TOP[:1]}, r"of one shape; got \(1, 3, 2\) and \(2, 3, 2\)"),
        ({"top_tokens": [[["a", "b"], ["c"], ["d", "e"]]] * 2}, r"got \(2, 3\) and"),
        ({"top_tokens": np.zeros((2, 3, 2))}, "top_tokens holds float 0.0; it must hold strings"),
        ({"probabilities": CHANCES[None].repeat(2, 0)}, r"batch axis of 2.*probabilities\[0\]"),
        ({"top_tokens": [TOP, TOP]}, r"batch axis of 2.*top_tokens\[0\]"),
        ({"probabilities": np.where(CHANCES == 1, np.nan, CHANCES)}, r"probabilities holds nan at \(1, 0, 0\)"),
        ({"probabilities": CHANCES * 9}, "Give probabilities, not logits"),
        ({"colour_values": np.zeros((3, 2))}, r"colour_values is \[layer, pos\] = \[2, 3\]; got shape \(3, 2\)"),
        ({"colour_values": np.zeros((2, 2, 3))}, "colour_values has a leading batch axis of 2"),
        ({"colour_values": np.full((2, 3), np.inf)}, "colour_values holds inf"),
    ],
)
def test_mistakes(draw: Any, changes: dict[str, Any], message: str) -> None:
    given = {"top_tokens": TOP, "probabilities": CHANCES, "labels": LABELS, "tokens": TOKENS, **changes}
    with pytest.raises(InputError, match=message):
        draw(**given)
