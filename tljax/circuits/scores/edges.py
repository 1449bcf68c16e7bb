"""``edge_scores``: how much each edge of the residual graph matters, as an array over writers and readers."""

import warnings
from typing import Any, Literal

import jax
import numpy as np

from tljax.checks import typed
from tljax.circuits.graph import ResidualGraph
from tljax.circuits.replacement import Ablation, mean_activations
from tljax.circuits.scores.batches import Pairs, PerBatch, slices
from tljax.circuits.scores.convention import Method
from tljax.circuits.scores.edge_scores import EDGE_AXES, EdgeScores
from tljax.circuits.scores.integrated import Grid
from tljax.circuits.scores.one_batch import BatchScores, score_batch, score_exactly
from tljax.circuits.scores.plan import Plan, PostNorm
from tljax.errors import InputError
from tljax.fingerprint import fingerprint_of
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.engine.run import Reduce
from tljax.progress import Progress
from tljax.text.warned import level_of_caller

_FEWEST, _MOST = 4, 256
"""Steps tried for a tolerance: these, and doublings between."""


class ZeroGapWarning(UserWarning):
    """Warning that some prompts have the same metric in the base run and in the source's."""


@typed
def edge_scores(
    model: HookedTransformer,
    prompt: Any,
    source: Any = None,
    metric: Any = None,
    method: Method = "eap",
    *,
    ablation: Ablation = "patching",
    graph: ResidualGraph | None = None,
    edges: Any = None,
    steps: int | None = None,
    grid: Grid | None = None,
    tolerance: float | None = None,
    post_norm: PostNorm = "exact",
    reduce: Reduce = "mean",
    axes: tuple[str, ...] = (),
    align: Any = None,
    batch_size: int | Literal["auto"] = "auto",
    progress: bool | None = None,
) -> EdgeScores:
    """Scores every edge of the residual graph: how the metric changes if the edge alone carries the source's value.

    The sign is that of patching: patched minus baseline. With the clean prompt first and the corrupted one as source,
    and a metric that is large on the clean run, edges that matter have *negative* scores.

    The estimates take one backward pass for each point: the gradient of the metric at what each reader reads, times the
    change of what each writer writes.

    - ``"eap"``: at the base run (edge attribution patching, Syed et al. 2023). Two forward passes and one backward.
    - ``"eap-ig"``: averaged while the token embeddings move from base to source (EAP-IG-inputs, Hanna et al. 2024). The
      scores of the edges from ``input`` then add up to the effect of replacing the embeddings.
    - ``"eap-ig-activations"``: averaged while each output (of the embedding, an attention layer, an MLP), one at a
      time, moves from base to replacement.
    - ``"clean-corrupted"``: the mean of the gradients at both ends of ``"eap-ig"``.
    - ``"mask-ig"``: averaged while all edges together move from base to replacement. The scores of all edges add up to
      the effect of replacing all of them.
    - ``"information-flow"``: the share of what a reader reads that comes from the writer (information flow routes,
      Ferrando and Voita 2024); no metric, no source.

    ``"exact"`` is no estimate: it patches one edge at a time and computes everything after its reader anew
    (:func:`~tljax.circuits.scores.exact.exact_edge_effects`).

    Args:
        model: the model, without hooks.
        prompt: the base run: text, a list of texts, token ids ``[batch, pos]`` or a ``Batch``.
        source: as many prompts, whose run the replacements come from; for means, the prompts to average over.
        metric: takes logits ``[batch, pos, d_vocab]``, returns one number, or one for each prompt ``[batch]``; such as
            :class:`~tljax.patching.LogitDiff`.
        method: one of the above.
        ablation: what an edge carries instead: ``"patching"``, what the writer writes in the source's run; ``"zero"``;
            ``"mean"``, over prompts of means over tokens; ``"positional_mean"``, over prompts at each position; or
            values by hook name (:func:`~tljax.circuits.mean_activations`). ``"eap-ig"`` and ``"clean-corrupted"`` run
            on mixtures of both prompts, and take ``"patching"`` alone.
        graph: the graph, by default that of the model; ``ResidualGraph.of(model, experts=True)`` has each expert of a
            mixture as a writer. EAP-IG's edges of a model with grouped key/value heads are those of
            ``model.set_ungroup_grouped_query_attention(True)``.
        edges: for ``"exact"``, the edges to measure, a boolean mask ``[writer, reader]``; all by default. The scores of
            others are NaN.
        steps: for methods with a path, how many points it has; 5 by default.
        grid: where they lie: ``"left"`` includes the base, ``"right"`` the other end, ``"midpoint"`` neither,
            ``"both"`` both (one point more than steps); ``"gauss"`` are Gauss-Legendre's points, by far the most exact.
            By default as in the reference: ``"right"`` for ``"eap-ig"``, ``"left"`` for ``"eap-ig-activations"``;
            ``"gauss"`` for ``"mask-ig"`` and with ``tolerance``.
        tolerance: instead of ``steps``, takes 4, 8, 16 ... points until the completeness error is below this share of
            the effect.
        post_norm: in models with a norm after attention (Gemma 2), ``"exact"`` takes a head's change through the
            derivative of that norm; ``"ignored"`` does not, as EAP-IG.
        reduce: ``"mean"`` averages over prompts, ``"none"`` keeps the scores of each.
        axes: ``("pos",)`` keeps positions, counted in each prompt's text; ``()`` sums over them.
        align: for prompts of different lengths, ``[batch, pos]``: for each entry of the base's array the entry of the
            source's that stands for it, or -1 for a token that keeps its own value (``tljax.text.align``).
        batch_size: prompts that run at once; by default as many as memory allows. It does not change the scores.
            ``"exact"`` runs all, and cuts what it runs by itself.
        progress: whether to show a progress bar; by default one appears after three seconds.

    Returns:
        The scores, with their convention, the metric of both runs, and for ``"eap-ig"``, ``"clean-corrupted"`` and
        ``"mask-ig"`` by how much they miss the sum that they should have.

    Raises:
        InputError: unequal lengths without ``align``; a source that equals the prompt; a metric without a gradient at
            the base run, as KL to itself; numbers that are not finite; a graph of another model; an option that the
            method does not have.

    Warns:
        ZeroGapWarning: some prompts have the same metric on both sides.

    Example:
        >>> import tljax
        >>> from tljax.circuits import edge_scores
        >>> from tljax.patching import LogitDiff
        >>> model = tljax.HookedTransformer.from_pretrained("tljax-tiny")
        >>> clean = "When John and Mary went to the store, John gave a drink to"
        >>> corrupted = "When John and Mary went to the store, Mary gave a drink to"
        >>> metric = LogitDiff(model.to_single_token(" Mary"), model.to_single_token(" John"))
        >>> scores = edge_scores(model, clean, corrupted, metric, "eap-ig")
        >>> scores.values.shape == scores.graph.shape
        True
    """
    graph = ResidualGraph.of(model) if graph is None else graph
    graph.check(model.cfg)
    plan = Plan.of(model, metric, method, ablation, steps, grid, tolerance, post_norm, reduce, axes)
    if model._hooks.entries:
        raise InputError("The model carries hooks, and edges are those of the model as it is: model.reset_hooks().")
    pairs = Pairs.of(model, prompt, source if plan.uses_source and not plan.averages else None, align)
    if plan.averages:
        if source is None:
            raise InputError(f"ablation={ablation!r} averages over prompts: give them as source=.")
        plan = plan.replaced_by(mean_activations(model, source, graph, by_position=ablation == "positional_mean"))
    if edges is not None and method != "exact":
        raise InputError(f'edges= chooses the edges that method="exact" measures; {method!r} scores all at once.')
    scores, found = _scored(model, graph, plan, pairs, metric, edges, tolerance, batch_size, progress)
    _warn_of_gaps(scores, found)
    return scores


def _scored(
    model: HookedTransformer,
    graph: ResidualGraph,
    plan: Plan,
    pairs: Pairs,
    metric: Any,
    edges: Any,
    tolerance: float | None,
    batch_size: int | Literal["auto"],
    progress: bool | None,
) -> tuple[EdgeScores, list[BatchScores]]:
    """Scores all batches, with more and more points if a tolerance is given; arguments as of :func:`edge_scores`."""
    is_exact = plan.convention.method == "exact"
    batches = list(slices(model.cfg, graph, pairs, len(pairs) if is_exact else batch_size))
    metrics = PerBatch(metric, model, pairs, batches) if plan.uses_metric else None
    tried = [plan.steps or 1] if tolerance is None else [_FEWEST * 2**n for n in range(10) if _FEWEST * 2**n <= _MOST]
    scores = None
    for number in tried:
        plan = plan.with_steps(number)
        if is_exact:
            assert metrics is not None
            found = [score_exactly(model, graph, plan, pairs, metrics, edges, progress)]
        else:
            with Progress(len(batches) * plan.n_runs(model.cfg), progress, "edge scores") as bar:
                found = [score_batch(model, graph, plan, pairs, metrics, rows, bar.advance) for rows in batches]
        scores = _joined(model, graph, plan, found, len(pairs))
        if tolerance is None or (scores.completeness_error or 0.0) <= tolerance:
            return scores, found
    assert scores is not None
    raise InputError(
        f"After {_MOST} points the completeness error is {scores.completeness_error:.2g}, above tolerance="
        f"{tolerance}. It cannot become smaller than rounding: ask for less, or use float64."
    )


def _joined(
    model: HookedTransformer, graph: ResidualGraph, plan: Plan, found: list[BatchScores], n_prompts: int
) -> EdgeScores:
    """Puts batches together: concatenated for each prompt, or averaged."""

    def number(name: str) -> jax.Array | None:
        parts = [getattr(one, name) for one in found]
        if any(part is None for part in parts):
            return None
        if not parts[0].ndim:  # a metric of all prompts at once
            return jax.device_put(sum(parts) if name == "completeness" else parts[0])
        joined = np.concatenate(parts)
        return jax.device_put(joined if plan.by_prompt else joined.mean(axis=0, dtype=joined.dtype))

    if plan.by_prompt:
        values = np.concatenate([one.values for one in found])
    else:
        values = sum(one.values for one in found[1:]) + found[0].values
        values = values / n_prompts if found[0].per_prompt else values
    names = (*(("batch",) if plan.by_prompt else ()), *(("pos",) if plan.by_position else ()), *EDGE_AXES)
    return EdgeScores(
        jax.device_put(values), number("baseline"), number("source_metric"), number("completeness"), names,
        graph=graph, convention=plan.convention, fingerprint=fingerprint_of(model), n_prompts=n_prompts,
    )  # fmt: skip


def _warn_of_gaps(scores: EdgeScores, found: list[BatchScores]) -> None:
    if any(one.source_metric is None or one.baseline is None for one in found):
        return
    ends = [
        np.concatenate([np.atleast_1d(getattr(one, name)) for one in found]) for name in ("baseline", "source_metric")
    ]
    if ends[0].shape != ends[1].shape:
        return
    same = np.flatnonzero(np.abs(ends[1] - ends[0]) <= 1e-6 * np.maximum(np.abs(ends[0]), np.abs(ends[1])))
    if not same.size:
        return
    which = (
        "The metric" if scores.n_prompts == 1 else f"The metric of prompt(s) {', '.join(map(str, same[:8].tolist()))}"
    )
    warnings.warn(
        f"{which}{' and others' if same.size > 8 else ''} is the same in the base run and in the source's, so there is "
        "no effect for edges to carry. Does the source change what the metric reads?",
        ZeroGapWarning,
        stacklevel=level_of_caller(),
    )
