"""The table of formats: one row for each way in which dictionaries are published, and which row a path is."""

from pathlib import Path
from typing import Any

from tljax.dictionaries.formats import (
    circuit_tracer,
    circuit_tracer_clt,
    connor_rob,
    crosscoder_nc,
    crosscoder_sf,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    gemma_scope_2_layers,
    goodfire,
    llama_scope,
    openai,
    own,
    qwen_scope,
    saelens,
    sparsify,
)
from tljax.dictionaries.formats.read import Format, Read
from tljax.errors import DictionaryError, nearest

FORMATS: tuple[Format, ...] = (
    saelens.FORMAT,
    dictionary_learning.FORMAT,
    sparsify.FORMAT,
    gemma_scope.FORMAT,
    gemma_scope_2.FORMAT,
    gemma_scope_2_layers.FORMAT,
    llama_scope.FORMAT,
    circuit_tracer.FORMAT,
    circuit_tracer_clt.FORMAT,
    openai.FORMAT,
    goodfire.FORMAT,
    connor_rob.FORMAT,
    qwen_scope.FORMAT,
    crosscoder_nc.FORMAT,
    crosscoder_sf.FORMAT,
    own.OWN_CROSSCODER,
    own.OWN_CROSS_LAYER,
)
"""All formats. Detection asks every row, so the order does not matter: a path must look like one format only."""

_CLASSES = {
    "dictionary": "Dictionary",
    "crosscoder": "Crosscoder",
    "cross-layer transcoder": "CrossLayerTranscoder",
}
"""What files make → the class that loads them."""


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


def format_of(path: Path, holds: str) -> Format:
    """Returns the one format that a path looks like, among those that hold what is wanted.

    Raises:
        DictionaryError: it looks like none of them, or like several.
    """
    every = detected(path)
    found = [row for row in every if row.holds == holds]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(row.name for row in found)
        raise DictionaryError(
            f"{path} looks like several formats: {names}. Say which one is meant, format={found[0].name!r}, or keep "
            "each dictionary in a directory of its own."
        )
    if every:
        raise wrong_kind(path, every[0], holds)
    wanted = "; ".join(f"{row.name}: {row.looks_for}" for row in FORMATS if row.holds == holds)
    raise DictionaryError(f"{path} looks like no format of a {holds}: it {_contents(path)} Looked for: {wanted}.")


def wrong_kind(path: Path, row: Format, holds: str) -> DictionaryError:
    """Returns the error for files that make something else than what is wanted."""
    return DictionaryError(
        f"{path} is a {row.holds} ({row.name}), not a {holds}: tljax.dictionaries.{_CLASSES[row.holds]} loads it."
    )


def _contents(path: Path) -> str:
    if not path.is_dir():
        return "is a file of no known format."
    entries = sorted(path.iterdir())
    if not entries:
        return "is empty."
    shown = ", ".join(f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries[:12])
    inside = next((entry.name for entry in entries[:64] if entry.is_dir() and detected(entry)), None)
    hint = "" if inside is None else f" {inside}/ in it is one: pass it as sae_id, or name that directory."
    return f"holds {shown}{', ...' if len(entries) > 12 else ''}.{hint}"


def read_kind(path: Path, holds: str, **facts: Any) -> Read:
    """Reads a path that holds a dictionary, a crosscoder or a cross-layer transcoder.

    Args:
        path: a directory, or a file.
        holds: what it must hold, as :attr:`Format.holds` says.
        **facts: for the format's reader.

    Raises:
        DictionaryError: it looks like no format of this kind, like several, or its files are damaged.
    """
    if not path.exists():
        raise DictionaryError(f"There is no {path}.")
    return format_of(path, holds).reads(path, **facts)
