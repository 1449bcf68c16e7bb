"""``EdgeConvention``: what scores of edges mean: how they were computed, and which sign they have."""

import dataclasses
from typing import Literal

from tljax.attribution.convention import GRIDS

EAP_IG = "eap-ig-file"
"""The method of scores that come from a file of EAP-IG, which does not say it."""

Method = Literal[
    "eap", "eap-ig", "eap-ig-activations", "clean-corrupted", "mask-ig", "information-flow", "exact"
]  # fmt: skip

_WHERE = {
    "eap": "at the base run",
    "eap-ig": "at {steps} points ({grid}) on the way of the token embeddings from base to source",
    "eap-ig-activations": "at {steps} points ({grid}) on the way of each output, one by one, from base to replacement",
    "clean-corrupted": "at the base run and with the source's token embeddings, averaged",
    "mask-ig": "at {steps} points ({grid}) on the way of all edges together from base to replacement",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EdgeConvention:
    """What scores mean: how they were computed, and which sign they have.

    Attributes:
        method: as in :func:`~tljax.circuits.edge_scores`.
        ablation: what an edge carries instead: ``"patching"``, ``"zero"``, ``"mean"``, ``"positional_mean"`` or
            ``"given"``.
        metric: name of the metric's class or function.
        steps: number of points at which gradients are taken; ``None`` for methods without a path.
        grid: where the points lie; ``None`` for methods without a path.
        post_norm: ``"exact"`` if changes of heads go through the derivative of a norm after attention, ``"ignored"`` if
            the norm was left out, as EAP-IG does; ``None`` for models without one.
    """

    method: str
    ablation: str = "patching"
    metric: str = "metric"
    steps: int | None = None
    grid: str | None = None
    post_norm: str | None = None

    @property
    def gradient_at(self) -> str | None:
        """Where gradients are taken, in words; ``None`` for methods without gradients."""
        where = _WHERE.get(self.method)
        return None if where is None else where.format(steps=self.steps, grid=GRIDS.get(self.grid or "", ""))

    @property
    def delta(self) -> str:
        """The change that is scored, in words."""
        carried = {"patching": "source", "zero": "zero", "given": "given values"}
        return f"{carried.get(self.ablation, 'the ' + self.ablation.replace('_', ' '))} minus base"

    @property
    def sign(self) -> str:
        """What a positive score means, in words."""
        if self.method == "information-flow":
            return "share of the reader's input that comes from the writer, never negative"
        return "patched minus baseline: positive if carrying the replacement raises the metric"

    def __str__(self) -> str:
        if self.method == "information-flow":
            return f"information-flow: {self.sign}"
        if self.method == EAP_IG:
            return f"a file of EAP-IG, which does not say how scores were computed, negated; {self.sign}"
        how = "measured one edge at a time" if self.gradient_at is None else f"gradient {self.gradient_at}"
        norm = {"ignored": "; the norm after attention is ignored"}.get(self.post_norm or "", "")
        return f"{self.method} of {self.metric}: {how}, times {self.delta}{norm}; {self.sign}"
