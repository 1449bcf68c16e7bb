"""Errors that must name the fix."""

from table import Case

CASES: tuple[Case, ...] = ()
