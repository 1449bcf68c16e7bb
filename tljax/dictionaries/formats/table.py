"""The table of formats: one row for each way in which dictionaries are published."""

from tljax.dictionaries.formats.read import Format

FORMATS: tuple[Format, ...] = ()
"""All formats. Detection asks every row, so the order does not matter: a path must look like one format only."""
