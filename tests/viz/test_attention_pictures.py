"""Attention as a page and as a figure."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tljax import HookedTransformer
from tljax.errors import InputError
from tljax.viz import Html, attention_figure, attention_patterns

NODE = shutil.which("node")
TOKENS = ["<s>", " John", "</script>", "$5\n"]


def causal(heads: int, length: int) -> np.ndarray:
    scores = np.random.default_rng(0).random((heads, length, length)) * np.tri(length)
    return scores / scores.sum(-1, keepdims=True)


def data_of(page: Html) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', page.html, re.DOTALL)
    return json.loads(text)


def attention_in(page: Html) -> np.ndarray:
    """The values as the page's script reads them: thousandths, a row without the zeros at its end."""
    data = data_of(page)
    size = len(data["tokens"])
    return np.array([[row + [0] * (size - len(row)) for row in head] for head in data["attention"]]) / 1000


def test_the_page_holds_values_tokens_and_names() -> None:
    attention = np.stack([np.eye(4), *causal(2, 4)])
    page = attention_patterns(TOKENS, attention, head_names=["a", "b", "<b>"], title="Layer <2>")
    np.testing.assert_allclose(attention_in(page), attention, atol=0.0005)
    data = data_of(page)
    assert data["tokens"] == ["<s>", "·John", "</script>", "$5↵"]
    assert data["text"] == ["<s>", " John", "</script>", "$5↵\n"]
    assert data["heads"] == ["a", "b", "<b>"]
    assert data["palette"][0] == ["#f7fbff", "#000000"]
    assert data["palette"][100] == ["#08306b", "#ffffff"]
    assert "Layer &lt;2&gt;" in page.html
    assert page.html.count("</script>") == 2


def test_the_page_is_the_models_own_attention(tiny: HookedTransformer) -> None:
    prompt = "When John and Mary went to the store"
    _, cache = tiny.run_with_cache(prompt, names_filter="blocks.2.attn.hook_pattern")
    page = attention_patterns(tiny.to_str_tokens(prompt), cache["pattern", 2])
    np.testing.assert_allclose(attention_in(page), np.asarray(cache["pattern", 2])[0], atol=0.0006)
    assert data_of(page)["heads"] == ["head 0", "head 1", "head 2", "head 3"]


def test_a_saved_page_needs_no_network(tmp_path: Path) -> None:
    page = attention_patterns(TOKENS, causal(2, 4), title="caf\u00e9")
    path = tmp_path / "deep" / "page.html"
    page.save(path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert '<meta charset="utf-8">' in text
    assert "<title>café</title>" in text
    assert page.html in text
    assert not re.search(r"http|@import|url\(|\bsrc\s*=|<link", text)
    assert page._repr_html_() == page.html
    assert repr(page) == f"Html('café', {len(page.html)} characters; .save(path) writes it as a page)"


def test_pages_stay_small() -> None:
    page = attention_patterns([f" token{n}" for n in range(100)], causal(12, 100))
    assert len(page.html.encode()) < 500_000


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 4), (1, 1, 4, 4)])
def test_one_head_and_one_prompt(shape: tuple[int, ...]) -> None:
    attention = causal(1, 4).reshape(shape)
    tokens = [TOKENS] if len(shape) == 4 else TOKENS
    page = attention_patterns(tokens, jnp.asarray(attention, jnp.bfloat16))
    np.testing.assert_allclose(attention_in(page), attention.reshape(1, 4, 4), atol=0.005)
    assert data_of(page)["heads"] == [""]


def test_the_figure_shows_heads_from_zero_to_one(tmp_path: Path) -> None:
    attention = causal(4, 4) / 2
    path = tmp_path / "deep" / "heads.png"
    figure = attention_figure(TOKENS, attention, title="layer 2", path=path)
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == ["head 0", "head 1", "head 2", "head 3"]
    for axes, head in zip(panels, attention, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), head.astype(np.float32))
        assert axes.images[0].get_clim() == (0.0, 1.0)
        assert axes.images[0].get_cmap().name == "Blues"
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["<s>", "·John", "</script>", r"\$5↵"]
    assert [label.get_text() for label in panels[3].get_xticklabels()] == ["<s>", "·John", "</script>", r"\$5↵"]
    assert (panels[2].get_xlabel(), panels[2].get_ylabel()) == ("key", "query")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_figure_of_one_head_is_titled() -> None:
    assert attention_figure(TOKENS, causal(1, 4)[0], title="t").axes[0].get_title() == "t"
    assert attention_figure(TOKENS, causal(1, 4)[0], head_names=["L2H1"]).axes[0].get_title() == "L2H1"


@pytest.mark.parametrize(("heads", "length"), [(1, 100), (12, 100), (4, 15)])
def test_labels_of_long_prompts_do_not_overlap(heads: int, length: int) -> None:
    figure = attention_figure([" token"] * length, causal(heads, length))
    figure.canvas.draw()
    labelled = [axes for axes in figure.axes if axes.images and axes.get_xticklabels()]
    for labels, side in ((labelled[-1].get_xticklabels(), "x"), (figure.axes[0].get_yticklabels(), "y")):
        boxes = [label.get_window_extent() for label in labels]
        starts, ends = zip(*sorted(tuple(getattr(box, f"interval{side}")) for box in boxes), strict=True)
        assert all(end <= start + 1 for end, start in zip(ends, starts[1:], strict=False))
    assert max(figure.get_size_inches()) < 30


@pytest.mark.parametrize("draw", [attention_patterns, attention_figure])
@pytest.mark.parametrize(
    ("tokens", "attention", "options", "message"),
    [
        (TOKENS[:3], causal(2, 4), {}, r"attention of shape \(2, 4, 4\) has 4 queries and 4 keys; there are 3 tokens"),
        (TOKENS, causal(2, 4)[:, :2], {}, "has 2 queries and 4 keys; there are 4 tokens"),
        (TOKENS, np.zeros(4), {}, r"is \[head, query, key\] or \[query, key\]; got shape \(4,\)"),
        (TOKENS, np.zeros((3, 2, 4, 4)), {}, r"batch axis of 3.*Pick one first: attention\[0\]"),
        ([TOKENS, TOKENS], causal(2, 4), {}, r"tokens has a leading batch axis of 2.*tokens\[0\]"),
        (TOKENS, np.where(np.eye(4), np.nan, 0.0), {}, r"attention holds nan at \(0, 0\)"),
        (TOKENS, np.full((4, 4), -np.inf), {}, "attention holds -inf"),
        (TOKENS, np.full((4, 4), 3.0), {}, "between 0 and 1; got values from 3 to 3. Give the pattern"),
        (TOKENS, np.zeros((0, 4, 4)), {}, "there is nothing to draw"),
        (TOKENS, "abc", {}, "is not an array of numbers"),
        (TOKENS, causal(2, 4), {"head_names": ["a"]}, "head_names has 1 entries; it must be a list of 2"),
        (TOKENS, causal(2, 4), {"head_names": "ab"}, "head_names is 'ab'; it must be a list of 2"),
        ("John", causal(2, 4), {}, "tokens is one string, 'John'"),
        ([1.0, 2, 3, 4], causal(2, 4), {}, "tokens holds float 1.0; it must hold strings"),
        ([], causal(2, 4), {}, "tokens is empty"),
    ],
)
def test_mistakes(draw: Any, tokens: Any, attention: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw(tokens, attention, **options)


def test_too_many_heads_for_a_figure() -> None:
    with pytest.raises(InputError, match=r"40 heads; 36 panels stay readable.*attention\[:36\]"):
        attention_figure(TOKENS, causal(40, 4))


@pytest.mark.skipif(NODE is None, reason="node reads the scripts")
def test_scripts_are_javascript() -> None:
    scripts = sorted((Path(__file__).parents[2] / "tljax" / "viz" / "templates").glob("*.js"))
    assert len(scripts) == 6
    for script in scripts:
        done = subprocess.run([str(NODE), "--check", str(script)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
