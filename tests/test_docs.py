"""The guides' code runs, each block after those before it."""

import re
from pathlib import Path

import jax
import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("guide", ["patching.md", "text.md"])
def test_a_guide_runs(guide: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / guide).read_text(), flags=re.S)
    assert len(blocks) > 5
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        with jax.numpy_rank_promotion("allow"):
            exec(compile(block, f"docs/{guide}, block {number}", "exec"), names)
