"""Finds sparse feature circuits: node effects, the edges between the nodes that matter, thresholds on both."""

from typing import Any

import numpy as np

from tljax.attribution.options import Grid
from tljax.checks import typed
from tljax.dictionaries.attribution.circuit import FeatureCircuit
from tljax.dictionaries.attribution.edges import ERROR_NODE, EVERY_POS, Listed, edge_effects
from tljax.dictionaries.attribution.effects import (
    EffectMethod,
    check_method,
    convention_of,
    dense_exact_effects,
    error_products,
    estimated_gradients,
    metric_of_each,
)
from tljax.dictionaries.attribution.gradients import Gradients, gradients_at_run
from tljax.dictionaries.attribution.nodes import Nodes, dictionary_samples, plain_fingerprint, prepare_nodes
from tljax.errors import InputError
from tljax.model.hooked_transformer import HookedTransformer

_MOST_NODES = 4000

NodeEffects = dict[str, np.ndarray]
"""For each point of nodes their effects, ``[batch, length, d_sae]``; of an error term ``[batch, length]``."""


@typed
def feature_circuit(
    model: HookedTransformer,
    prompt: Any,
    metric: Any,
    *,
    source: Any = None,
    points: Any = None,
    node_threshold: float = 0.1,
    edge_threshold: float = 0.01,
    by_position: bool = False,
    method: EffectMethod = "ig",
    steps: int | None = None,
    grid: Grid | None = None,
    progress: bool | None = None,
) -> FeatureCircuit:
    """Finds the sparse feature circuit of a behaviour (Marks et al. 2024, arXiv 2403.19647).

    Nodes are the features and error terms of the model's dictionaries whose effect on the metric, averaged over
    prompts, is at least ``node_threshold`` in size. An edge's effect is the change of its source, through every path to
    its target that meets no other dictionary, times the metric's gradient at the target. Every later point is a
    possible target, so that dictionaries at any points give a circuit; with dictionaries on the residual stream after
    each layer, edges run from layer to layer as in the paper. Whether error terms pass gradients on, and so have edges
    into them, is the splice's own ``gradient=``: with ``"stop"``, as published, they do not.

    Args:
        model: a model with dictionaries, :meth:`~tljax.HookedTransformer.with_dictionaries`.
        prompt: the prompts; all of equally many tokens if ``by_position``.
        metric: takes logits ``[batch, pos, d_vocab]`` and returns a number for each prompt.
        source: prompts with other answers, whose features are patched in; ``None`` sets features to zero.
        points: the points whose features are taken; all with dictionaries by default.
        node_threshold, edge_threshold: the least size of the effect of a node and of an edge.
        by_position: whether each position has nodes of its own, instead of sums over positions.
        method, steps, grid: how node effects are found, as in :func:`feature_effects`.
        progress: whether to show a progress bar.

    Raises:
        InputError: a model without dictionaries, a metric without a gradient or with one number for several prompts,
            prompts of different lengths, or thousands of nodes because of a low threshold.
    """
    options = check_method(method, steps, grid)
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not value >= 0:
            raise InputError(f"{name}={value!r} is the least size of an effect: give a number of at least 0.")
    nodes = prepare_nodes(model, prompt, source, points)
    if by_position and not nodes.text.all():
        raise InputError(
            "by_position=True needs prompts of equally many tokens: positions are compared between prompts."
        )
    measure = metric_of_each(model, nodes, metric)
    if method == "exact":
        gradients = gradients_at_run(model, nodes, measure)
        effects = dense_exact_effects(model, nodes, metric, measure, progress)
        said = "exact effects of nodes, gradients at the run along edges"
    else:
        gradients, _ = estimated_gradients(model, nodes, measure, method, *options)
        effects = _first_order(nodes, gradients)
        said = str(convention_of(model, method, *options))
    listed, effect = _selected(nodes, effects, node_threshold, by_position)
    if len(listed) > _MOST_NODES:
        raise InputError(
            f"{len(listed)} nodes have effects of at least {node_threshold:g}, and edges are found between all pairs: "
            f"up to {_MOST_NODES} nodes. Raise node_threshold."
        )
    weights = edge_effects(model, nodes, listed, gradients, measure)
    source_of, target = np.nonzero((np.abs(weights) >= edge_threshold) & (weights != 0))
    names = tuple(point.name for point in nodes.points)
    place = np.where(listed.place == EVERY_POS, EVERY_POS, nodes.ranks[0][np.maximum(listed.place, 0)])
    to = "zero" if nodes.ablation == "zero" else "the source's values"
    return FeatureCircuit(
        names, tuple(point.d_sae for point in nodes.points), listed.point, listed.feature, place, effect,
        source_of, target, weights[source_of, target], by_position, float(node_threshold), float(edge_threshold),
        f"{said}; patched to {to}", plain_fingerprint(model), dictionary_samples(model, names),
    )  # fmt: skip


def _first_order(nodes: Nodes, gradients: Gradients) -> NodeEffects:
    found = {}
    for point in nodes.points:
        found[point.features] = gradients[point.features] * nodes.delta(point.features)
        if point.error is not None:
            found[point.error] = error_products(nodes, point.error, gradients[point.error])
    return found


def _selected(nodes: Nodes, effects: NodeEffects, threshold: float, by_position: bool) -> tuple[Listed, np.ndarray]:
    """Returns the nodes whose mean effect over prompts is large enough, and that effect."""
    point, place, feature, effect = [], [], [], []
    for number, one in enumerate(nodes.points):
        for name in one.written:
            own = effects[name]
            own = own[..., None] if name == one.error else own
            mean = np.where(nodes.text[..., None], own, 0).astype(np.float64).sum(axis=0) / nodes.base.batch
            mean = mean if by_position else mean.sum(axis=0, keepdims=True)
            at, features = np.nonzero((np.abs(mean) >= threshold) & (mean != 0))
            point.append(np.full(len(at), number))
            place.append(at if by_position else np.full(len(at), EVERY_POS))
            feature.append(np.full(len(at), ERROR_NODE) if name == one.error else features)
            effect.append(mean[at, features])
    return Listed(*(np.concatenate(each) for each in (point, place, feature))), np.concatenate(effect)
