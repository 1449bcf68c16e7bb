"""Arguments of the public surface: one word for each meaning, as the tables in CONTRIBUTING.md say."""

import importlib
import inspect
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_type_hints

import tljax
from tljax import patching
from tljax.attribution.options import EstimateOptions

SECTION = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text().partition("\n## Words for arguments\n")[2]
ROWS = re.findall(r"^\| (.*`.*) \|$", SECTION.partition("\n## ")[0], re.MULTILINE)


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


WORDS = [
    (quoted(words), quoted(avoided))
    for _, words, avoided in (row.split(" | ") for row in ROWS if row.count(" | ") == 2)
]
"""Words for one meaning, and those not to say it in."""
KEPT = [
    (quoted(functions), quoted(words)) for functions, words, *more in (row.split(" | ") for row in ROWS) if not more
]
"""Patterns of functions, and the avoided words that they keep."""
INSTEAD = {avoided: " or ".join(words) for words, synonyms in WORDS for avoided in synonyms}


def public(module: Any) -> Iterator[tuple[str, Any]]:
    """What a module exports, and what its classes have, by name."""
    for name in getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]:
        member = getattr(module, name)
        yield name, member
        if inspect.isclass(member) and member.__module__.startswith("tljax"):
            held = {method: inspect.getattr_static(member, method) for method in ("__call__", *dir(member))}
            methods = {method: getattr(one, "__func__", one) for method, one in held.items()}
            yield from ((f"{name}.{method}", one) for method, one in methods.items() if inspect.isfunction(one))


def surface() -> dict[str, list[str]]:
    """Arguments of public functions, constructors and methods of tljax, each by the first name it has."""
    found: dict[Any, str] = {}
    for room in ("", *tljax._ROOMS, "patching.transformerlens"):
        for name, member in public(importlib.import_module(f"tljax.{room}".rstrip("."))):
            is_error = inspect.isclass(member) and issubclass(member, BaseException)
            is_ours = inspect.isfunction(member) or (inspect.isclass(member) and not is_error)
            if is_ours and member.__module__.startswith("tljax") and "._" not in name.replace("__call__", ""):
                found.setdefault(member, f"{room}.{name}".lstrip("."))
    signatures = {name: inspect.signature(member).parameters.values() for member, name in found.items()}
    return {name: [one.name for one in own if one.kind.name[:4] != "VAR_"] for name, own in signatures.items()}


SURFACE = surface()


def test_one_word_for_each_meaning() -> None:
    kept = [(pattern, word) for patterns, words in KEPT for pattern in patterns for word in words]
    wrong = [
        f"{name}({argument}=): the word is {INSTEAD[argument]}"
        for name, arguments in SURFACE.items()
        for argument in set(arguments) & set(INSTEAD)
        if not any(fnmatchcase(name, pattern) and argument == word for pattern, word in kept)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_tables_speak_of_what_is_there() -> None:
    assert len(WORDS) > 20
    assert len(SURFACE) > 300
    said = {argument for arguments in SURFACE.values() for argument in arguments}
    assert {word for words, _ in WORDS for word in words} <= said
    for patterns, words in KEPT:
        assert set(words) <= set(INSTEAD)
        for pattern in patterns:
            own = {word for name, arguments in SURFACE.items() if fnmatchcase(name, pattern) for word in arguments}
            assert own & set(words), pattern


def test_every_sweep_takes_the_same_options() -> None:
    wanted = inspect.signature(patching.sweep).parameters
    options = {name: one.default for name, one in wanted.items() if one.kind is one.KEYWORD_ONLY}
    estimates = {"method", *get_type_hints(EstimateOptions)}
    assert estimates < set(options)
    for sweep in (patching.ablation_sweep, patching.steering_sweep, patching.path_patch):
        found = inspect.signature(sweep).parameters
        taken = set(options) if sweep is patching.ablation_sweep else set(options) - estimates
        assert "axes" in found
        assert {name: found[name].default for name in taken} == {name: options[name] for name in taken}
