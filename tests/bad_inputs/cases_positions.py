"""Negative positions where the mask is known: a position counts in the text."""

from table import Case

CASES: tuple[Case, ...] = ()
