"""No file names an address of tljax: until the project has one, it would be somebody else's."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SKIPPED = {".git", ".hypothesis", "build", "dist", "tljax-out", "__pycache__"}
SUFFIXES = {".py", ".md", ".ipynb", ".toml", ".json", ".html", ".txt", ""}
ADDRESS = re.compile(
    r"(?:https?://|git\+|git@|github\.com/)[^\s\"'`<>)]*tljax"  # a page, a repository
    r"|\bpip install (?:-\S+ )*[\"']?tljax\b",  # a package
    re.IGNORECASE,
)


def files(folder: Path = ROOT) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name in SKIPPED or path.name.endswith(("_cache", ".egg-info", "_checkpoints")):
            continue
        if path.is_dir():
            yield from files(path) if not (path / "pyvenv.cfg").exists() else ()
        elif path.suffix in SUFFIXES:
            yield path


def test_no_file_names_an_address_of_tljax() -> None:
    found = {path.relative_to(ROOT): ADDRESS.findall(path.read_text(errors="ignore")) for path in files()}
    assert len(found) > 300
    if "urls" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]:
        del found[Path("pyproject.toml")]
    assert {path: addresses for path, addresses in found.items() if addresses} == {}


def test_an_address_would_be_seen() -> None:
    for address in (
        "https://colab.research.google.com/github/any/{}",
        "git@github.com:{}/{}.git",
        "see github.com/any/{}",
    ):
        assert ADDRESS.search(address.replace("{}", "tljax")), address
    for command in ("pip install {}", "%pip install -q '{}[pandas]'", "pip install -U {}"):
        assert ADDRESS.search(command.format("tljax")), command
        assert not ADDRESS.search(command.format("jax")), command
