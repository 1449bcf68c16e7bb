"""``Splice``: what a config says of a dictionary that is spliced into the model."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

from tljax.checks import check_fields
from tljax.errors import DictionaryError

INPUT, ACTS_PRE, ACTS_POST = "hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post"
RECONS, ERROR, OUTPUT = "hook_sae_recons", "hook_sae_error", "hook_sae_output"
"""The points of a dictionary, by SAELens's names."""

ErrorTerm = Literal["keep", "drop"]
Gradient = Literal["stop", "pass"]


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Splice:
    """Facts of a spliced dictionary on which programs depend: all but its arrays.

    Attributes:
        reads: the point that is encoded.
        writes: the point whose value is replaced; that of ``reads`` unless this is a transcoder.
        d_in, d_out, d_sae: widths of what is read, of what is written, and the number of features.
        dtype: the dictionary's.
        acts_pre: whether it has ``hook_sae_acts_pre``.
        merged_heads: whether heads are read as one vector.
        head: the one head that is read and written; ``None`` means all.
        error: ``"keep"`` adds what the reconstruction lacks, ``"drop"`` leaves it out.
        gradient: ``"stop"``: the error is a constant in the backward pass; ``"pass"``: it is differentiated.
        skip: whether a transcoder's skip connection is part of its output.
        exclude_tokens: ids of tokens at whose positions the model's own value stays.
        reads_every, writes_every: whether the points fire for every token even where a run computes the outputs of only
            some.
        source: the dictionary's whole config; ``None`` where programs are compiled, and in files.
    """

    reads: str
    writes: str
    d_in: int
    d_out: int
    d_sae: int
    dtype: str
    acts_pre: bool = True
    merged_heads: bool = False
    head: int | None = None
    error: ErrorTerm = "keep"
    gradient: Gradient = "stop"
    skip: bool = True
    exclude_tokens: tuple[int, ...] = ()
    reads_every: bool = False
    writes_every: bool = False
    source: Any = None

    def __post_init__(self) -> None:
        check_fields(self, DictionaryError)

    def __repr__(self) -> str:
        where = self.writes if self.reads == self.writes else f"{self.reads} -> {self.writes}"
        return f"Splice({where}, {self.d_sae} features, error={self.error!r}, gradient={self.gradient!r})"

    @property
    def layer(self) -> int | None:
        """The layer of the points; ``None`` at the embedding."""
        return int(self.writes.split(".", 2)[1]) if self.writes.startswith("blocks.") else None

    @functools.cached_property
    def within_block(self) -> "Splice":
        """The splice with its points named relative to their block, equal for equal dictionaries in other layers."""
        reads, writes = (name.split(".", 2)[2] for name in (self.reads, self.writes))
        return dataclasses.replace(self, reads=reads, writes=writes, source=None)

    @functools.cached_property
    def computation(self) -> "Splice":
        """The splice without what no program depends on."""
        return dataclasses.replace(self, source=None)

    @property
    def points(self) -> tuple[str, ...]:
        """The points that it opens, in firing order."""
        pre = (ACTS_PRE,) if self.acts_pre else ()
        error = (ERROR,) if self.error == "keep" else ()
        return (INPUT, *pre, ACTS_POST, RECONS, *error, OUTPUT)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields but ``source`` as JSON values; :meth:`from_dict` reads them back."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "source"}
        return fields | {"exclude_tokens": list(self.exclude_tokens)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Splice":
        """Builds a splice from a mapping.

        Raises:
            TypeError, DictionaryError: the fields are not those of a splice.
        """
        return cls(**{**fields, "exclude_tokens": tuple(fields["exclude_tokens"])})
