"""Direct effects between nodes: what one feature does to a metric through another, with all others held fixed.

The edge from ``u`` to ``d`` is ``(∂m/∂d) · (∂d/∂u) · Δu`` (Marks et al. 2024, arXiv 2403.19647): the change of ``u``,
pulled through to ``d`` along every path that meets no other dictionary, times the metric's gradient at ``d``. All
other features and error terms are constants.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from tljax.attribution.backward import Trajectory, pull_back, pull_from_points, trajectory_of
from tljax.attribution.cotangents import cotangents
from tljax.dictionaries.attribution.gradients import Gradients
from tljax.dictionaries.attribution.nodes import Nodes
from tljax.hooks.dictionary import HookDictionary, HookEntry
from tljax.hooks.interventions import Replace
from tljax.memory import how_many
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.metrics.evaluation import Measure

ERROR_NODE = -1
"""What stands for the error term where nodes have the number of a feature."""
EVERY_POS = -1
"""What stands for all positions where nodes are summed over them."""


@dataclasses.dataclass(frozen=True)
class Listed:
    """Nodes of a circuit: point, position and feature of each, ``[node]``, sorted by point.

    Attributes:
        point: number of the point.
        place: position in the array; :data:`EVERY_POS` for all together.
        feature: number of the feature; :data:`ERROR_NODE` for the error term.
    """

    point: np.ndarray
    place: np.ndarray
    feature: np.ndarray

    def __len__(self) -> int:
        return len(self.point)


def edge_effects(
    model: HookedTransformer, nodes: Nodes, listed: Listed, gradients: Gradients, measure: Measure
) -> np.ndarray:
    """Computes the effect of every edge between some nodes, averaged over prompts.

    Args:
        model, nodes: the model and its run.
        listed: the nodes.
        gradients: the metric's gradient at all of them, as far as the node effects take it.
        measure: the metric.

    Returns:
        ``[node, node + 1]``, from row to column; the last column is the metric itself.
    """
    origin = trajectory_of(model, nodes.base)
    frozen = [HookEntry(name, Replace(nodes.base.activations[name])) for name in nodes.names]
    found = np.zeros((len(listed), len(listed) + 1))
    run = _holding(origin, frozen)
    slopes = cotangents({"metric": measure}, run, nodes.base.length)
    shapes = _shapes(nodes, listed, range(len(nodes.points)))
    for name, pulled in pull_back(run, slopes, shapes) if len(listed) else ():
        columns, products = _contracted(nodes, listed, name, pulled)
        found[columns, -1] = products[0]
    for number, point in enumerate(nodes.points):
        before = _shapes(nodes, listed, range(number))
        if point.layer is None or not before:
            continue
        free = _holding(origin, [entry for entry in frozen if entry.name not in point.written])
        for targets, given in _cotangents_at(nodes, listed, number, gradients):
            for name, pulled in pull_from_points(free, point.layer, given, before):
                sources, products = _contracted(nodes, listed, name, pulled)
                found[np.ix_(sources, targets)] += products[: len(targets)].T
    return found / nodes.base.batch


def _holding(origin: Trajectory, entries: list[HookEntry]) -> Trajectory:
    return dataclasses.replace(origin, hooks=HookDictionary((*origin.hooks.entries, *entries)))


def _shapes(nodes: Nodes, listed: Listed, points: Iterable[int]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the activations of those points of ``points`` that have nodes."""
    names = []
    for number in points:
        features = listed.feature[listed.point == number]
        point = nodes.points[number]
        names += [point.features] if (features != ERROR_NODE).any() else []
        names += [point.error] if point.error is not None and (features == ERROR_NODE).any() else []
    return {name: nodes.base.activations[name].shape for name in names}


def _cotangents_at(
    nodes: Nodes, listed: Listed, number: int, gradients: Gradients
) -> Iterable[tuple[np.ndarray, dict[str, jax.Array]]]:
    """Yields nodes of a point, a few at a time, and the gradient into each, ``[n, batch, padded_pos, ...]``."""
    point, own = nodes.points[number], np.flatnonzero(listed.point == number)
    for name in point.written:
        is_error = name == point.error
        mine = own[(listed.feature[own] == ERROR_NODE) == is_error]
        shape = nodes.base.activations[name].shape
        at_once = how_many(16 * int(np.prod(shape)) * 4)
        padding = [(0, 0), (0, shape[1] - nodes.base.length)] + [(0, 0)] * (len(shape) - 2)
        gradient = np.pad(gradients[name], padding)
        for first in range(0, len(mine), at_once):
            part = mine[first : first + at_once]
            filled = np.concatenate([part, np.repeat(part[-1:], _filling(len(part), at_once))])
            chosen = None if is_error else jnp.asarray(listed.feature[filled])
            yield part, {name: _spread(jnp.asarray(gradient), jnp.asarray(listed.place[filled]), chosen)}


def _filling(count: int, most: int) -> int:
    """Returns how many entries to add, so that few sizes are compiled: powers of two."""
    return min(most, 1 << (count - 1).bit_length()) - count


@jax.jit
def _spread(gradient: jax.Array, place: jax.Array, feature: jax.Array | None) -> jax.Array:
    """Returns a gradient ``[batch, pos, ...]`` at the position and the feature of each node alone, ``[n, ...]``."""
    rest = (1,) * (gradient.ndim - 2)
    here = (place[:, None] == jnp.arange(gradient.shape[1])[None]) | (place == EVERY_POS)[:, None]
    kept = jnp.where(here.reshape(len(place), 1, -1, *rest), gradient[None], jnp.zeros((), gradient.dtype))
    if feature is None:
        return kept
    own = feature[:, None] == jnp.arange(gradient.shape[-1])[None]
    return jnp.where(own.reshape(len(place), *(1,) * (gradient.ndim - 1), -1), kept, jnp.zeros((), gradient.dtype))


def _contracted(nodes: Nodes, listed: Listed, name: str, pulled: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nodes at a point, and the change of each times gradients there, ``[n, node]``."""
    number = next(n for n, point in enumerate(nodes.points) if name in point.written)
    is_error = name == nodes.points[number].error
    mine = np.flatnonzero((listed.point == number) & ((listed.feature == ERROR_NODE) == is_error))
    base = nodes.base
    delta = nodes.delta(name) * nodes.text.reshape(*nodes.text.shape, *(1,) * (base.activations[name].ndim - 2))
    place = jnp.asarray(listed.place[mine])
    gradients = pulled[:, :, : base.length]
    if is_error:
        products = _error_sums(gradients, jnp.asarray(delta), place)
    else:
        feature = listed.feature[mine]
        products = _feature_sums(gradients, jnp.asarray(delta[..., feature]), place, jnp.asarray(feature))
    return mine, np.asarray(products, np.float64)


@jax.jit
def _error_sums(gradients: jax.Array, delta: jax.Array, place: jax.Array) -> jax.Array:
    products = (gradients * delta[None].astype(gradients.dtype)).sum(axis=(1, *range(3, gradients.ndim)))  # [n, pos]
    return jnp.matmul(products, _positions(place, products), precision="highest")


@jax.jit
def _feature_sums(gradients: jax.Array, delta: jax.Array, place: jax.Array, feature: jax.Array) -> jax.Array:
    taken = jnp.take(gradients, feature, axis=-1)
    products = (taken * delta[None].astype(taken.dtype)).sum(axis=1)  # [n, pos, node]
    return (products * _positions(place, products)[None]).sum(axis=1)


def _positions(place: jax.Array, like: jax.Array) -> jax.Array:
    """Returns 1 at the positions that belong to each node, ``[pos, node]``."""
    here = (jnp.arange(like.shape[1])[:, None] == place[None]) | (place == EVERY_POS)[None]
    return here.astype(like.dtype)
