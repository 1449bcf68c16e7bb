"""Caches, parameters and files of another model."""

from table import Case

CASES: tuple[Case, ...] = ()
