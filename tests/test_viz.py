"""Heat maps."""

from pathlib import Path

import numpy as np
import pytest

from tljax.errors import InputError
from tljax.viz import heatmap, text_heatmap


def test_heatmap_draws_values_and_labels_and_saves(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "map.png"
    figure = heatmap([[1.0, -2.0], [0.0, 0.5]], x_labels=["a$b", "c"], y_labels=["L0", "L1"], title="t", path=path)
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[1.0, -2.0], [0.0, 0.5]])
    assert axes.images[0].get_clim() == (-2.0, 2.0)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["L0", "L1"]
    assert path.read_bytes().startswith(b"\x89PNG")


def test_heatmap_mistakes() -> None:
    with pytest.raises(InputError, match="draws a matrix, got shape"):
        heatmap(np.zeros(3))
    with pytest.raises(InputError, match="x_labels has 1 entries; the matrix has 2"):
        heatmap(np.zeros((2, 2)), x_labels=["a"])


def test_text_heatmap_marks_the_largest() -> None:
    text = text_heatmap([[0.1, -0.9], [0.2, 0.3]], ["p", "q"], ["L0", "L1"])
    assert text.splitlines()[1].split() == ["L0", "+0.10", "-0.90*"]
