"""Checks estimated edge scores: the largest one by one against exact effects, random halves of the others together."""

import dataclasses
from typing import Any, Literal

import numpy as np

from tljax.checks import typed, whole
from tljax.circuits.replacement import Ablation
from tljax.circuits.running import prepare_runs
from tljax.circuits.scores.edge_scores import EdgeScores, ranks
from tljax.circuits.scores.edges import edge_scores
from tljax.errors import InputError
from tljax.model.hooked_transformer import HookedTransformer


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class EdgeVerification:
    """Exact effects of edges beside their estimates, averaged over prompts.

    Attributes:
        edges: names of the edges with the largest estimates, largest first.
        estimate, exact: their scores, and the effects of patching each alone, ``[edge]``.
        joint_estimate: sums of the estimates of random halves of the other edges, ``[half]``.
        joint_exact: the effects of patching these halves together, ``[half]``.
        n_others: number of other edges.
    """

    edges: tuple[str, ...]
    estimate: np.ndarray
    exact: np.ndarray
    joint_estimate: np.ndarray
    joint_exact: np.ndarray
    n_others: int

    @property
    def r_squared(self) -> float:
        """Share of the exact effects' variance that estimates explain, ``1 - Σ(exact - estimate)² / Σ(exact - mean)²``.

        At most 1; negative for estimates worse than the mean; NaN if the effects do not vary.
        """
        spread = np.square(self.exact - self.exact.mean()).sum()
        return float(1 - np.square(self.exact - self.estimate).sum() / spread) if spread else float("nan")

    @property
    def rank_correlation(self) -> float:
        """Spearman's rank correlation of estimates and exact effects; NaN if one does not vary."""
        first, second = (ranks(values) - ranks(values).mean() for values in (self.estimate, self.exact))
        scale = float(np.sqrt(np.square(first).sum() * np.square(second).sum()))
        return float((first * second).sum()) / scale if scale else float("nan")

    def __repr__(self) -> str:
        said = (
            f"{len(self.edges)} edges patched exactly: R² {self.r_squared:.3g}, rank correlation "
            f"{self.rank_correlation:.3g}"
        )
        if len(self.joint_exact):
            miss = np.abs(self.joint_exact - self.joint_estimate).max()
            said += f"; {len(self.joint_exact)} random halves of the other {self.n_others} missed by {miss:.3g} at most"
        return f"EdgeVerification({said})"


@typed
def verify_edges(
    model: HookedTransformer,
    prompt: Any,
    source: Any,
    metric: Any,
    scores: EdgeScores,
    *,
    k: int = 20,
    subsets: int = 10,
    seed: int = 0,
    ablation: Ablation = "patching",
    align: Any = None,
    max_batch: int | Literal["auto"] = "auto",
    progress: bool | None = None,
) -> EdgeVerification:
    """Measures exactly what scores estimate: the ``k`` largest one by one, random halves of the others together.

    Args:
        model, prompt, source, metric, ablation, align: as they were for the scores
            (:func:`~tljax.circuits.edge_scores`).
        scores: the estimates; averaged over prompts and summed over positions if they are not.
        k: how many edges are measured alone, by the size of their scores.
        subsets: how many random halves of the others are patched together.
        seed: where random draws start.
        max_batch: most circuits that run at once.
        progress: whether to show a progress bar.

    Raises:
        InputError: scores of another model's graph, of another ablation, or in other units than the metric's.
    """
    graph = scores.graph
    graph.check(model.cfg)
    kind = ablation if isinstance(ablation, str) else "given"
    if scores.convention.method == "information-flow":
        raise InputError("Information flow routes estimate no metric, so there is no effect to compare them with.")
    if scores.convention.ablation != kind:
        raise InputError(
            f"The scores are of ablation={scores.convention.ablation!r}: verify them with it, not {kind!r}."
        )
    scores = scores.sum_positions() if "pos" in scores.axis_names else scores
    scores = scores.mean() if "batch" in scores.axis_names else scores
    values = np.asarray(scores.values, np.float64)
    known = graph.edges & np.isfinite(values)
    k = whole(k, "k", at_least=1, at_most=int(known.sum()))
    order = np.argsort(np.where(known, -np.abs(values), np.inf).ravel(), kind="stable")
    best = np.stack(np.unravel_index(order[:k], graph.shape), axis=1)
    mask = np.zeros(graph.shape, bool)
    mask[tuple(best.T)] = True
    found = edge_scores(
        model, prompt, source, metric, "exact", ablation=ablation, graph=graph, edges=mask, align=align,
        progress=progress,
    )  # fmt: skip
    others = known & ~mask
    rng = np.random.default_rng(seed)
    halves = others & (rng.random((whole(subsets, "subsets", at_least=0), *graph.shape)) < 0.5)
    joint = np.zeros(len(halves))
    if len(halves) and others.any():
        runs = prepare_runs(model, graph, prompt, source, ablation=ablation, align=align, max_batch=max_batch)
        measure = runs.measure(metric)
        patched = np.asarray(runs.metrics((graph.edges & ~halves)[:, None, None], measure, progress), np.float64)
        joint = (patched - np.asarray(measure.baseline)).reshape(len(halves), -1).mean(axis=1)
    sums = np.where(halves, values, 0).sum(axis=(1, 2))
    return EdgeVerification(
        tuple(graph.edge_name(int(writer), int(reader)) for writer, reader in best), values[tuple(best.T)],
        np.asarray(found.values, np.float64)[tuple(best.T)], sums, joint, int(others.sum()),
    )  # fmt: skip
