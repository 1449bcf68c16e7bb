"""Checks an estimate against exact patching: its largest sites one by one, random halves of the rest together."""

import dataclasses
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from tljax.attribution.contraction import cover
from tljax.attribution.options import Verify
from tljax.checks import typed
from tljax.forward.forward import run_forward
from tljax.hooks.dictionary import HookDictionary, HookEntry
from tljax.hooks.interventions import Replace
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.engine.base_run import BaseRun
from tljax.patching.engine.run import measure_run, measure_sites
from tljax.patching.engine.sites import Sites
from tljax.patching.metrics.evaluation import Measure
from tljax.processes import as_numpy
from tljax.viz.scatter import scatter


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Verification:
    """Exact effects beside their estimates. All effects are averaged over prompts.

    Attributes:
        sites: the verified sites, as in :meth:`~tljax.patching.PatchingResult.top`, largest estimates first.
        labels: a text for each.
        estimate: their estimated effects, ``[site]``.
        exact: their exact effects, each patched alone, ``[site]``; sizes if the estimate has no sign.
        joint_exact: the effect of patching a random half of the other sites together, ``[half]``.
        joint_estimate: the sum of that half's estimates, ``[half]``.
        bound: with probability ``confidence``, no single site that was not verified has a larger effect, if effects of
            sites add up. ``None`` with fewer than two halves.
        confidence: of ``bound``.
        n_others: number of sites that were not verified alone.
    """

    sites: tuple[tuple[int, ...], ...]
    labels: tuple[str, ...]
    estimate: np.ndarray
    exact: np.ndarray
    joint_exact: np.ndarray
    joint_estimate: np.ndarray
    bound: float | None
    confidence: float
    n_others: int

    @property
    def r_squared(self) -> float:
        """Share of the exact effects' variance that the estimates explain.

        ``1 - Σ(exact - estimate)² / Σ(exact - mean)²`` is at most 1, negative for estimates worse than the mean, and
        NaN for a single site.
        """
        spread = np.square(self.exact - self.exact.mean()).sum()
        return float(1 - np.square(self.exact - self.estimate).sum() / spread) if spread else float("nan")

    @property
    def rank_correlation(self) -> float:
        """Spearman's rank correlation of estimated and exact effects; NaN for a single site."""
        return correlation(ranks(self.estimate), ranks(self.exact))

    def __repr__(self) -> str:
        said = (
            f"{len(self.sites)} sites patched exactly: R² {self.r_squared:.3g}, rank correlation "
            f"{self.rank_correlation:.3g}"
        )
        if self.bound is not None:
            said += (
                f"; by {len(self.joint_exact)} random halves of the other {self.n_others}, none of these moves the "
                f"metric by more than {self.bound:.3g} ({self.confidence:.0%} confidence, if effects add up)"
            )
        return f"Verification({said})"

    @typed
    def plot(self, *, title: str = "", path: str | os.PathLike[str] | None = None) -> Any:
        """Draws exact against estimated effects, with the line where they agree.

        Args:
            title: the figure's title.
            path: where to save it (its ending chooses the format).
        """
        return scatter(
            self.estimate, self.exact, labels=self.labels, title=title, x_title="estimated effect",
            y_title="exact effect", path=path,
        )  # fmt: skip


def verify(
    model: HookedTransformer,
    base: BaseRun,
    sites: Sites,
    measure: Measure,
    metric: Any,
    change: np.ndarray,
    how: Verify,
    *,
    has_sign: bool = True,
    max_batch: int | Literal["auto"] = "auto",
    progress: bool | None = None,
) -> tuple[np.ndarray, Mapping[str, Any]]:
    """Patches the sites with the largest estimates exactly, and random halves of the others together.

    Args:
        model, base, sites: the model, its unpatched run and the sites.
        measure: the metric, prepared; ``metric`` is the metric itself.
        metric: see ``measure``.
        change: the estimated effects, averaged over prompts, ``[site]``.
        how: how many.
        has_sign: whether the estimates have a sign.
        max_batch, progress: as in a sweep.

    Returns:
        The numbers of the verified sites, and the fields of :class:`Verification` that need no names.
    """
    order = np.argsort(-np.abs(np.nan_to_num(change)), kind="stable")
    best, others = order[: how.k], np.sort(order[how.k :])
    measured = measure_sites(model, base, sites.take(best), metric, max_batch=max_batch, progress=progress)
    (patched,), (baseline,) = measured.values.values(), measured.baseline.values()
    exact = (patched - baseline).reshape(len(best), -1)
    exact = exact.mean(axis=1) if has_sign else np.abs(exact).mean(axis=1)
    rng, halves = np.random.default_rng(how.seed), []
    for _ in range(how.subsets if len(others) else 0):
        halves.append(others[rng.random(len(others)) < 0.5])
    joint = np.asarray([_joint_effect(model, base, sites, half, measure) for half in halves])
    return best, {
        "estimate": change[best],
        "exact": exact,
        "joint_exact": joint,
        "joint_estimate": np.asarray([change[half].sum() for half in halves]),
        "bound": largest_hidden(joint, how.confidence) if len(halves) > 1 else None,
        "confidence": how.confidence,
        "n_others": len(others),
    }


def _joint_effect(model: HookedTransformer, base: BaseRun, sites: Sites, half: np.ndarray, measure: Measure) -> float:
    """Returns the mean effect of patching some sites in one run."""
    patches = [
        HookEntry(sites.full_name(layer), Replace(values[0], mask=_whole(cover(sites, base, half, layer), values[0])))
        for layer, values in sites.values.items()
    ]
    hooks = HookDictionary((*model._hooks.entries, *patches))
    cfg = model.cfg
    final, _ = run_forward(cfg, model.params, base.tokens, base.context, hooks=hooks, stop=cfg.n_layers)
    patched = measure_run(measure, as_numpy(final)[:, : base.length])
    return float(np.mean(patched - as_numpy(measure.baseline)))


def _whole(mask: np.ndarray, values: Any) -> np.ndarray:
    return np.broadcast_to(mask, values.shape)


def largest_hidden(effects: np.ndarray, confidence: float) -> float:
    """Bounds the largest single effect among sites, from the effects of random halves of them patched together.

    If effects add up, a half that holds each site with probability 1/2 has variance ``Σ effect² / 4``, so twice its
    standard deviation is at least the largest effect. The bound takes the upper confidence limit of the standard
    deviation of a normal sample, ``sqrt((n - 1) s² / χ²)``.

    Args:
        effects: ``[half]``, at least two.
        confidence: of the bound, between 0 and 1.
    """
    degrees = len(effects) - 1
    normal = statistics.NormalDist().inv_cdf(1 - confidence)
    # Wilson and Hilferty's approximation of the chi-squared quantile
    quantile = degrees * max(1e-6, 1 - 2 / (9 * degrees) + normal * (2 / (9 * degrees)) ** 0.5) ** 3
    return float(2 * np.sqrt(degrees * effects.var(ddof=1) / quantile))


def ranks(values: np.ndarray) -> np.ndarray:
    """Returns ranks from 0, equal values sharing the mean of theirs."""
    below = (values[None] < values[:, None]).sum(axis=1)
    equal = (values[None] == values[:, None]).sum(axis=1)
    return below + (equal - 1) / 2


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Returns Pearson's correlation; NaN where one does not vary."""
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt(np.square(x).sum() * np.square(y).sum()))
    return float((x * y).sum()) / scale if scale else float("nan")


def named(best: np.ndarray, sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Returns the coordinates of sites with these numbers in a grid of these sizes."""
    if not sizes:
        return ((),) * len(best)
    return tuple(tuple(int(n) for n in np.unravel_index(int(site), tuple(sizes))) for site in best)
