"""The training of interchanges: all sites of a layer at once, a step a few compiled programs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tljax.interchange import programs
from tljax.interchange.methods import Learned, Method
from tljax.interchange.programs import Part, Plan, Rows, Site, Subspace, losses_of, task_logits
from tljax.model.hooked_transformer import HookedTransformer
from tljax.modules.context import AttentionContext
from tljax.typing import Params


@dataclasses.dataclass(frozen=True)
class Steps:
    """What happens in each step.

    Attributes:
        order: numbers of the pairs, -1 for fillers, int32 ``[seed, step, micro_batch, pair]``.
        factor: of the learning rates, ``[step]``.
        temperature: ``[step]``.
        rates: learning rate of each learned part.
        penalty: weight of the gate's size in the loss.
        strength: of the interchange.
    """

    order: np.ndarray
    factor: np.ndarray
    temperature: np.ndarray
    rates: dict[str, np.ndarray]
    penalty: np.ndarray
    strength: np.ndarray


def make_order(
    count: int,
    *,
    seeds: tuple[int, ...],
    epochs: int,
    batch_size: int,
    micro_batch_size: int | None = None,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Draws the order of pairs, each once an epoch; -1 fills the last batch.

    Args:
        count: number of pairs, which with ``batch_size`` gives the number of steps.
        seeds: a seed for each order.
        epochs: how often each pair is used.
        batch_size: pairs in a step.
        micro_batch_size: pairs that run at once.
        rows: the only pairs to use, drawn again to fill as many steps.

    Returns:
        int32 ``[seed, step, micro_batch, pair]``.
    """
    rows = np.arange(count) if rows is None else rows
    batch_size = min(batch_size, count)
    per_epoch = -(-count // batch_size)
    micro = batch_size if micro_batch_size is None else min(micro_batch_size, batch_size)
    parts = -(-batch_size // micro)
    order = np.full((len(seeds), epochs, per_epoch, parts * micro), -1, np.int32)
    for number, seed in enumerate(seeds):
        generator = np.random.default_rng((seed, 1))
        for epoch in range(epochs):
            drawn = np.full(per_epoch * batch_size, -1, np.int32)
            drawn[:count] = np.concatenate([generator.permutation(rows) for _ in range(-(-count // len(rows)))])[:count]
            order[number, epoch, :, :batch_size] = drawn.reshape(per_epoch, batch_size)
    return order.reshape(len(seeds), epochs * per_epoch, parts, micro)


def train(
    plan: Plan,
    method: Method,
    model: HookedTransformer,
    ends: Params,
    layer: int,
    rows: Rows,
    sites: Site,
    start: Learned,
    fixed: Subspace,
    steps: Steps,
    optimizer: optax.GradientTransformation | None,
) -> tuple[Subspace, np.ndarray]:
    """Trains every site of a layer.

    Args:
        plan, model, ends, layer, rows: the pairs; see :mod:`tljax.interchange.programs`.
        method: what is learned.
        sites: where.
        start: starting values, ``[site, ...]``.
        fixed: what is fixed of columns and gates, ``[site, ...]``.
        steps: the schedule.
        optimizer: replaces Adam with the rates of ``steps``; ``None`` keeps it.

    Returns:
        The trained subspaces with hard gates ``[site, ...]``, and the loss of each step in nats without its penalty,
        ``[step, site]``.
    """
    learned, fixed, sites = jax.device_put((start, fixed, sites))
    state = _begin(method, learned, optimizer)
    losses, seed = [], np.asarray(sites.seed)
    for step in range(steps.order.shape[1]):
        temperature, total, gradient = steps.temperature[step], None, None
        for micro in range(steps.order.shape[2]):
            part = programs.take(plan, rows, sites, steps.order[seed, step, micro])
            found = _gradient(plan, method, model, ends, layer, part, learned, fixed, temperature, steps.strength)
            total, gradient = found if gradient is None else _added((total, gradient), found)
        rates = {name: rate * steps.factor[step] for name, rate in steps.rates.items()}
        learned, state, loss = _update(
            method, optimizer, learned, state, total, gradient, fixed, temperature, rates, steps.penalty
        )  # fmt: skip
        losses.append(loss)
    return _finish(method, learned, fixed), np.stack(jax.device_get(losses))


def _gradient(
    plan: Plan, method: Method, model: HookedTransformer, ends: Params, layer: int, part: Part, learned: Learned,
    fixed: Subspace, temperature: Any, strength: Any,
) -> tuple[Any, Learned]:  # fmt: skip
    """Returns the sums of losses and of weights ``[site]`` each, and the gradient of the former ``[site, ...]``."""
    block = programs.block_of(model, layer, part)
    where = (plan, method, block.module, block.params, block.context)
    stream = _enter(*where, part, learned, fixed, temperature, strength)
    later, streams = programs.later_blocks(model, layer, part), []
    for one in later:
        streams.append(stream)
        stream = programs.forward(one.module, one.params, one.context, stream)
    sums, gradient = _loss(plan, ends, stream, part)
    for one, entering in zip(reversed(later), reversed(streams), strict=True):
        gradient = programs.backward(one.module, one.params, one.context, entering, gradient)
    return sums, _leave(*where, part, learned, fixed, temperature, strength, gradient)


def _site_block(
    plan: Plan, method: Method, module: Any, params: Params, context: AttentionContext, part: Part, learned: Learned,
    fixed: Subspace, temperature: Any, strength: Any,
) -> jax.Array:  # fmt: skip
    subspaces = jax.vmap(method.subspace, (0, 0, None))(learned, fixed, temperature)
    return programs.interchange_block(plan, module, params, context, part, subspaces, strength)


_enter = jax.jit(_site_block, static_argnums=(0, 1, 2))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _leave(
    plan: Plan, method: Method, module: Any, params: Params, context: AttentionContext, part: Part, learned: Learned,
    fixed: Subspace, temperature: Any, strength: Any, gradient: jax.Array,
) -> Learned:  # fmt: skip
    """Takes the gradient at the block's output back to what is learned."""

    def run(now: Learned) -> jax.Array:
        return _site_block(plan, method, module, params, context, part, now, fixed, temperature, strength)

    return jax.vjp(run, learned)[1](gradient)[0]


@functools.partial(jax.jit, static_argnums=0)
def _loss(plan: Plan, ends: Params, stream: jax.Array, part: Part) -> tuple[Any, jax.Array]:
    def total(final: jax.Array) -> tuple[jax.Array, Any]:
        logits = task_logits(plan, ends, final, part.read.reshape(-1))
        losses = losses_of(logits, part.targets.reshape(-1))
        weighted = losses.reshape(part.weights.shape) * part.weights.astype(losses.dtype)
        return weighted.sum(), (weighted.sum(axis=-1), part.weights.astype(losses.dtype).sum(axis=-1))

    gradient, sums = jax.grad(total, has_aux=True)(stream)
    return sums, gradient


@jax.jit
def _added(one: Any, two: Any) -> Any:
    return jax.tree.map(jnp.add, one, two)


def _optimiser(optimizer: optax.GradientTransformation | None) -> optax.GradientTransformation:
    return optax.scale_by_adam() if optimizer is None else optimizer


@functools.partial(jax.jit, static_argnums=(0, 2))
def _begin(method: Method, learned: Learned, optimizer: optax.GradientTransformation | None) -> Any:
    return jax.vmap(_optimiser(optimizer).init)(learned)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _update(
    method: Method, optimizer: optax.GradientTransformation | None, learned: Learned, state: Any, total: Any,
    gradient: Learned, fixed: Subspace, temperature: Any, rates: dict[str, Any], penalty: Any,
) -> tuple[Learned, Any, jax.Array]:  # fmt: skip
    """Makes one optimiser step at every site; returns the mean loss ``[site]`` too."""

    def one(learned: Learned, state: Any, weight: Any, gradient: Learned, given: Subspace) -> tuple[Learned, Any]:
        of_gate = jax.grad(lambda now: method.penalty(now, given, temperature))(learned)
        whole = {name: gradient[name] / weight + penalty * of_gate[name] for name in learned}
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates: Any
            updates, state = _optimiser(optimizer).update(whole, state, learned)
        if optimizer is None:
            updates = {name: -rates[name] * update for name, update in updates.items()}
        return method.project({name: learned[name] + updates[name] for name in learned}), state

    sums, weights = total
    learned, state = jax.vmap(one)(learned, state, weights, gradient, fixed)
    return learned, state, sums / weights


@functools.partial(jax.jit, static_argnums=0)
def _finish(method: Method, learned: Learned, fixed: Subspace) -> Subspace:
    return jax.vmap(lambda own, given: method.subspace(own, given, np.float32(0)))(learned, fixed)
