"""Numbers of things that do not exist: token ids, layers, heads."""

from table import Case

from tljax.errors import InputError

CASES: tuple[Case, ...] = (Case("a token id beyond the vocabulary", lambda w: w.small([[1, 12]]), InputError, "12"),)
