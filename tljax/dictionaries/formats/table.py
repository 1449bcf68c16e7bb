"""The table of formats: one row for each way in which dictionaries are published, and which row a path is."""

from pathlib import Path

from tljax.dictionaries.formats import saelens
from tljax.dictionaries.formats.read import Format
from tljax.errors import DictionaryError, nearest

FORMATS: tuple[Format, ...] = (saelens.FORMAT,)
"""All formats. Detection asks every row, so the order does not matter: a path must look like one format only."""


def format_named(name: str) -> Format:
    """Returns the row of a format by its name.

    Raises:
        DictionaryError: there is none.
    """
    for row in FORMATS:
        if row.name == name:
            return row
    names = [row.name for row in FORMATS]
    raise DictionaryError(f"format={name!r} is not known; formats are {', '.join(names)}.{nearest(name, names)}")


def detected(path: Path) -> list[Format]:
    """Returns the formats that a path looks like."""
    return [row for row in FORMATS if row.detects(path)]


def format_of(path: Path) -> Format:
    """Returns the one format that a path looks like.

    Raises:
        DictionaryError: it looks like none of them, or like several.
    """
    found = detected(path)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(row.name for row in found)
        raise DictionaryError(
            f"{path} looks like several formats: {names}. Say which one is meant, format={found[0].name!r}, or keep "
            "each dictionary in a directory of its own."
        )
    wanted = "; ".join(f"{row.name}: {row.looks_for}" for row in FORMATS)
    if path.is_dir():
        entries = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in path.iterdir())
        holds = f"holds {', '.join(entries[:12])}{', ...' if len(entries) > 12 else ''}" if entries else "is empty"
        inside = next((entry for entry in sorted(path.iterdir()) if entry.is_dir() and detected(entry)), None)
        hint = "" if inside is None else f" {inside.name}/ in it is one: pass it as sae_id, or name that directory."
    else:
        holds, hint = "is a file of no known format", ""
    raise DictionaryError(f"{path} is not a dictionary of a known format: it {holds}.{hint} Looked for: {wanted}.")
