"""Every notebook runs from top to bottom, and installs the checkout it lies in where tljax is not installed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import tljax

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


def first_code(path: Path) -> str:
    return next(
        "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"
    )


@pytest.fixture
def run_first_cell(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the first cell as if tljax were not installed; what pip is asked to install goes into the list."""
    from IPython.core.inputtransformer2 import TransformerManager

    (source,) = {first_code(path) for path in NOTEBOOKS}  # the same in all of them
    code = TransformerManager().transform_cell(source).replace("get_ipython()", "shell")
    asked: list[str] = []

    class Shell:
        def run_line_magic(self, magic: str, line: str) -> None:
            asked.append(f"{magic} {line}".format(checkouts=variables["checkouts"]))

    variables: dict[str, Any] = {"shell": Shell()}
    monkeypatch.setitem(sys.modules, "tljax", tljax)  # put back after the test
    monkeypatch.setitem(sys.modules, "tljax.config", None)  # importing it fails
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def run(folder: Path) -> list[str]:
        monkeypatch.chdir(folder)
        exec(code, variables)
        return asked

    return run


@pytest.mark.parametrize("where", ["checkout/notebooks", "checkout", "."])
def test_first_cell_installs_the_checkout(
    where: str, run_first_cell: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Opened in the checkout, in the folder of its notebooks, or beside a checkout called tljax (as in Colab)."""
    root = tmp_path / ("tljax" if where == "." else "checkout")
    for folder in (root / "tljax", root / "notebooks"):
        folder.mkdir(parents=True)
    (root / "tljax" / "__init__.py").write_text("__version__ = 'of the checkout'")
    (root / "tljax" / "config.py").touch()
    assert run_first_cell(tmp_path / where) == [f'pip install -q -e "{root}"']
    assert capsys.readouterr().out == "tljax of the checkout\n"


def test_first_cell_says_what_to_do_without_a_checkout(run_first_cell: Any, tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"not installed.*Clone tljax.*%cd path/to/the/clone"):
        run_first_cell(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=pytest.mark.xdist_group(path.stem), id=path.stem) for path in NOTEBOOKS]
)
def test_notebook_runs(path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
