"""Differentiates a recorded run at hook points, block by block from the last to the first.

Each block is run again from the residual stream that entered it, and pulls the gradients of the final stream back
through itself. So one block's intermediate values exist at a time, and equal-shaped layers share one program.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tljax.config import HookedTransformerConfig
from tljax.forward.forward import block_stage, embedding_stage, run_forward
from tljax.forward.stages import Stage, run_stage
from tljax.hooks.dictionary import HookDictionary, HookEntry
from tljax.hooks.interventions import Add, Replace, Scale, Zero
from tljax.hooks.point import HookPoint, HookSlot
from tljax.hooks.points import layer_of, stage_of
from tljax.model.hooked_transformer import HookedTransformer
from tljax.modules.activations import activation
from tljax.modules.context import AttentionContext
from tljax.numerics import widened
from tljax.patching.engine.base_run import BaseRun
from tljax.patching.engine.site_by_site import refuse_late_hooks
from tljax.typing import Params

_OUTPUTS = ("hook_attn_out", "hook_mlp_out")


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A run, as the residual streams from which it is differentiated.

    Attributes:
        cfg, params: the model.
        tokens, context: as in :class:`~tljax.patching.engine.base_run.BaseRun`.
        hooks: the hooks of the run.
        streams: for each layer that was run, the stream entering it, before any hook, ``[batch, padded_pos, d_model]``.
        final: the stream leaving the last layer.
    """

    cfg: HookedTransformerConfig
    params: Params
    tokens: np.ndarray
    context: AttentionContext
    hooks: HookDictionary
    streams: Mapping[int, jax.Array]
    final: jax.Array


def trajectory_of(model: HookedTransformer, base: BaseRun) -> Trajectory:
    """Returns the trajectory of a recorded run. Only a model that carries hooks runs again.

    Raises:
        InputError: a hook sits at the final norm or the unembedding, which a sweep leaves out.
    """
    refuse_late_hooks(model)
    if model._hooks.entries:
        return follow(model, base)
    streams = {layer: base.residual(layer) for layer in range(model.cfg.n_layers)}
    return Trajectory(model.cfg, model.params, base.tokens, base.context, HookDictionary(), streams, base.final)


def follow(
    model: HookedTransformer,
    base: BaseRun,
    entries: Sequence[HookEntry] = (),
    start: int | None = None,
    stream: Any = None,
) -> Trajectory:
    """Runs the prompts of ``base`` with more hooks, after those that the model carries.

    Args:
        model, base: the model and the run with its prompts.
        entries: the hooks.
        start: the first layer to run; ``None`` starts at the tokens.
        stream: the residual stream entering it, ``[batch, padded_pos, d_model]``.
    """
    cfg, streams = model.cfg, {}
    hooks = HookDictionary((*model._hooks.entries, *entries))

    def run(value: Any, first: int | None, last: int) -> jax.Array:
        return run_forward(cfg, model.params, value, base.context, hooks=hooks, start=first, stop=last)[0]

    if start is None:
        stream = run(base.tokens, None, 0)
    for layer in range(start or 0, cfg.n_layers):
        streams[layer] = stream
        stream = run(stream, layer, layer + 1)
    return Trajectory(cfg, model.params, base.tokens, base.context, hooks, streams, stream)


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation ``f(x) = x φ(x)`` inside a block that is differentiated as if ``φ`` were constant.

    Where it gates a linear branch, each of the two factors gets half of the product's gradient.

    Attributes:
        pre: the point before it.
        post: the point after it, and after the product.
        function: the config's ``act_fn``.
        linear: the point of the linear branch; ``None`` if it gates nothing.
    """

    pre: str
    post: str
    function: str
    linear: str | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """The points that the activation reads."""
        return (self.pre,) if self.linear is None else (self.pre, self.linear)

    def pull_back(self, gradient: jax.Array, values: Mapping[str, jax.Array], post: jax.Array) -> dict[str, jax.Array]:
        """Returns the gradients at the points it reads, from that at ``post`` and the values of all."""
        pre = values[self.pre]
        at_zero = 0.0 if self.function in ("relu", "relu2") else 0.5  # the limit of f(x) / x

        def factor(value: jax.Array) -> jax.Array:
            return jnp.where(pre == 0, jnp.asarray(at_zero, pre.dtype), value / jnp.where(pre == 0, 1, pre))

        if self.linear is None:
            return {self.pre: gradient * factor(post)}
        gate = activation(self.function)(pre)
        half = gradient / 2
        return {self.pre: half * factor(gate) * values[self.linear], self.linear: half * gate}


@dataclasses.dataclass(frozen=True)
class BlockRule:
    """What a rule changes in the backward pass of one block.

    Attributes:
        constants: points whose values count as constants.
        activations: activation functions with a constant factor.
    """

    constants: tuple[str, ...] = ()
    activations: tuple[Activation, ...] = ()


def pull_back(
    run: Trajectory,
    cotangents: jax.Array,
    shapes: Mapping[str, tuple[int, ...]],
    rules: Mapping[int, BlockRule] | None = None,
    dropped: np.ndarray | None = None,
    top: int | None = None,
) -> Iterator[tuple[str, jax.Array]]:
    """Pulls gradients with respect to a residual stream back to hook points.

    Args:
        run: the run.
        cotangents: the gradients, ``[n, batch, padded_pos, d_model]``.
        shapes: the points, with their activations' shapes ``[batch, padded_pos, ...]``.
        rules: for each layer, what a rule changes.
        dropped: ``[n]``: a layer for each of the gradients, through whose outputs it does not flow.
        top: the layer whose entering stream the gradients belong to; ``None`` is the final stream.

    Yields:
        Each point and the gradients there, ``[n, batch, padded_pos, ...]``, from the last layer down.
    """
    by_stage: dict[int | None, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        by_stage.setdefault(layer_of(name), {})[stage_of(name)[1]] = shape
    lowest = -1 if None in by_stage else min(number for number in by_stage if number is not None)
    for layer in reversed(range(max(lowest, 0), run.cfg.n_layers if top is None else top)):
        stage, inputs = block_stage(run.cfg, run.params, run.context, run.hooks, layer)
        points, rule = by_stage.get(layer, {}), (rules or {}).get(layer, BlockRule())
        factors = None if dropped is None else (dropped != layer).astype(np.float32)
        plan = Plan(stage.module, tuple(points.items()), rule)
        inputs = (run.streams[layer], *inputs)
        cotangents, gradients = _pull(plan, stage.variables, stage.slots, inputs, cotangents, factors)
        yield from ((stage.prefix + name, gradients[name]) for name in points)
    if lowest < 0:
        stage, inputs = embedding_stage(run.cfg, run.params, run.context, run.hooks)
        plan = Plan(stage.module, tuple(by_stage[None].items()), BlockRule())
        yield from _pull_to_points(plan, stage.variables, stage.slots, (run.tokens, *inputs), cotangents).items()


def pull_from_points(
    run: Trajectory, layer: int, cotangents: Mapping[str, jax.Array], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, jax.Array]]:
    """Pulls gradients with respect to points inside one block back to hook points.

    Args:
        run: the run. What its hooks put at these very points in place of the model's values has no gradient.
        layer: the block.
        cotangents: the gradients at points of the block, by full name, ``[n, batch, padded_pos, ...]``.
        shapes: the points to pull back to, as in :func:`pull_back`, in this block or before it.

    Yields:
        Each point and the gradients there, from the block down; zeros at points that do not come before.
    """
    stage, inputs = block_stage(run.cfg, run.params, run.context, run.hooks, layer)
    here = {stage_of(name)[1]: shape for name, shape in shapes.items() if layer_of(name) == layer}
    plan = Plan(stage.module, tuple(here.items()), BlockRule())
    named = {stage_of(name)[1]: gradients for name, gradients in cotangents.items()}
    back, gradients = _pull_captured(plan, stage.variables, stage.slots, (run.streams[layer], *inputs), named)
    yield from ((stage.prefix + name, gradients[name]) for name in here)
    if below := {name: shape for name, shape in shapes.items() if layer_of(name) != layer}:
        yield from pull_back(run, back, below, top=layer)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a program that pulls gradients back through one stage depends on, besides shapes and hooks.

    Attributes:
        module: the stage's module.
        points: the points to differentiate at, with their shapes.
        rule: what a rule changes.
    """

    module: nn.Module
    points: tuple[tuple[str, tuple[int, ...]], ...]
    rule: BlockRule


Slots = dict[str, HookSlot]


@functools.partial(jax.jit, static_argnums=0)
def _pull(
    plan: Plan,
    variables: Mapping[str, Params],
    slots: Slots,
    inputs: tuple[Any, ...],
    cotangents: jax.Array,
    factors: jax.Array | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Pulls ``[n, batch, pos, d_model]`` back through a block, to its input and its points."""
    slots = _with(slots, plan.rule.constants, backward=Zero())
    stream, *others = inputs
    zeros = {name: jnp.zeros(shape, widened(cotangents.dtype)) for name, shape in plan.points}
    activations = plan.rule.activations
    read = tuple(dict.fromkeys(name for act in activations for name in act.reads))

    def outputs(slots: Slots, stream: jax.Array, names: tuple[str, ...]) -> tuple[jax.Array, dict[str, jax.Array]]:
        return run_stage(Stage(plan.module, variables, "", names, slots), (stream, *others), traced=True)

    written = [act.post for act in activations]
    bare = {name: slot for name, slot in slots.items() if name not in written}
    posts = outputs(bare, stream, tuple(written))[1] if activations else {}

    def pulled(cotangent: jax.Array, factor: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        here = slots if factor is None else _with(slots, _OUTPUTS, backward=Scale(factor))

        def run(stream: jax.Array, offsets: dict[str, jax.Array], posts: dict[str, jax.Array]) -> Any:
            replaced = functools.reduce(lambda to, n: _with(to, (n,), first=Replace(posts[n])), posts, here)
            return outputs(_adding(replaced, offsets), stream, read)

        (_, values), pull = jax.vjp(run, stream, zeros, posts)
        back, gradients, through = pull((cotangent, jax.tree.map(jnp.zeros_like, values)))
        if activations:
            passed: dict[str, jax.Array] = {}
            for act in activations:
                passed |= act.pull_back(through[act.post], values, posts[act.post])
            back, gradients, _ = pull((cotangent, passed))
        return back, gradients

    if factors is None:
        return jax.vmap(lambda cotangent: pulled(cotangent, None))(cotangents)
    return jax.vmap(pulled)(cotangents, factors)


@functools.partial(jax.jit, static_argnums=0)
def _pull_to_points(
    plan: Plan, variables: Mapping[str, Params], slots: Slots, inputs: tuple[Any, ...], cotangents: jax.Array
) -> dict[str, jax.Array]:
    """Pulls gradients back through the embedding, to its points."""
    zeros = {name: jnp.zeros(shape, widened(cotangents.dtype)) for name, shape in plan.points}

    def run(offsets: dict[str, jax.Array]) -> jax.Array:
        stage = Stage(plan.module, variables, "", (), _adding(slots, offsets))
        return run_stage(stage, inputs, traced=True)[0]

    return jax.vmap(lambda cotangent: jax.vjp(run, zeros)[1](cotangent)[0])(cotangents)


@functools.partial(jax.jit, static_argnums=0)
def _pull_captured(
    plan: Plan,
    variables: Mapping[str, Params],
    slots: Slots,
    inputs: tuple[Any, ...],
    cotangents: Mapping[str, jax.Array],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Pulls gradients at some points of a block, ``[n, batch, pos, ...]``, back to its input and to other points."""
    stream, *others = inputs
    zeros = {name: jnp.zeros(shape, widened(stream.dtype)) for name, shape in plan.points}

    def run(stream: jax.Array, offsets: dict[str, jax.Array]) -> dict[str, jax.Array]:
        stage = Stage(plan.module, variables, "", tuple(cotangents), _adding(slots, offsets))
        return run_stage(stage, (stream, *others), traced=True)[1]

    values, pull = jax.vjp(run, stream, zeros)
    return jax.vmap(lambda given: pull({name: given[name].astype(values[name].dtype) for name in given}))(cotangents)


def _adding(slots: Slots, offsets: Mapping[str, jax.Array]) -> Slots:
    return functools.reduce(lambda to, name: _with(to, (name,), last=Add(offsets[name])), offsets, slots)


def _with(slots: Slots, names: Sequence[str], *, first: Any = None, last: Any = None, backward: Any = None) -> Slots:
    """Returns slots with one more intervention at some points: before or after the others, or on the gradient."""
    changed = dict(slots)
    for name in names:
        slot = changed.get(name, HookSlot(HookPoint(name)))
        forward = (*((first,) if first is not None else ()), *slot.forward, *((last,) if last is not None else ()))
        on_gradient = slot.backward if backward is None else (backward, *slot.backward)
        changed[name] = dataclasses.replace(slot, forward=forward, backward=on_gradient)
    return changed
