"""Heat maps."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tljax.errors import InputError
from tljax.patching.result import PatchingResult
from tljax.viz import heatmap, text_heatmap

TOKENS = ("<s>", " John", "$5\n")


def result(sizes: dict[str, int], **fields: Any) -> PatchingResult:
    values = jnp.arange(float(np.prod(list(sizes.values())))).reshape(tuple(sizes.values()))
    labels = {"pos": TOKENS, "layer": ("L0", "L1"), **fields.pop("labels", {})}
    run_shape = tuple(size for axis, size in sizes.items() if axis in ("metric", "batch"))
    return PatchingResult(values, tuple(sizes), **{"baseline": jnp.ones(run_shape), "labels": labels, **fields})


def drawn(figure: Any) -> list[np.ndarray]:
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]


def texts(ticks: Any) -> list[str]:
    return [label.get_text() for label in ticks]


def test_heatmap_draws_values_and_labels_and_saves(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "map.png"
    figure = heatmap([[1.0, -2.0], [0.0, 0.5]], x_labels=["a$b", "c"], y_labels=["L0", "L1"], title="t", path=path)
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[1.0, -2.0], [0.0, 0.5]])
    assert axes.images[0].get_clim() == (-2.0, 2.0)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["L0", "L1"]
    assert path.read_bytes().startswith(b"\x89PNG")


def test_what_has_no_sign_is_coloured_from_zero() -> None:
    image = heatmap([[1.0, 2.0], [0.0, 0.5]], signed=False).axes[0].images[0]
    assert (image.get_clim(), image.get_cmap().name) == ((0.0, 2.0), "Blues")
    with pytest.raises(InputError, match=r"signed=False draws values from zero up; there is -1"):
        heatmap([[1.0, -1.0]], signed=False)


def test_labels_beyond_the_edge_are_saved(tmp_path: Path) -> None:
    def height(**texts: str) -> int:
        heatmap([[1.0, 2.0]], path=tmp_path / "map.png", **texts)
        return int.from_bytes((tmp_path / "map.png").read_bytes()[20:24], "big")

    assert height(colour_title="a long name " * 8) > 1.5 * height(colour_title="short")


def test_a_result_brings_its_labels(tmp_path: Path) -> None:
    figure = result({"layer": 2, "pos": 3}, activation_name="resid_pre").plot(path=tmp_path / "map.png")
    axes, bar = figure.axes
    np.testing.assert_array_equal(drawn(figure)[0], np.arange(6.0).reshape(2, 3) - 1.0)
    assert axes.images[0].get_clim() == (-4.0, 4.0)
    assert texts(axes.get_xticklabels()) == ["<s>", " John", r"\$5\n"]
    assert texts(axes.get_yticklabels()) == ["L0", "L1"]
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("resid_pre", "position", "layer")
    assert bar.get_ylabel() == "effect: patched − baseline"


def test_what_is_drawn() -> None:
    swept = result({"layer": 2, "pos": 3}, clean=jnp.asarray(3.0))
    np.testing.assert_array_equal(drawn(swept.plot(of="values"))[0], swept.values)
    np.testing.assert_array_equal(drawn(swept.plot(of="normalized"))[0], swept.normalized())
    np.testing.assert_array_equal(drawn(result({"layer": 2}, baseline=None).plot())[0], [[0.0, 1.0]])
    kept = result({"layer": 2, "pos": 3, "batch": 4})
    figure = kept.plot(title="mine", x_labels="abc")
    np.testing.assert_array_equal(drawn(figure)[0], kept.effect().mean(-1))
    assert figure.axes[0].get_title() == "mine"
    assert texts(figure.axes[0].get_xticklabels()) == ["a", "b", "c"]
    assert figure.axes[1].get_ylabel().endswith("mean of 4 prompts")


def test_kinds_of_activation_are_panels_of_one_scale_without_padding() -> None:
    kinds = ("out", "q", "k", "v")
    swept = result({"patch_type": 4, "layer": 2, "head": 3}, labels={"patch_type": kinds})
    swept = PatchingResult(
        swept.values.at[2:, :, 1:].set(jnp.nan), swept.axis_names, baseline=swept.baseline, labels=swept.labels
    )
    figure = swept.plot()
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == list(kinds)
    assert {axes.images[0].get_clim() for axes in panels} == {(-20.0, 20.0)}
    assert np.ma.getmaskarray(panels[3].images[0].get_array()).sum() == 4
    assert len(figure.axes) == len(panels) + 3  # two empty places of the grid, one colour bar


def test_metrics_have_a_scale_each() -> None:
    figure = result({"metric": 2, "layer": 2, "pos": 3}, metric_names=("diff", "kl")).plot()
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["diff", "kl"]
    assert [axes.images[0].get_clim()[1] for axes in panels] == [4.0, 10.0]
    one = result({"metric": 1, "layer": 2, "pos": 3}, metric_names=("diff",)).plot()
    assert drawn(one)[0].shape == (2, 3)


def test_a_third_axis_becomes_panels_and_positions_lie_along_x() -> None:
    swept = result({"layer": 2, "pos": 3, "head": 4})
    panels = drawn(swept.plot())
    assert len(panels) == 2
    np.testing.assert_array_equal(panels[1], swept.effect()[1].T)
    by_head = swept.plot(facet="head")
    np.testing.assert_array_equal(drawn(by_head)[3], swept.effect()[:, :, 3])
    assert by_head.axes[3].get_title() == "head 3"
    by_pos = [axes.get_title() for axes in swept.plot(facet="pos").axes if axes.get_title()]
    assert by_pos == ["0 <s>", "1  John", r"2 \$5\n"]


def test_one_axis() -> None:
    assert drawn(result({"layer": 2}).plot())[0].shape == (1, 2)
    assert drawn(result({"patch_type": 3, "layer": 2}, labels={"patch_type": "abc"}).plot())[2].shape == (1, 2)
    pd = pytest.importorskip("pandas")
    figure = result({"row": 2}, rows=pd.DataFrame({"layer": [0, 1], "pos": [2, 0]})).plot()
    assert drawn(figure)[0].shape == (2, 1)
    assert texts(figure.axes[0].get_yticklabels()) == ["layer 0, pos 2", "layer 1, pos 0"]


@pytest.mark.parametrize("shape", [(4, 64), (12, 400), (300, 3)])
def test_labels_of_long_axes_do_not_overlap(shape: tuple[int, int]) -> None:
    figure = heatmap(np.ones(shape), x_labels=["token"] * shape[1], y_labels=["L"] * shape[0])
    figure.canvas.draw()
    for labels, side in ((figure.axes[0].get_xticklabels(), "x"), (figure.axes[0].get_yticklabels(), "y")):
        boxes = [label.get_window_extent() for label in labels]
        starts, ends = zip(*sorted(tuple(getattr(box, f"interval{side}")) for box in boxes), strict=True)
        assert all(end <= start + 1 for end, start in zip(ends, starts[1:], strict=False))
    assert max(figure.get_size_inches()) < 30


def test_heatmap_mistakes() -> None:
    with pytest.raises(InputError, match="draws a matrix, got shape"):
        heatmap(np.zeros(3))
    with pytest.raises(InputError, match="x_labels has 1 entries; the matrix has 2"):
        heatmap(np.zeros((2, 2)), x_labels=["a"])
    with pytest.raises(InputError, match="choose what to draw of a PatchingResult"):
        heatmap(np.zeros((2, 2)), of="effect")


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({"layer": 2, "pos": 3}, {"of": "effects"}, "of= is one of 'effect', 'normalized', 'values'; got 'effects'"),
        ({"layer": 2, "pos": 3, "head": 2}, {"facet": "neuron"}, "facet='neuron' is not among the axes"),
        ({"patch_type": 2, "layer": 2, "pos": 3, "head": 2}, {}, r"has one or two axes.*result.select\(layer=0\)"),
        ({"patch_type": 2, "layer": 2, "head": 40}, {"facet": "head"}, r"each of 40 entries.*more than the 36"),
        ({}, {}, "has one or two axes"),
    ],
)
def test_results_that_cannot_be_drawn(sizes: dict[str, int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        result(sizes).plot(**options)


def test_text_heatmap_marks_the_largest() -> None:
    text = text_heatmap([[0.1, -0.9], [0.2, 0.3]], ["p", "q"], ["L0", "L1"])
    assert text.splitlines()[1].split() == ["L0", "+0.10", "-0.90*"]
