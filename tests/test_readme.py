"""What the README shows runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_readme(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict = {}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)):
        exec(compile(block, f"README.md, block {number}", "exec"), names)
    for (_, pos), effect in names["result"].top(3):
        assert pos == 10  # the giver's name, where the prompts differ
        assert effect > 3
    assert str(names["result"].top(3)) in capsys.readouterr().out
