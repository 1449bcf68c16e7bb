"""Checks estimated edge scores: the largest one by one against exact effects, random halves of the others together."""

from typing import Any, Literal

import numpy as np

from tljax.attribution.options import Verify
from tljax.attribution.verification import Verification, largest_hidden
from tljax.checks import typed, whole
from tljax.circuits.replacement import Ablation
from tljax.circuits.running import prepare_runs
from tljax.circuits.scores.edge_scores import EdgeScores
from tljax.circuits.scores.edges import edge_scores
from tljax.errors import InputError
from tljax.model.hooked_transformer import HookedTransformer


@typed
def verify_edges(
    model: HookedTransformer,
    prompt: Any,
    source: Any,
    metric: Any,
    scores: EdgeScores,
    *,
    verify: int | Verify = 20,
    ablation: Ablation = "patching",
    align: Any = None,
    max_batch: int | Literal["auto"] = "auto",
    progress: bool | None = None,
) -> Verification:
    """Measures exactly what scores estimate: the largest one by one, random halves of the others together.

    Args:
        model, prompt, source, metric, ablation, align: as they were for the scores
            (:func:`~tljax.circuits.edge_scores`).
        scores: the estimates; averaged over prompts and summed over positions if they are not.
        verify: how many of the largest are measured alone; a :class:`~tljax.attribution.Verify` also says how many
            random halves of the others are patched together, and the confidence of the bound that these give.
        max_batch: most circuits that run at once.
        progress: whether to show a progress bar.

    Returns:
        Estimates and exact effects, averaged over prompts. A site is ``(writer, reader)``, its label the edge's name.

    Raises:
        InputError: scores of another model's graph, of another ablation, or in other units than the metric's.

    Example:
        >>> import tljax
        >>> from tljax.circuits import edge_scores
        >>> from tljax.patching import LogitDiff
        >>> model = tljax.HookedTransformer.from_pretrained("tljax-tiny")
        >>> clean = "When John and Mary went to the store, John gave a drink to"
        >>> corrupted = "When John and Mary went to the store, Mary gave a drink to"
        >>> metric = LogitDiff(model.to_single_token(" Mary"), model.to_single_token(" John"))
        >>> scores = edge_scores(model, clean, corrupted, metric)
        >>> checked = verify_edges(model, clean, corrupted, metric, scores, verify=Verify(k=4, subsets=2))
        >>> len(checked.labels)
        4
    """
    how = verify if isinstance(verify, Verify) else Verify(k=verify)
    graph = scores.graph
    graph.check(model.cfg)
    kind = ablation if isinstance(ablation, str) else "given"
    if scores.convention.method == "information-flow":
        raise InputError("Information flow routes estimate no metric, so there is no effect to compare them with.")
    if scores.convention.ablation != kind:
        used = scores.convention.ablation
        raise InputError(f"The scores are of ablation={used!r}: verify them with that one, not {kind!r}.")
    scores = scores.sum_positions() if "pos" in scores.axis_names else scores
    scores = scores.mean() if "batch" in scores.axis_names else scores
    values = np.asarray(scores.values, np.float64)
    known = graph.edges & np.isfinite(values)
    k = whole(how.k, "Verify(k=...)", at_least=1, at_most=int(known.sum()))
    order = np.argsort(np.where(known, -np.abs(values), np.inf).ravel(), kind="stable")
    best = np.stack(np.unravel_index(order[:k], graph.shape), axis=1)
    mask = np.zeros(graph.shape, bool)
    mask[tuple(best.T)] = True
    found = edge_scores(
        model, prompt, source, metric, "exact", ablation=ablation, graph=graph, edges=mask, align=align,
        progress=progress,
    )  # fmt: skip
    others = known & ~mask
    halves = others & (np.random.default_rng(how.seed).random((how.subsets, *graph.shape)) < 0.5)
    joint = np.zeros(len(halves))
    if len(halves) and others.any():
        runs = prepare_runs(model, graph, prompt, source, ablation=ablation, align=align, max_batch=max_batch)
        measure = runs.measure(metric)
        patched = np.asarray(runs.metrics((graph.edges & ~halves)[:, None, None], measure, progress), np.float64)
        joint = (patched - np.asarray(measure.baseline)).reshape(len(halves), -1).mean(axis=1)
    return Verification(
        sites=tuple((int(writer), int(reader)) for writer, reader in best),
        labels=tuple(graph.edge_name(int(writer), int(reader)) for writer, reader in best),
        estimate=values[tuple(best.T)],
        exact=np.asarray(found.values, np.float64)[tuple(best.T)],
        joint_exact=joint,
        joint_estimate=np.where(halves, values, 0).sum(axis=(1, 2)),
        bound=largest_hidden(joint, how.confidence) if len(joint) > 1 else None,
        confidence=how.confidence,
        n_others=int(others.sum()),
    )
