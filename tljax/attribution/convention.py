"""What an estimated effect means: where its gradient was taken, what it was multiplied by, and the sign."""

import dataclasses

GRIDS = {
    "gauss": "Gauss-Legendre", "midpoint": "midpoints", "left": "left ends", "right": "right ends",
    "both": "with both ends",
}  # fmt: skip
"""Where the points of a path lie, in words."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convention:
    """Convention of an estimate.

    Publications differ in it. TransformerLens 4.3 takes the gradient at the corrupted run, times ``clean - corrupted``:
    a sweep of the corrupted run with a clean source. The AtP paper takes it at the clean run, times ``corrupted -
    clean``: a sweep of the clean run with a corrupted source.

    Attributes:
        method: ``"attribution"`` or ``"ig"``.
        rule: name of the rule, ``""`` if there is none.
        gradient_at: where the gradient was taken.
        delta: what it was multiplied by.
        effect: what :meth:`~tljax.patching.PatchingResult.effect` estimates.
    """

    method: str
    rule: str
    gradient_at: str
    delta: str
    effect: str

    @property
    def has_sign(self) -> bool:
        """Whether the effect has a sign."""
        return "no sign" not in self.effect

    def __str__(self) -> str:
        rule = f" ({self.rule})" if self.rule else ""
        return (
            f"estimate by {self.method}{rule}: ({self.delta}) · gradient at {self.gradient_at}; effect: {self.effect}"
        )
