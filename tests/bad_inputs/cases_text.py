"""Text and tokenizers."""

from table import Case

CASES: tuple[Case, ...] = ()
