"""Effects of active features and of error terms on a metric: by exact patching or from gradients."""

import dataclasses
from typing import Any, Literal

import numpy as np

from tljax.attribution.convention import Convention
from tljax.attribution.integrated import Completeness
from tljax.attribution.options import Estimate, Grid
from tljax.attribution.verification import Verification
from tljax.checks import typed, whole
from tljax.dictionaries.attribution.effects_result import FeatureEffects
from tljax.dictionaries.attribution.gradients import Gradients, gradients_at_run, integrated_gradients
from tljax.dictionaries.attribution.nodes import Nodes, active, plain_fingerprint, prepare_nodes, sites_of
from tljax.errors import InputError
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.engine.run import measure_sites, prepare_metric
from tljax.patching.metrics.evaluation import Measure

EffectMethod = Literal["exact", "gradient", "ig"]
"""How effects are found: each node patched; the change times the gradient; the gradient averaged on the way."""


@typed
def feature_effects(
    model: HookedTransformer,
    prompt: Any,
    metric: Any,
    *,
    source: Any = None,
    points: Any = None,
    method: EffectMethod = "exact",
    steps: int | None = None,
    grid: Grid | None = None,
    k: int | None = None,
    min_activation: float = 0.0,
    verify: int | None = None,
    max_batch: int | Literal["auto"] = "auto",
    progress: bool | None = None,
) -> FeatureEffects:
    """Computes the effect of every active feature at every position on a metric, and that of every error term.

    Each feature is patched alone, at one position: to zero, or to its value in another run. All of them run through the
    sweep engine, many at a time; layers below and positions before a feature are not computed again.

    Args:
        model: a model with dictionaries, :meth:`~tljax.HookedTransformer.with_dictionaries`.
        prompt: the prompts: text, a list of texts, or token ids ``[batch, pos]``.
        metric: takes logits ``[batch, pos, d_vocab]`` and returns a number for each prompt ``[batch]``.
        source: where features are patched to: another prompt (or its cache) with as many tokens, as in sparse feature
            circuits (Marks et al. 2024); ``None`` sets them to zero.
        points: the points whose features are taken; all with dictionaries by default.
        method: ``"exact"``; ``"gradient"``, first-order, from one backward pass; or ``"ig"``, integrated gradients, one
            dictionary after another. Estimates take gradients as the model's splices do: with ``gradient="stop"``
            they leave out what a feature does through the error terms of later dictionaries, as published; with
            ``gradient="pass"`` integrated gradients add up to the whole effect.
        steps: with ``"ig"``, the number of points on the way, by default 10.
        grid: with ``"ig"``, where they lie: ``"left"`` (the default, as published), ``"gauss"``, ``"midpoint"``,
            ``"right"``.
        k: only the ``k`` strongest features of each token.
        min_activation: only features larger than this.
        verify: of an estimate, the number of largest effects to patch exactly.
        max_batch: most runs computed at once; ``"auto"`` chooses by the free memory.
        progress: whether to show a progress bar.

    Returns:
        One row for each active feature, position and prompt. Effects are patched minus baseline.

    Raises:
        InputError: a model without dictionaries, prompts of different lengths, a metric that returns one number for
            several prompts or has no gradient.
    """
    options = check_method(method, steps, grid)
    if verify is not None and method == "exact":
        raise InputError("verify= checks estimates against exact effects, and method='exact' estimates nothing.")
    if callable(metric) is False:
        raise InputError("metric= is one metric, a function of the logits such as LogitDiff(answer, wrong).")
    nodes = prepare_nodes(model, prompt, source, points)
    rows = _listed(nodes, min_activation, None if k is None else whole(k, "k", at_least=1))
    measure = metric_of_each(model, nodes, metric)
    convention, completeness = None, None
    if method == "exact":
        effect, error_effect = _exact(model, nodes, rows, metric, measure, max_batch, progress)
    else:
        gradients, completeness = estimated_gradients(model, nodes, measure, method, *options)
        effect, error_effect = _estimated(nodes, rows, gradients)
        convention = convention_of(model, method, *options)
    found = _result(model, nodes, rows, effect, error_effect, measure, convention, completeness)
    if verify is None:
        return found
    checked = _verified(model, nodes, rows, found, metric, whole(verify, "verify", at_least=1), max_batch, progress)
    return dataclasses.replace(found, verified=checked)


def check_method(method: EffectMethod, steps: int | None, grid: Grid | None) -> tuple[int, Grid]:
    """Checks options of a method.

    Raises:
        InputError: an option that the method does not use.
    """
    for name, value in (("steps", steps), ("grid", grid)):
        if method != "ig" and value is not None:
            raise InputError(f"method={method!r} does not use {name}={value!r}: leave it out, or give method='ig'.")
    return 10 if steps is None else whole(steps, "steps", at_least=1), grid or "left"


def metric_of_each(model: HookedTransformer, nodes: Nodes, metric: Any) -> Measure:
    """Prepares a metric that gives each prompt a number.

    Raises:
        InputError: it gives one number for several prompts.
    """
    measure = prepare_metric(metric, model, nodes.base)
    if measure.baseline.ndim == 0 and nodes.base.batch > 1:
        raise InputError(
            f"The metric returns one number for {nodes.base.batch} prompts, and a feature's effect is that on its own "
            "prompt. Index all prompts, logits[:, -1, token], instead of logits[0, -1, token], and average nothing."
        )
    if not np.isfinite(np.asarray(measure.baseline)).all():
        raise InputError("The metric is not finite on the unpatched run: look at model(prompt) first.")
    return measure


def estimated_gradients(
    model: HookedTransformer, nodes: Nodes, measure: Measure, method: EffectMethod, steps: int, grid: Grid
) -> tuple[Gradients, Completeness | None]:
    """Returns gradients at all nodes: those of the run, or averaged on the way to the patch."""
    if method == "ig":
        return integrated_gradients(model, nodes, measure, steps, grid)
    return gradients_at_run(model, nodes, measure), None


def convention_of(model: HookedTransformer, method: EffectMethod, steps: int, grid: Grid) -> Convention:
    """Returns what an estimate means, in the words that sweeps use."""
    stops = any(splice.error == "keep" and splice.gradient == "stop" for splice in model.cfg.splices)
    held = ", error terms of later dictionaries constant" if stops else ""
    how = Estimate(
        method="ig" if method == "ig" else "attribution", rule=None, gradient_at="base", steps=steps, grid=grid,
        along="activation", verify=None,
    ).convention(False, 1)  # fmt: skip
    where = how.gradient_at.replace("each layer's own activation", "each dictionary's features and error")
    return dataclasses.replace(how, method=method, gradient_at=where + held)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Active features: the point, the prompt, the position in the array and the feature of each, ``[row]``."""

    point: np.ndarray
    prompt: np.ndarray
    place: np.ndarray
    feature: np.ndarray


def _listed(nodes: Nodes, min_activation: float, k: int | None) -> Rows:
    found = [np.argwhere(active(nodes, point, min_activation, k)) for point in nodes.points]
    point = np.repeat(np.arange(len(found)), [len(one) for one in found])
    prompt, place, feature = np.concatenate(found).T
    return Rows(point, prompt, place, feature)


def _exact(
    model: HookedTransformer,
    nodes: Nodes,
    rows: Rows,
    metric: Any,
    measure: Measure,
    max_batch: int | Literal["auto"],
    progress: bool | None,
) -> tuple[np.ndarray, np.ndarray]:
    baseline = np.asarray(measure.baseline, np.float64).reshape(-1)
    effect = np.zeros(len(rows.point))
    errors = np.full((len(nodes.points), nodes.base.batch, nodes.base.length), np.nan)
    for number, point in enumerate(nodes.points):
        own = np.flatnonzero(rows.point == number)
        if len(own):
            listed = (rows.prompt[own], rows.place[own], rows.feature[own])
            effect[own] = _patched(model, nodes, point.features, listed, metric, baseline, max_batch, progress)
        if point.error is not None:
            prompt, place = np.nonzero(nodes.text)
            listed = (prompt, place, None)
            found = _patched(model, nodes, point.error, listed, metric, baseline, max_batch, progress)
            errors[number, prompt, place] = found
    return effect, errors


def _patched(
    model: HookedTransformer,
    nodes: Nodes,
    name: str,
    listed: tuple[np.ndarray, np.ndarray, np.ndarray | None],
    metric: Any,
    baseline: np.ndarray,
    max_batch: int | Literal["auto"],
    progress: bool | None,
) -> np.ndarray:
    """Returns the exact effect of patching each of some nodes of a point, ``[node]``."""
    grid = sites_of(model, nodes, name, *listed)
    measured = measure_sites(model, nodes.base, grid.sites, metric, max_batch=max_batch, progress=progress)
    (values,) = measured.values.values()
    change = values.reshape(grid.row.shape).astype(np.float64) - baseline
    found = np.zeros(len(listed[0]))
    found[grid.row[grid.row >= 0]] = change[grid.row >= 0]
    return found


def dense_exact_effects(
    model: HookedTransformer, nodes: Nodes, metric: Any, measure: Measure, progress: bool | None
) -> dict[str, np.ndarray]:
    """Returns the exact effects of nodes by full name: ``[batch, length, d_sae]``, of errors ``[batch, length]``."""
    rows = _listed(nodes, 0.0, None)
    effect, errors = _exact(model, nodes, rows, metric, measure, "auto", progress)
    found = {}
    for number, point in enumerate(nodes.points):
        own = rows.point == number
        found[point.features] = np.zeros(nodes.held(point.features).shape)
        found[point.features][rows.prompt[own], rows.place[own], rows.feature[own]] = effect[own]
        if point.error is not None:
            found[point.error] = errors[number]
    return found


def _estimated(nodes: Nodes, rows: Rows, gradients: Gradients) -> tuple[np.ndarray, np.ndarray]:
    effect = np.zeros(len(rows.point))
    errors = np.full((len(nodes.points), nodes.base.batch, nodes.base.length), np.nan)
    for number, point in enumerate(nodes.points):
        own = rows.point == number
        here = (rows.prompt[own], rows.place[own], rows.feature[own])
        effect[own] = gradients[point.features][here] * nodes.delta(point.features)[here]
        if point.error is not None:
            errors[number] = np.where(nodes.text, error_products(nodes, point.error, gradients[point.error]), np.nan)
    return effect, errors


def error_products(nodes: Nodes, name: str, gradient: np.ndarray) -> np.ndarray:
    """Returns the change of an error term times a gradient, summed over its width, ``[batch, length]``."""
    product = gradient * nodes.delta(name)
    return product.sum(axis=tuple(range(2, product.ndim)))


def _result(
    model: HookedTransformer,
    nodes: Nodes,
    rows: Rows,
    effect: np.ndarray,
    error_effect: np.ndarray,
    measure: Measure,
    convention: Convention | None,
    completeness: Completeness | None,
) -> FeatureEffects:
    activation, patched = np.zeros(len(rows.point)), np.zeros(len(rows.point))
    for number, point in enumerate(nodes.points):
        own = rows.point == number
        here = (rows.prompt[own], rows.place[own], rows.feature[own])
        activation[own] = nodes.held(point.features)[here]
        patched[own] = np.asarray(nodes.values[point.features])[here]
    ranks, longest = nodes.ranks, int(nodes.text.sum(axis=1).max())
    in_text = np.full((*error_effect.shape[:2], longest), np.nan)
    prompt, place = np.nonzero(nodes.text)
    in_text[:, prompt, ranks[prompt, place]] = error_effect[:, prompt, place]
    tokens: tuple[tuple[str, ...], ...] = ()
    if model.tokenizer is not None:
        each = [ids[: nodes.base.length][text] for ids, text in zip(nodes.base.tokens, nodes.text, strict=True)]
        tokens = tuple(tuple(map(str, model.to_str_tokens(ids))) for ids in each)
    return FeatureEffects(
        tuple(point.name for point in nodes.points), rows.point, rows.prompt, ranks[rows.prompt, rows.place],
        rows.feature, activation, patched, effect, in_text,
        np.asarray(measure.baseline, np.float64).reshape(-1), "zero" if nodes.ablation == "zero" else "source",
        convention, completeness, None, tokens, plain_fingerprint(model),
    )  # fmt: skip


def _verified(
    model: HookedTransformer,
    nodes: Nodes,
    rows: Rows,
    found: FeatureEffects,
    metric: Any,
    count: int,
    max_batch: int | Literal["auto"],
    progress: bool | None,
) -> Verification:
    best = np.argsort(-np.abs(found.effect), kind="stable")[:count]
    taken = Rows(rows.point[best], rows.prompt[best], rows.place[best], rows.feature[best])
    errorless = dataclasses.replace(
        nodes, points=tuple(dataclasses.replace(point, error=None) for point in nodes.points)
    )
    measure = metric_of_each(model, nodes, metric)
    exact, _ = _exact(model, errorless, taken, metric, measure, max_batch, progress)
    listed = [found[int(row)] for row in best]
    sites = tuple(
        (int(found.point[row]), one.prompt, one.pos, one.feature) for row, one in zip(best, listed, strict=True)
    )
    labels = tuple(f"{one.point} feature {one.feature}, prompt {one.prompt}, pos {one.pos}" for one in listed)
    nothing = np.zeros(0)
    return Verification(sites, labels, found.effect[best], exact, nothing, nothing, None, 0.95, len(found) - len(best))
