"""What the documents show runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S)


def test_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    (quickstart,) = python_blocks("README.md")
    names: dict = {}
    exec(quickstart, names)
    for (_, pos), effect in names["result"].top(3):
        assert pos == 10  # the giver's name, where the prompts differ
        assert effect > 3
    assert str(names["result"].top(3)) in capsys.readouterr().out


@pytest.mark.parametrize("block", python_blocks("docs/gotchas.md"))
def test_gotchas_are_python(block: str) -> None:
    compile(block, "gotchas.md", "exec")
