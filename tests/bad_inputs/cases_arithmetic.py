"""Right values where the arithmetic is delicate."""

from table import Case

CASES: tuple[Case, ...] = ()
