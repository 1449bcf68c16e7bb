"""Text with a colour behind each token."""

import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tljax.errors import InputError
from tljax.viz import Html, colored_tokens, colored_tokens_figure
from tljax.viz.html import running_token, token_label
from tljax.viz.scale import DIVERGING, SEQUENTIAL, Scale, scale_of

TOKENS = [" a", "<script>alert(1)</script>", "\n", '"&\x00']
SPAN = re.compile(r'<span style="background:(#\w{6});color:(#\w{6})" title="(.*?)">(.*?)</span>', re.DOTALL)


def data_of(page: Html) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', page.html, re.DOTALL)
    return json.loads(text)


def contrast(background: str, ink: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    darker, lighter = sorted((luminance(background), luminance(ink)))
    return (lighter + 0.05) / (darker + 0.05)


def test_each_token_is_coloured_escaped_and_says_its_value() -> None:
    page = colored_tokens(TOKENS, jnp.asarray([0.0, 1.0, 2.0, 4.0]), title="<i>")
    spans = SPAN.findall(page.html)
    assert [span[0] for span in spans] == ["#f7fbff", "#c6dbef", "#6aaed6", "#08306b"]
    assert [span[1] for span in spans] == ["#000000", "#000000", "#000000", "#ffffff"]
    assert [span[3] for span in spans] == [
        " a", "&lt;script&gt;alert(1)&lt;/script&gt;", "↵\n", "&#34;&amp;\\x00",
    ]  # fmt: skip
    assert spans[1][2] == "1 &lt;script&gt;alert(1)&lt;/script&gt;: 1.0"
    assert spans[3][2] == "3 &#34;&amp;\\x00: 4.0"
    assert "alert(1)</script>" not in page.html
    assert "&lt;i&gt;" in page.html
    assert "http" not in page.html
    assert data_of(page)["features"][0]["values"] == [0.0, 1.0, 2.0, 4.0]


def test_negative_values_are_red_and_white_is_zero() -> None:
    (feature,) = data_of(colored_tokens(TOKENS, [-1.0, 0.0, 2.0, 1.0]))["features"]
    assert feature["levels"] == [25, 50, 100, 75]
    assert (feature["low"], feature["high"], feature["colours"]) == ("-2", "2", DIVERGING)


def test_features_are_named_and_have_a_scale_each() -> None:
    values = np.stack([[-0.123456, 0.0, 0.1, 0.2], [0.0, 10.0, 20.0, 30.0]], 1)
    page = colored_tokens(TOKENS, values, names=["logit", "</b>"])
    data = data_of(page)
    assert [feature["name"] for feature in data["features"]] == ["logit", "</b>"]
    assert data["features"][0]["values"] == [-0.1235, 0.0, 0.1, 0.2]
    assert data["features"][1]["levels"] == [0, 33, 67, 100]
    assert [feature["colours"] for feature in data["features"]] == [DIVERGING, SEQUENTIAL]
    assert re.findall(r'<option value="(\d)">(.*?)</option>', page.html) == [("0", "logit"), ("1", "&lt;/b&gt;")]
    shared = data_of(colored_tokens(TOKENS, values, min_value=-40, max_value=40))["features"]
    assert {(feature["low"], feature["high"]) for feature in shared} == {("-40", "40")}
    assert shared[1]["name"] == "feature 1"


def test_one_feature_needs_no_selector() -> None:
    assert "<option" not in colored_tokens(TOKENS, np.zeros((4, 1))).html
    page = colored_tokens(TOKENS, np.zeros(4), names=["loss"])
    assert data_of(page)["features"][0]["name"] == "loss"
    assert data_of(page)["features"][0]["levels"] == [0, 0, 0, 0]


def test_a_batch_axis_of_one_is_dropped() -> None:
    values = np.arange(4.0)
    assert data_of(colored_tokens([TOKENS], values[None])) == data_of(colored_tokens(TOKENS, values))
    assert data_of(colored_tokens(TOKENS, np.ones((1, 4, 2)))) == data_of(colored_tokens(TOKENS, np.ones((4, 2))))
    assert len(data_of(colored_tokens(["a"], [[1.0, 2.0]]))["features"]) == 2


@pytest.mark.parametrize("colours", [SEQUENTIAL, DIVERGING])
def test_text_is_readable_on_every_colour(colours: str) -> None:
    palette = Scale(0, 1, colours).palette()
    assert len(palette) == 101
    assert min(contrast(*paint) for paint in palette) >= 4.5


@pytest.mark.parametrize(
    ("values", "ends", "scale"),
    [
        ([1.0, 3.0], (None, None), (0, 3, SEQUENTIAL)),
        ([-1.0, 3.0], (None, None), (-3, 3, DIVERGING)),
        ([-4.0, 3.0], (None, None), (-4, 4, DIVERGING)),
        ([0.0], (None, None), (0, 1, SEQUENTIAL)),
        ([1.0, 3.0], (1.0, None), (1, 3, SEQUENTIAL)),
        ([3.0], (3.0, None), (3, 4, SEQUENTIAL)),
        ([1.0, 3.0], (None, 2.0), (0, 2, SEQUENTIAL)),
        ([1.0, 3.0], (-1.0, 2.0), (-2, 2, DIVERGING)),
    ],
)
def test_scales(values: list[float], ends: tuple[float | None, float | None], scale: tuple[float, float, str]) -> None:
    assert scale_of(np.asarray(values), *ends) == Scale(*scale)


@pytest.mark.parametrize(
    ("token", "label", "running"),
    [
        (" John", "·John", " John"),
        ("two words ", "two words·", "two words "),
        ("   ", "···", "   "),
        ("\n\n", "↵↵", "↵\n↵\n"),
        ("\r\n", "\\r↵", "\\r↵\n"),
        ("\t\u200b\x00", "\\t\\u200b\\x00", "\\t\\u200b\\x00"),
        ("\ud800", "\\ud800", "\\ud800"),
        ("", "∅", "∅"),
        ("naïve 你好", "naïve 你好", "naïve 你好"),
    ],
)
def test_how_tokens_are_written(token: str, label: str, running: str) -> None:
    assert (token_label(token), running_token(token)) == (label, running)


def test_the_figure_writes_the_text_in_its_colours(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "text.png"
    tokens = [" ab", "$\n", "c" * 60, "d" * 40]
    figure = colored_tokens_figure(
        tokens, np.stack([[0.0, 1, 2, 4], [-1, 1, 0, 0.5]], 1), names=["x", "y"], title="t", path=path
    )
    first, second = figure.axes[:2]
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["x", "y"]
    colours = [patch.get_facecolor()[:3] for patch in first.patches]
    expected = [
        [int(hex[n : n + 2], 16) / 255 for n in (1, 3, 5)] for hex, _ in Scale(0, 4).paints(np.array([0, 1, 2, 4]))
    ]
    np.testing.assert_allclose(colours, expected)
    assert [int(patch.get_y()) for patch in first.patches] == [0, 0, 1, 2]  # a newline and a full line
    letters = [text.get_text() for text in first.texts]
    assert letters[:5] == [" ", "a", "b", r"\$", "↵"]
    assert path.read_bytes().startswith(b"\x89PNG")


def test_too_many_features_for_a_figure() -> None:
    with pytest.raises(InputError, match=r"40 features; 36 stay readable.*values\[:, :36\]"):
        colored_tokens_figure(TOKENS, np.zeros((4, 40)))


@pytest.mark.parametrize("draw", [colored_tokens, colored_tokens_figure])
@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (np.zeros(3), {}, r"values of shape \(3,\) has 3 positions; there are 4 tokens"),
        (np.zeros((3, 2)), {}, r"shape \(3, 2\) has 3 positions; there are 4 tokens"),
        (np.zeros((2, 4)), {}, r"values has a leading batch axis of 2.*values\[0\]"),
        (np.zeros((2, 4, 3)), {}, "values has a leading batch axis of 2"),
        (0.5, {}, r"values is \[pos\] or \[pos, feature\]; got shape \(\)"),
        (np.zeros((1, 1, 4, 1)), {}, r"got shape \(1, 1, 4, 1\)"),
        ([0, np.nan, 1, 1], {}, r"values holds nan at \(1,\)"),
        (np.zeros((4, 2)), {"names": ["a"]}, "names has 1 entries; it must be a list of 2, one for each feature"),
        (np.zeros(4), {"names": []}, "names has 0 entries; it must be a list of 1"),
        (np.zeros(4), {"names": ["a", "b"]}, "names has 2 entries; it must be a list of 1"),
        (
            np.zeros(4),
            {"min_value": 2.0, "max_value": 1.0},
            "from min_value=2 to max_value=1: the second must be larger",
        ),
        (np.ones(4), {"min_value": 1.0, "max_value": 1.0}, "the second must be larger"),
        (np.ones(4), {"min_value": 3.0}, "from min_value=3 to max_value=1"),
    ],
)
def test_mistakes(draw: Any, values: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw(TOKENS, values, **options)
