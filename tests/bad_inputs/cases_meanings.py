"""What could mean two things: refused, or decided and said."""

from table import Case

CASES: tuple[Case, ...] = ()
