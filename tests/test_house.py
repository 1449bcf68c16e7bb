"""Rooms import one way, as the table in CONTRIBUTING.md says; ``tljax.<TAB>`` shows public names only."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import tljax

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tljax"
TOP = ("tljax", "tljax.__main__", "tljax.demo")
"""What stands above all rooms."""
UPWARD = {("tljax.config", "tljax.modules.stack"): "cfg.n_params counts what modules declare; these import the config"}
"""Imports that no room allows, inside a function, and why each is needed."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def table() -> dict[str, set[str]]:
    """Each room of CONTRIBUTING's table, in its order, with the rooms that it may import."""
    rows = re.findall(r"^\| `([\w.]+)` \|[^|]*\|([^|]*)\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    return {room: set(re.findall(r"`([\w.]+)`", allowed)) for room, allowed in rows}


ALLOWED = table()


def room_of(module: str) -> str | None:
    """The room a module is in; ``None`` for a file of the package itself."""
    parts = module.split(".")[1:]
    if len(parts) > 1 and f"{parts[0]}.{parts[1]}" in ALLOWED:
        return f"{parts[0]}.{parts[1]}"
    is_room = len(parts) > 1 or MODULES[module].name == "__init__.py"
    return parts[0] if is_room else None


def imported(module: str) -> Iterator[tuple[str, int]]:
    """The modules of tljax that a module imports when it runs, inside functions too, with the line."""
    pending: list[ast.AST] = [ast.parse(MODULES[module].read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending += node.orelse
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tljax":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in MODULES else node.module), node.lineno
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in MODULES)
        else:
            pending += ast.iter_child_nodes(node)


def test_every_room_has_a_row() -> None:
    rooms = {room_of(module) for module in MODULES if module not in TOP} - {None}
    assert rooms == set(ALLOWED)


def test_the_table_has_no_circle() -> None:
    rooms = list(ALLOWED)
    for number, (room, allowed) in enumerate(ALLOWED.items()):
        assert allowed <= set(rooms[:number]), f"{room} may import {allowed - set(rooms[:number])}, further down"


def test_rooms_import_what_the_table_allows() -> None:
    wrong = []
    for module, path in MODULES.items():
        room = room_of(module) if module not in TOP else None
        is_face = path.name == "__init__.py"
        for target, line in imported(module):
            there = room_of(target) if target not in TOP else target
            if (
                module in TOP
                or (module, target) in UPWARD
                or there in (None, room)
                or (is_face and f"{there}.".startswith(f"{room}."))
            ):
                continue
            if room is None or there in TOP or there not in ALLOWED[room]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_completion_shows_public_names_only() -> None:
    shown = set(dir(tljax))
    assert shown == {"__version__", *tljax.__all__, *tljax._ROOMS}
    assert all(getattr(tljax, name) is not None for name in shown)
    for room in tljax._ROOMS:
        assert (PACKAGE / room / "__init__.py").exists() or (PACKAGE / f"{room}.py").exists()


def test_nothing_is_global() -> None:
    """No module starts with an empty container to fill: but for one, of a few samples of arrays that never change."""
    containers = r"(\{\}|\[\]|([\w.]*\.)?(dict|list|set|defaultdict|OrderedDict|deque|WeakSet|Weak\w+Dictionary)\(\))"
    started = {
        f"{module}.{ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0])}"
        for module, path in MODULES.items()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
        if re.fullmatch(containers, ast.unparse(node.value))
    }
    assert started == {"tljax.fingerprint._kept"}
