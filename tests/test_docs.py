"""The pages' code runs: guides from top to bottom, the migration guide's tables row by row, gotchas right and wrong."""

import ast
import builtins
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

import tljax
from tljax import elsewhere, errors, patching
from tljax.checkpoints.files.hub import MODELS

DOCS = Path(__file__).parents[1] / "docs"
MIGRATION = "from_transformerlens.md"
HOOK_NAMES = ("attn", "mlp", "ln1", "ln2", "ln1_post", "ln2_post", "blocks")
HOOK_POINTS = (DOCS / "hook_points.md").read_text()
NOT_OURS = ("datasets", "huggingface_hub", "operator")


def python_blocks(page: str) -> Iterator[tuple[str, str]]:
    """Code blocks with what their fence says after ``python``."""
    yield from re.findall(r"```python *(.*)\n((?s:.*?))```", (DOCS / page).read_text())


def run(code: str, where: str, names: dict[str, Any]) -> None:
    with jax.numpy_rank_promotion("allow"):
        exec(compile(code, f"docs/{where}", "exec"), names)


def run_page(page: str) -> dict[str, Any]:
    """Runs a guide and returns its names."""
    blocks = list(python_blocks(page))
    assert len(blocks) > 5
    names: dict[str, Any] = {}
    for number, (fence, block) in enumerate(blocks):
        assert not fence
        run(block, f"{page}, block {number}", names)
    return names


@pytest.mark.parametrize(
    "guide",
    [
        "attribution.md", "circuits.md", "dictionaries.md", "gradients.md", "harvest.md", "interchange.md",
        "patching.md", "tasks.md", "text.md",
    ],
)  # fmt: skip
def test_a_guide_runs(guide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(guide)


@pytest.mark.xdist_group("gotchas")
def test_gotchas_run() -> None:
    """What a fence calls ``raises X`` or ``warns X`` does so; all else runs."""
    names: dict[str, Any] = {}
    kinds = set()
    for number, (fence, block) in enumerate(python_blocks("gotchas.md")):
        where = f"gotchas.md, block {number}"
        kind, _, name = fence.partition(" ")
        kinds.add(kind)
        if not fence:
            run(block, where, names)
            continue
        found = next(getattr(place, name) for place in (builtins, tljax, errors, patching) if hasattr(place, name))
        with {"raises": pytest.raises, "warns": pytest.warns}[kind](found):
            run(block, where, names)
    assert kinds == {"", "raises", "warns"}


# The migration guide


def table_rows() -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of every row of the migration guide's tables."""
    for number, line in enumerate((DOCS / MIGRATION).read_text().splitlines(), 1):
        if line.startswith("|") and not line.startswith(("|---", "| TransformerLens 3.9 | tljax |")):
            yield number, [cell.strip() for cell in line.strip("|").split("|")]


ROWS = list(table_rows())


def snippets(cells: list[str]) -> list[str]:
    """Code in what a row says of tljax."""
    return [code for cell in cells for code in re.findall(r"`([^`]+)`", cell)]


def roots(code: str) -> set[str]:
    """Names that a snippet takes attributes of, calls, or imports from; all its words if it is no Python."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return set(re.findall(r"\w+", code))
    heads = [node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Subscript)]
    heads += [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    modules = {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return modules | {head.id for head in heads if isinstance(head, ast.Name)}


@pytest.fixture(scope="module")
def guide_names() -> dict[str, Any]:
    """The names that the migration guide's code leaves, and those that its tables speak of."""
    names = run_page(MIGRATION)
    model = names["model"]
    return names | {
        "ActivationCache": tljax.ActivationCache, "cfg": model.cfg, "f": model.QK, "name": "tljax-tiny",
        "directory": MODELS / "tljax-tiny", "repo": "EleutherAI/pythia-70m", "tokenizer": model.tokenizer,
        "vector": model.W_U[:, 0], "hook": tljax.HookPoint("blocks.1.attn.hook_z", ("batch", "pos", "head", "d_head")),
    }  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guide")


@pytest.mark.parametrize(("number", "cells"), ROWS, ids=[f"line {number}" for number, _ in ROWS])
def test_a_row_of_the_migration_guide(
    number: int, cells: list[str], guide_names: dict[str, Any], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every snippet about tljax runs, and every ``tljax.…`` in it can be imported."""
    assert len(cells) == 3, f"line {number} has {len(cells)} cells"
    assert cells[1], f"line {number} does not say what tljax has"
    monkeypatch.chdir(workspace)
    for code in snippets(cells[1:]):
        found = roots(code)
        if found & {"tljax", *guide_names}:
            for dotted in re.findall(r"\btljax(?:\.\w+)+", code):
                pkgutil.resolve_name(dotted)
            run(code, f"{MIGRATION}, line {number}", dict(guide_names))
        elif re.fullmatch(r"\w+\.[\w.]+", path := code.removesuffix(".*")):
            root = path.split(".")[0]
            assert root in (*HOOK_NAMES, *NOT_OURS), f"{code}: not a name that this test knows"
            assert root in NOT_OURS or path in HOOK_POINTS, f"{code} is no hook point"


def test_the_migration_guide_has_what_attribute_errors_speak_of() -> None:
    told = "\n".join(cells[0] for _, cells in ROWS)
    for owner, names in elsewhere.ALL.items():
        unknown = [name for name in names if not re.search(rf"(?<!\w){name}(?!\w)", told)]
        assert not unknown, f"{owner}: the guide lacks {unknown}"


def test_the_migration_guide_is_whole() -> None:
    assert len(ROWS) > 200
    checked = [code for _, cells in ROWS for code in snippets(cells[1:]) if roots(code) & {"tljax", "model", "cache"}]
    assert len(checked) > 200
