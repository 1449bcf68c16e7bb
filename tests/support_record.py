"""``--record-support FILE``: what the tests found out about each architecture, for ``docs/make_models.py``."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

OPTION = "--record-support"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, metavar="FILE", type=Path, help="write what tests/families and the golden tests measured")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group(name): tests that pytest-xdist runs on one worker")


@pytest.fixture(scope="session")
def support_figures(request: pytest.FixtureRequest) -> Iterator[dict[str, dict[str, Any]]]:
    """Figures by variant or golden case; every worker writes its own to a file beside the one that was asked for."""
    figures: dict[str, dict[str, Any]] = {}
    yield figures
    target: Path | None = request.config.getoption(OPTION)
    if target is not None:
        parts = _parts(target)
        parts.mkdir(parents=True, exist_ok=True)
        (parts / f"{os.getpid()}.json").write_text(json.dumps(figures))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Joins what the workers wrote. What the file had before goes: a test that no longer runs leaves no figure."""
    target: Path | None = session.config.getoption(OPTION)
    if target is None or hasattr(session.config, "workerinput") or not _parts(target).is_dir():
        return
    joined: dict[str, dict[str, Any]] = {}
    for part in sorted(_parts(target).iterdir()):
        for name, figures in json.loads(part.read_text()).items():
            joined[name] = joined.get(name, {}) | figures
        part.unlink()
    _parts(target).rmdir()
    target.write_text(json.dumps(joined, indent=1, sort_keys=True) + "\n")


def _parts(target: Path) -> Path:
    return target.with_name(f"{target.name}.parts")
