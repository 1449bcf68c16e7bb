"""The options of :func:`~tljax.circuits.edge_scores`, checked against each other."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from tljax.checks import whole
from tljax.circuits.replacement import Ablation, MeanActivations
from tljax.circuits.scores.convention import EdgeConvention, Method
from tljax.circuits.scores.integrated import (
    Ends,
    Grid,
    Step,
    along_activations,
    along_inputs,
    along_masks,
    at_base,
    points_of,
)
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.engine.run import Reduce

PostNorm = Literal["exact", "ignored"]
_STEPS = 5
_Along = Callable[[Ends, np.ndarray, np.ndarray], Iterator[Step]]
_PATHS: Mapping[str, tuple[Grid, _Along]] = {
    "eap-ig": ("right", along_inputs),
    "eap-ig-activations": ("left", along_activations),
    "mask-ig": ("gauss", along_masks),
}
"""Methods with a path: their usual grid, and the runs along it."""
_ON_INPUTS = ("eap-ig", "clean-corrupted")
_COMPLETE = ("eap-ig", "clean-corrupted", "mask-ig")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to compute.

    Attributes:
        convention: the convention of the scores.
        ablation: what edges carry.
        by_prompt, by_position: whether prompts and positions are kept apart.
    """

    convention: EdgeConvention
    ablation: Ablation
    by_prompt: bool
    by_position: bool

    @classmethod
    def of(
        cls,
        model: HookedTransformer,
        metric: Any,
        method: Method,
        ablation: Ablation,
        steps: int | None,
        grid: Grid | None,
        tolerance: float | None,
        post_norm: PostNorm,
        reduce: Reduce,
        axes: tuple[str, ...],
    ) -> "Plan":
        """Checks options.

        Raises:
            InputError: an option that the method does not have, or values that do not go together.
        """
        kind = ablation if isinstance(ablation, str) else "given"
        if method in _ON_INPUTS and kind != "patching":
            raise InputError(
                f'method={method!r} runs on mixtures of both prompts\' embeddings, so it takes ablation="patching" '
                f'alone, not {kind!r}. "eap", "eap-ig-activations" and "mask-ig" take any.'
            )
        path = _PATHS.get(method)
        given = {"steps": steps, "grid": grid, "tolerance": tolerance}
        used = [name for name, value in given.items() if value is not None]
        if used and path is None:
            raise InputError(
                f"{used[0]}= belongs to methods with a path, {', '.join(map(repr, _PATHS))}; {method!r} has none."
            )
        if tolerance is not None:
            _check_tolerance(method, steps, grid, tolerance)
        usual = "gauss" if tolerance is not None else None if path is None else path[0]
        if method == "exact" and tuple(axes):
            raise InputError('method="exact" patches an edge at all positions: leave axes= out, or take an estimate.')
        if tuple(axes) not in ((), ("pos",)):
            raise InputError(f'axes={tuple(axes)!r}: edges are told apart by position, axes=("pos",), or not, axes=().')
        if method != "information-flow" and (isinstance(metric, Mapping) or not callable(metric)):
            raise InputError(
                f"metric={metric!r}: give one function of the logits, such as LogitDiff(answer, wrong); for several "
                "metrics, call edge_scores for each."
            )
        convention = EdgeConvention(
            method=method,
            ablation=kind,
            metric=_name_of(metric),
            steps=None if path is None else whole(_STEPS if steps is None else steps, "steps", at_least=1),
            grid=None if path is None else grid or usual,
            post_norm=post_norm if model.cfg.has_norms_after else None,
        )
        return cls(convention, ablation, reduce == "none", bool(tuple(axes)))

    @property
    def steps(self) -> int | None:
        """Number of points on the path."""
        return self.convention.steps

    @property
    def uses_metric(self) -> bool:
        """Whether the method needs a metric."""
        return self.convention.method != "information-flow"

    @property
    def uses_source(self) -> bool:
        """Whether replacements come from source prompts."""
        return self.uses_metric and self.convention.ablation in ("patching", "mean", "positional_mean")

    @property
    def averages(self) -> bool:
        """Whether replacements are means over the source prompts."""
        return self.uses_metric and self.convention.ablation in ("mean", "positional_mean")

    @property
    def through_norms(self) -> bool:
        """Whether heads' changes go through a norm after attention."""
        return self.convention.post_norm == "exact"

    @property
    def adds_up(self) -> Literal["input", "all"] | None:
        """Which scores have a known sum: those of edges from ``input``, or all; ``None`` if there is no such sum."""
        if self.convention.method in _ON_INPUTS:
            return "input"
        return "all" if self.convention.method == "mask-ig" else None

    def replaced_by(self, means: MeanActivations) -> "Plan":
        """Returns the plan with means that were computed."""
        return dataclasses.replace(self, ablation=means)

    def with_steps(self, steps: int) -> "Plan":
        """Returns the plan with another number of points, if the method has a path."""
        if self.steps is None:
            return self
        return dataclasses.replace(self, convention=dataclasses.replace(self.convention, steps=steps))

    def n_runs(self, cfg: HookedTransformerConfig) -> int:
        """Returns how many runs each batch takes gradients of."""
        method, steps = self.convention.method, self.steps or 1
        if method == "clean-corrupted":
            return 2
        if method == "eap-ig-activations":
            return steps * (1 + cfg.n_layers * (1 if cfg.attn_only else 2))
        return steps + (self.convention.grid == "both")

    def runs(self, ends: Ends) -> Iterator[Step]:
        """Yields the runs at which gradients are taken."""
        if self.convention.method == "eap":
            return at_base(ends)
        if self.convention.method == "clean-corrupted":
            return along_inputs(ends, *points_of("both", 1))
        grid: Any = self.convention.grid
        return _PATHS[self.convention.method][1](ends, *points_of(grid, self.steps or 1))


def _check_tolerance(method: str, steps: int | None, grid: str | None, tolerance: float) -> None:
    if method not in _COMPLETE:
        raise InputError(
            f"tolerance= bounds the completeness error, which {method!r} does not have by steps: take "
            f"{' or '.join(repr(name) for name in _COMPLETE if name in _PATHS)}."
        )
    if steps is not None:
        raise InputError("tolerance= chooses the number of steps: give one of the two.")
    if grid not in (None, "gauss"):
        raise InputError(f'tolerance= takes points by grid="gauss", whose error falls fastest, not {grid!r}.')
    if tolerance <= 0:
        raise InputError(f"tolerance={tolerance} must be a positive share of the effect, such as 0.01.")


def _name_of(metric: Any) -> str:
    return getattr(metric, "__name__", type(metric).__name__)
