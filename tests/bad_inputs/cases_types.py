"""Values of the wrong type, or out of the range where they mean anything."""

from table import Case

CASES: tuple[Case, ...] = ()
