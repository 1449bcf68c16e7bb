"""The table of formats: one row for each way in which dictionaries are published."""

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
    sparsify,
)
from tljax.dictionaries.formats.read import Format, Read
from tljax.errors import DictionaryError

FORMATS: tuple[Format, ...] = (
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


def read_kind(path: Path, holds: str, **facts: Any) -> Read:
    """Reads a path that holds a crosscoder or a cross-layer transcoder.

    Args:
        path: a directory, or a file.
        holds: what it must hold, as :attr:`Format.holds` says.
        **facts: for the format's reader.

    Raises:
        DictionaryError: it looks like no format of this kind, like several, or its files are damaged.
    """
    if not path.exists():
        raise DictionaryError(f"There is no {path}.")
    rows = [row for row in FORMATS if row.holds == holds]
    found = [row for row in rows if row.detects(path)]
    if len(found) == 1:
        return found[0].reads(path, **facts)
    inside = sorted(entry.name for entry in path.iterdir())[:12] if path.is_dir() else path.name
    others = [row.name for row in FORMATS if row.detects(path) and row.holds != holds]
    raise DictionaryError(
        f"{path} looks like {' and '.join(row.name for row in found) or 'no format'} of a {holds}: it holds {inside}."
        + (f" It looks like a {others[0]}, which is something else." if others and not found else "")
        + " Known are: "
        + "; ".join(f"{row.name} ({row.looks_for})" for row in rows)
        + "."
    )
