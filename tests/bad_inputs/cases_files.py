"""Damaged files, half-written directories."""

from table import Case

CASES: tuple[Case, ...] = ()
