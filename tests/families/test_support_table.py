"""``docs/models.md`` names what tljax reads, no more and no less."""

import re
from pathlib import Path

from tljax.checkpoints.families import FAMILIES, TOWERS

TABLE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_table_names_every_architecture() -> None:
    supported, _, refused = TABLE.read_text().partition("## Not supported")
    named = re.findall(r"^\| `(\w+)` \|", supported, flags=re.MULTILINE)
    assert sorted(named) == sorted(family.architecture for family in (*FAMILIES, *TOWERS)), (
        "run python docs/make_models.py"
    )
    assert not set(named) & set(re.findall(r"^\| `(\w+)` \|", refused, flags=re.MULTILINE))
