"""How a sweep estimates the effects of its sites: the method, its rule and its path."""

import dataclasses
from typing import Literal, TypedDict

from tljax.attribution.convention import GRIDS, Convention
from tljax.checks import check_fields, typed, whole
from tljax.errors import InputError, nearest

Method = Literal["exact", "attribution", "ig"]
Grid = Literal["gauss", "midpoint", "left", "right"]
Along = Literal["activation", "inputs", "writers"]

_STEPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtPStar:
    """AtP*: two corrections of first-order estimates (Kramár et al. 2024, arXiv 2403.00745, sections 3.1 and 3.2).

    Attributes:
        qk_fix: for queries and keys (``"q"``, ``"k"``, ``"rot_q"``, ``"rot_k"``, ``"q_input"``, ``"k_input"``), take
            the true change of the attention pattern, and only what follows it to first order. Other points have no such
            correction.
        grad_drop: estimate once for each layer with the gradient through that layer's attention and MLP output set to
            zero, and sum the estimates' sizes over layers, divided by ``n_layers - 1``: direct and indirect effects
            that cancel are seen. The effect is then a size, averaged over prompts, without a sign.
    """

    qk_fix: bool = True
    grad_drop: bool = True

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelP:
    """RelP: the gradient with the rules of layer-wise relevance propagation in it (Jafari et al. 2025, 2508.21258).

    Norms divide by a constant, an activation ``f(x) = x φ(x)`` has a constant ``φ``, and a product with a gate passes
    half to each factor. The weights that a router gives to experts are constants.

    Attributes:
        freeze_pattern: attention patterns are constants too. Without biases, the parts of the residual stream then sum
            to a metric that is linear in the logits.
    """

    freeze_pattern: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """How an estimate is checked against exact patching.

    Attributes:
        k: how many sites with the largest estimates are patched exactly, each alone.
        subsets: how many random halves of the other sites are patched exactly, each half together; 0 for none. From
            two on they bound the effect of what was not verified.
        confidence: of that bound.
        seed: seed of the halves.
    """

    k: int = 20
    subsets: int = 16
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        whole(self.k, "Verify(k=...)", at_least=1)
        whole(self.subsets, "Verify(subsets=...)", at_least=0)
        if not 0 < self.confidence < 1:
            raise InputError(f"Verify(confidence={self.confidence}) is not between 0 and 1.")


class EstimateOptions(TypedDict, total=False):
    """Options of an estimated sweep, documented at :func:`read_estimate`."""

    rule: Literal["atp*", "relp"] | AtPStar | RelP | None
    gradient_at: Literal["base", "source"] | None
    steps: int | None
    grid: Grid | None
    along: Along | None
    verify: int | Verify | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A checked way of estimating; see :func:`read_estimate`."""

    method: Method
    rule: AtPStar | RelP | None
    gradient_at: Literal["base", "source"]
    steps: int
    grid: Grid
    along: Along
    verify: Verify | None

    @property
    def drops(self) -> bool:
        """Whether gradients are dropped layer by layer, so that estimates have no sign."""
        return isinstance(self.rule, AtPStar) and self.rule.grad_drop

    def convention(self, fixed: bool, n_layers: int) -> Convention:
        """Returns the convention of the estimate; ``fixed`` says whether the pattern's true change was taken."""
        rule = "" if self.rule is None else type(self.rule).__name__
        drops = self.drops and n_layers > 1
        if self.method == "attribution":
            where = f"the {self.gradient_at} run"
        else:
            what = {
                "activation": "each layer's own activation",
                "inputs": "the token embeddings",
                "writers": "the embedding's, each attention's and each MLP's output in turn",
            }[self.along]
            where = f"{self.steps} points ({GRIDS[self.grid]}) on the way of {what} from base to source"
        return Convention(
            method=self.method,
            rule=rule,
            gradient_at=where,
            delta="source - base, through the attention pattern" if fixed else "source - base",
            effect="size over dropped layers, no sign" if drops else "patched - baseline",
        )


@typed
def read_estimate(
    method: Method,
    *,
    rule: Literal["atp*", "relp"] | AtPStar | RelP | None = None,
    gradient_at: Literal["base", "source"] | None = None,
    steps: int | None = None,
    grid: Grid | None = None,
    along: Along | None = None,
    verify: int | Verify | None = None,
) -> Estimate | None:
    """Checks how a sweep estimates.

    Args:
        method: ``"exact"`` patches each site. ``"attribution"`` estimates to first order from one backward pass: the
            values' change times the gradient. ``"ig"`` averages the gradient on the way from base to source (integrated
            gradients).
        rule: with ``"attribution"``, a correction: ``"atp*"`` or :class:`AtPStar`, ``"relp"`` or :class:`RelP`.
        gradient_at: with ``"attribution"``, the run whose gradient is taken: ``"base"`` (the default), the run that is
            patched, or ``"source"``, the run that values come from, which must be given as a prompt.
        steps: with ``"ig"``, the number of points on the way, by default 8.
        grid: with ``"ig"``, where they lie: ``"gauss"`` (Gauss-Legendre, the default); ``"midpoint"``; ``"left"``,
            ``0/n`` to ``(n-1)/n`` of the way from base to source; ``"right"``, ``1/n`` to ``n/n``.
        along: with ``"ig"``, what moves from base to source. ``"activation"`` (the default): the whole activation of
            one layer, for the sites of that layer. ``"inputs"``: the token embeddings, for all sites. ``"writers"``:
            the embedding, each layer's attention output and each layer's MLP output, one after the other, and the mean
            of the gradients for all sites.
        verify: a number of sites, or :class:`Verify`: checks the estimate against exact patching.

    Returns:
        The estimate; ``None`` for ``"exact"``.

    Raises:
        InputError: an option that the method does not use, or a value that it does not have.
    """
    given = {
        "rule": rule, "gradient_at": gradient_at, "steps": steps, "grid": grid, "along": along, "verify": verify,
    }  # fmt: skip
    used = {
        "exact": (), "attribution": ("rule", "gradient_at", "verify"), "ig": ("steps", "grid", "along", "verify")
    }[method]  # fmt: skip
    if unused := [name for name, value in given.items() if value is not None and name not in used]:
        fitting = {"steps": "ig", "grid": "ig", "along": "ig"}.get(unused[0], "attribution")
        raise InputError(
            f"method={method!r} does not use {unused[0]}={given[unused[0]]!r}: leave it out, or give "
            f"method={fitting!r}."
        )
    if method == "exact":
        return None
    rules = {"atp*": AtPStar(), "relp": RelP()}
    if rule is not None and not isinstance(rule, AtPStar | RelP) and rule not in rules:
        raise InputError(
            f"rule={rule!r} is not one of 'atp*' and 'relp', nor an AtPStar(...) or RelP(...)."
            f"{nearest(str(rule), list(rules))}"
        )
    if isinstance(verify, bool) or not isinstance(verify, int | Verify | None):
        raise InputError(f"verify={verify!r} is neither a number of sites nor Verify(k=..., subsets=...).")
    return Estimate(
        method=method,
        rule=rule if rule is None or isinstance(rule, AtPStar | RelP) else rules[rule],
        gradient_at=gradient_at or "base",
        steps=_STEPS if steps is None else whole(steps, "steps", at_least=1),
        grid=grid or "gauss",
        along=along or "activation",
        verify=Verify(k=verify) if isinstance(verify, int) else verify,
    )
