"""Every line of the table of bad inputs: a clear error that says the fix, or the right value; never a wrong number."""

import importlib

import pytest
from table import Case, World

KINDS = (
    "ids", "positions", "meanings", "models", "files", "arithmetic", "types", "messages", "text", "checkpoints",
    "tasks", "exact", "learned", "gradients", "interchange", "attribution", "edges", "circuits",
    "dictionaries_files", "dictionaries_foreign", "harvest", "dictionary_evaluation", "feature_effects",
    "dictionary_training", "splices", "end_to_end", "quantised", "plans", "scale", "kernels", "offload",
)  # fmt: skip
"""A module ``cases_<kind>.py`` each."""
TABLE = [
    pytest.param(case, id=f"{kind}: {case.name}")
    for kind in KINDS
    for case in importlib.import_module(f"cases_{kind}").CASES
]


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.mark.parametrize("case", TABLE)
def test_bad_input(case: Case, world: World) -> None:
    case.check(world)
