"""The compiled parts of an interchange, from the residual stream entering a layer to task logits.

Each part is a program of its own: taking pairs, the block in which sites interchange (all sites of a layer by
    ``vmap``), a later block forward, the same backward, the answer. A block does not know its index, so layers share
    them, and so do positions, heads, ranks, seeds and models of one architecture.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tljax.config import HookedTransformerConfig
from tljax.forward.forward import context_of_layer, embed_positions
from tljax.hooks.interchanges import as_long_as
from tljax.hooks.intervention import Intervention
from tljax.hooks.point import HookPoint, HookSlot, apply_with_slots
from tljax.interchange.pairs import InterchangePairs, TaskLogits, entries_of
from tljax.interchange.sites import AtLayer, Point, rows_of
from tljax.model.hooked_transformer import HookedTransformer
from tljax.model.losses import log_probabilities
from tljax.modules.context import AttentionContext
from tljax.modules.stack import block_module, embedding_module
from tljax.numerics import matmul_precision, widened
from tljax.patching.metrics.lazy_logits import LazyLogits
from tljax.patching.metrics.reads import unembed
from tljax.text.inputs import prepare
from tljax.typing import Params


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an interchange's programs are compiled for.

    Attributes:
        cfg: the model's config.
        relative: the point's name within a block.
        axes: the point's axes.
        n_heads: size of its axis of heads; ``None`` without one.
        task: a function from logits to task logits; ``None`` reads the classes at one position.
    """

    cfg: HookedTransformerConfig
    relative: str
    axes: tuple[str, ...]
    n_heads: int | None
    task: TaskLogits | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Pairs on the device, for the sites of one layer.

    Attributes:
        stream: residual stream of the base runs entering the layer, ``[pair, pos, d_model]``.
        sources: source activations, ``[pair, source_pos, (head,) d]``.
        context: positions and mask of the base prompts.
        read: array entry of the position of the answer, ``[pair]``.
        targets: ``[pair]``.
        weights: how much each pair counts in the loss, ``[pair]``.
    """

    stream: jax.Array
    sources: jax.Array
    context: AttentionContext
    read: Any
    targets: Any
    weights: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Site:
    """Sites within a layer.

    Attributes:
        base: array entry of the position in each base prompt, ``[site, pair]``.
        source: the same in the source prompts.
        head: the head, int32 ``[site]``; 0 without heads.
        seed: number of the seed, int32 ``[site]``, which chooses the order of pairs.
    """

    base: Any
    source: Any
    head: Any
    seed: Any

    def __len__(self) -> int:
        return len(self.head)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """Some pairs of each site, as the programs take them.

    Attributes:
        stream: residual stream entering the layer, ``[site, pair, pos, d_model]``.
        source: the source's vector, ``[site, pair, d]``.
        place: array entry to interchange, ``[site, pair]``.
        head: ``[site]``.
        context: positions and mask, ``[site, pair, pos]``; a program that is given it apart needs none.
        read, targets, weights: ``[site, pair]``.
    """

    stream: jax.Array
    source: jax.Array
    place: jax.Array
    head: jax.Array
    context: Any
    read: jax.Array
    targets: jax.Array
    weights: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Subspace:
    """The coordinates that an interchange sets, of one site or of ``[site, ...]``.

    Attributes:
        columns: orthonormal, ``[d, n]``; ``None`` means the activation's own coordinates.
        gate: how far each is open, ``[n]``.
    """

    columns: Any
    gate: Any


@dataclasses.dataclass(frozen=True)
class Block:
    """A block as the programs take it: static module, and its parameters and context as data."""

    module: nn.Module
    params: Params
    context: AttentionContext


class _Moved(Intervention):
    """Moves towards a source along gated columns, along everything, or as far as that in a random subspace.

    One structure for fits and their controls, so that one program runs them all: with ``whole`` 1 and closed gates the
    vector is swapped, with a non-zero ``placebo`` it is :class:`~tljax.interchange.NormMatchedPlacebo`.
    """

    arrays = ("source", "columns", "gate", "whole", "placebo", "strength")

    def transform(self, value: jax.Array, hook: HookPoint) -> jax.Array:
        own: Any = self
        wide = widened(value.dtype)
        difference = own.source.astype(wide) - value.astype(wide)
        with jax.default_matmul_precision("highest"):
            coordinates = difference if own.columns is None else difference @ own.columns
            coordinates = coordinates * own.gate.reshape((1,) * (value.ndim - 1) + own.gate.shape)
            moved = coordinates if own.columns is None else coordinates @ own.columns.T
            if own.whole is not None:
                moved = moved + own.whole * difference
            if own.placebo is not None:
                random = as_long_as(moved, (difference @ own.placebo) @ own.placebo.T)
                moved = jnp.where((own.placebo != 0).any(), random, moved)
        return value.astype(wide) + own.strength.astype(wide) * moved


def make_plan(model: HookedTransformer, pairs: InterchangePairs, point: Point) -> Plan:
    """Returns what the programs of these pairs at a point are compiled for."""
    task = pairs.task_logits if callable(pairs.task_logits) else None
    return Plan(model.cfg.computation, point.relative, point.spec.axes, point.n_heads, task)


def make_ends(model: HookedTransformer, pairs: InterchangePairs) -> Params:
    """Returns the parameters of the final norm and the unembedding, of the latter only the classes' columns."""
    ends = {"ln_final": model.params.get("ln_final", {}), "unembed": model.params["unembed"]}
    if isinstance(pairs.task_logits, np.ndarray):
        own, ids = ends["unembed"], jnp.asarray(pairs.task_logits)
        ends["unembed"] = own | {"W_U": own["W_U"][:, ids], "b_U": own["b_U"][ids]}
    return ends


def make_rows(model: HookedTransformer, pairs: InterchangePairs, at: AtLayer) -> Rows:
    """Puts pairs on the device."""
    context = AttentionContext.of(prepare(model.cfg, model._tokenizer, pairs.base))
    arrays = (entries_of(pairs.base.mask, pairs.read_pos), pairs.targets, np.ones(len(pairs), np.float32))
    return Rows(at.stream, at.sources, rows_of(context, slice(None)), *jax.device_put(arrays))


@functools.partial(jax.jit, static_argnums=0)
def take(plan: Plan, rows: Rows, sites: Site, taken: jax.Array) -> Part:
    """Takes pairs ``taken`` ``[site, pair]`` of each site; number -1 is a filler of weight 0."""

    def one(base: jax.Array, source: jax.Array, head: jax.Array, own: jax.Array) -> Part:
        vectors = rows.sources[own, source[own]]  # [pair, (head,) d]
        return Part(
            rows.stream[own], vectors if plan.n_heads is None else vectors[:, head], base[own], head,
            rows_of(rows.context, own), rows.read[own], rows.targets[own], jnp.where(own >= 0, rows.weights[own], 0),
        )  # fmt: skip

    return jax.vmap(one)(sites.base, sites.source, sites.head, taken)


def block_of(model: HookedTransformer, layer: int, part: Part) -> Block:
    """Returns a block and its context, for pairs ``[site, pair]``."""
    context = context_of_layer(model.cfg, part.context, layer)
    if model.cfg.positional_embedding_type == "shortformer":
        places = embed_positions(
            embedding_module(model.cfg), model.params["pos_embed"], _flat(part.stream), flattened(part.context)
        )
        context = dataclasses.replace(context, pos_embed=places.reshape(part.stream.shape))
    return Block(block_module(model.cfg, layer), model.params["blocks"][layer], context)


def _flat(array: Any) -> Any:
    return array.reshape(-1, *array.shape[2:])


def flattened(context: AttentionContext) -> AttentionContext:
    """Returns the context of ``[site, pair]`` as that of one batch."""
    parts = {name: getattr(context, name) for name in ("positions", "token_mask", "pos_embed")}
    flat = {name: None if value is None else _flat(value) for name, value in parts.items()}
    return dataclasses.replace(context, **flat)


def run_block(module: Any, params: Params, context: AttentionContext, stream: jax.Array, slots: Any = None) -> Any:
    """Runs a block of any index on ``[batch, pos, d_model]``."""
    with matmul_precision(module.cfg):
        return apply_with_slots(module, {"params": params}, slots or {}, stream, context)[0]


def interchange_block(
    plan: Plan, module: Any, params: Params, context: AttentionContext, part: Part, subspaces: Subspace, strength: Any,
    whole: Any = None, placebo: Any = None,
) -> jax.Array:  # fmt: skip
    """Runs the block in which every site interchanges; returns ``[site * pair, pos, d_model]``.

    Args:
        plan, module, params, context: the block.
        part: the pairs.
        subspaces: ``[site, ...]``.
        strength: a scalar.
        whole: 1 for sites that set the whole vector, ``[site]``.
        placebo: columns of a random subspace, ``[site, d, k]``; zeros for sites that run no placebo.
    """

    leaves, structure = jax.tree.flatten(context)

    def one(own: Part, in_context: list[Any], subspace: Subspace, each: Any, random: Any) -> jax.Array:
        mask = jnp.arange(own.stream.shape[1])[None] == own.place[:, None]  # [pair, pos]
        source, mask = own.source[:, None], mask[:, :, None]
        if plan.n_heads is not None:
            is_head = (jnp.arange(plan.n_heads) == own.head)[None, None, :, None]
            source, mask = source[:, None], mask[..., None] & is_head
        moved = _Moved.stored({
            "source": source, "columns": subspace.columns, "gate": subspace.gate, "whole": each, "placebo": random,
            "strength": strength, "mask": mask.astype(jnp.float32),
        }, ())  # fmt: skip
        slot = HookSlot(HookPoint(plan.relative, plan.axes), (moved,))
        return run_block(module, params, jax.tree.unflatten(structure, in_context), own.stream, {plan.relative: slot})

    in_context = [0 if jnp.ndim(leaf) > 1 else None for leaf in leaves]  # the layer's divisor has no site
    without_context = dataclasses.replace(part, context=None)
    axes = (0, in_context, 0, None if whole is None else 0, None if placebo is None else 0)
    return _flat(jax.vmap(one, axes)(without_context, leaves, subspaces, whole, placebo))


_interchange = jax.jit(interchange_block, static_argnums=(0, 1))
forward = jax.jit(run_block, static_argnums=0)
"""A later block: module, parameters, context, stream ``[batch, pos, d_model]``."""


@functools.partial(jax.jit, static_argnums=0)
def backward(
    module: Any, params: Params, context: AttentionContext, stream: jax.Array, gradient: jax.Array
) -> jax.Array:
    """Takes a gradient back through a block, which runs forward again, so that blocks keep their inputs alone."""
    return jax.vjp(functools.partial(run_block, module, params, context), stream)[1](gradient)[0]


def task_logits(plan: Plan, ends: Params, stream: jax.Array, read: jax.Array) -> jax.Array:
    """Computes task logits ``[batch, class]`` of the final stream, at the positions ``read`` ``[batch]``."""
    if plan.task is not None:
        return jnp.asarray(plan.task(LazyLogits(plan.cfg, ends, stream)))
    return unembed(plan.cfg, ends, stream[jnp.arange(len(read)), read])


def losses_of(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes the cross entropy of each target, in nats, ``[batch]``."""
    return -jnp.take_along_axis(log_probabilities(logits), targets[:, None], axis=-1)[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 4))
def _answer(plan: Plan, ends: Params, stream: jax.Array, part: Part, keep: bool) -> tuple[Any, Any, Any]:
    logits = task_logits(plan, ends, stream, _flat(part.read))
    losses = losses_of(logits, _flat(part.targets))
    found = (logits.argmax(axis=-1), losses, logits if keep else None)
    return jax.tree.map(lambda each: each.reshape(*part.read.shape, *each.shape[1:]), found)


def evaluate(
    plan: Plan,
    model: HookedTransformer,
    ends: Params,
    layer: int,
    part: Part,
    subspaces: Subspace,
    strength: Any,
    whole: Any,
    placebo: Any,
    keep: bool = False,
) -> tuple[Any, Any, Any]:
    """Runs interchanges at sites of a layer.

    Returns:
        The answers ``[site, pair]``, their losses ``[site, pair]``, and the task logits ``[site, pair, class]`` or
        ``None``.
    """
    block = block_of(model, layer, part)
    stream = _interchange(
        plan, block.module, block.params, block.context, part, subspaces, strength, whole, placebo
    )  # fmt: skip
    for later in later_blocks(model, layer, part):
        stream = forward(later.module, later.params, later.context, stream)
    return _answer(plan, ends, stream, part, keep)


def later_blocks(model: HookedTransformer, layer: int, part: Part) -> Sequence[Block]:
    """Returns the blocks after a layer, with the context of all sites' pairs as one batch."""
    blocks = [block_of(model, later, part) for later in range(layer + 1, model.cfg.n_layers)]
    return [dataclasses.replace(block, context=flattened(block.context)) for block in blocks]


def bytes_per_pair(cfg: HookedTransformerConfig, length: int, layer: int) -> int:
    """Estimates the bytes of one pair at one site: its streams from ``layer`` on, and one block's activations."""
    streams = (cfg.n_layers - layer + 4) * cfg.d_model
    block = 12 * cfg.d_model + 8 * cfg.n_heads * cfg.d_head + 6 * (cfg.d_mlp or 0) + 4 * cfg.n_heads * length
    return length * (streams + block) * max(cfg.jnp_dtype.itemsize, 4)
