"""Checkpoints, adapters and configs that cannot be loaded as they are."""

from table import Case

CASES: tuple[Case, ...] = ()
