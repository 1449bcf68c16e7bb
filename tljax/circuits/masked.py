"""The forward pass of a circuit: each reader gets its own input, in which absent edges carry a replacement.

A reader's input is the residual stream of this very run plus, for each writer ``u`` whose edge to it is absent,
``r[u] - a[u]``: ``r[u]`` is the replacement, ``a[u]`` what ``u`` writes in this run. All masks run together, layer by
layer; one compiled program serves every layer of a kind.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import is_traced
from tljax.circuits.graph import ResidualGraph
from tljax.circuits.writers import EXPERTS, HEADS, mlp_outputs, outputs_by_head
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.forward.forward import context_of_layer, embed_positions, run_forward
from tljax.hooks.dictionary import HookDictionary
from tljax.hooks.interventions import Add, Replace
from tljax.hooks.point import HookPoint, HookSlot, apply_with_slots
from tljax.memory import batch_budget
from tljax.modules.context import AttentionContext
from tljax.modules.stack import block_module, embedding_module
from tljax.numerics import matmul_precision
from tljax.typing import Params

_HEADS = ("batch", "pos", "head", "d_head")
_RESID = ("batch", "pos", "d_model")


_CPU_BYTES = 24 * 2**20
"""Bytes of intermediate results that a block may make on a CPU. The C library takes larger arrays (32 MB) from the
operating system anew each time, and touching them for the first time costs more than computing them."""


_GROUPS = 4
"""Into how many groups layers are cut. A block reads what writers lack up to the end of its layer's group: there is a
program for each group, and not for each layer."""


class _State(NamedTuple):
    """A run of several masks on the same prompts, between two blocks.

    Attributes:
        stream: residual stream, ``[mask * batch, pos, d_model]``.
        lacking: what absent edges add, ``r[u] - a[u]``, ``[mask, writer, batch, pos, d_model]``; any finite numbers
            for those that have not run yet, because no edge leads from them to what has run.
        combined: in models with norms after attention, the heads' sum and ``b_O`` of each layer, ``[mask, layer, batch,
            pos, d_model]``; otherwise ``None``.
    """

    stream: jax.Array
    lacking: jax.Array
    combined: jax.Array | None = None


def masked_stream(
    cfg: HookedTransformerConfig,
    params: Params,
    graph: ResidualGraph,
    value: Any,
    context: AttentionContext,
    masks: Any,
    replacement: Any,
    *,
    start: int = 0,
    lacking: Any = None,
) -> jax.Array:
    """Runs circuits, and returns the residual stream that the logits read.

    Differentiable with respect to ``params``, ``masks`` and ``replacement``.

    Args:
        cfg, params: the model.
        graph: its graph.
        value: token ids ``[batch, pos]``; with ``start``, the residual stream entering that layer.
        context: positions and padding.
        masks: ``[mask, batch or 1, pos or 1, writer, reader]``: 1 where an edge is present, 0 where it carries the
            replacement; numbers in between mix both. Entries that are no edges do not matter.
        replacement: ``[batch or 1, pos or 1, writer, d_model]``, in the units of
            :func:`~tljax.circuits.writers.outputs_of`.
        start: first layer to run; edges to readers below it must be present.
        lacking: with ``start``, ``r[u] - a[u]`` of the writers below it, ``[batch, pos, writer, d_model]``.

    Returns:
        ``[mask, batch, pos, d_model]``.
    """
    replacement = jnp.moveaxis(jnp.asarray(replacement, cfg.jnp_dtype), 2, 0)
    stream, context, known = _begin(cfg, params, value, context, replacement, start, lacking)
    prompts = _Prompts(graph, stream, context, known, replacement, _post_norms(cfg, params), start)
    if is_traced(masks, params, stream, replacement):
        masks = jnp.asarray(masks)
        return _run_masks(cfg, params, prompts, masks, _start(cfg, prompts, len(masks)), _block)[0]
    masks = np.asarray(masks)
    n_prompts, n_masks = _at_once(cfg, graph, stream, len(masks))
    streams = []
    for row in range(0, len(stream), n_prompts):
        rows = np.arange(row, row + n_prompts).clip(max=len(stream) - 1)  # the last is repeated: one compiled size
        some, of_rows, parts = prompts.take(rows), masks if masks.shape[1] == 1 else masks[:, rows], []
        state = _start(cfg, some, n_masks)
        for first in range(0, len(masks), n_masks):
            numbers = np.arange(first, first + n_masks).clip(max=len(masks) - 1)
            run, state = _run_masks(cfg, params, some, of_rows[numbers], state, _block_in_place)
            parts.append(run[: len(masks) - first])
        streams.append(jnp.concatenate(parts)[:, : len(stream) - row])
    return jnp.concatenate(streams, axis=1)


def _at_once(cfg: HookedTransformerConfig, graph: ResidualGraph, stream: jax.Array, n_masks: int) -> tuple[int, int]:
    """Returns how many prompts and how many masks run together."""
    batch, length, width = stream.shape
    device = next(iter(stream.devices()))
    per_token = width * cfg.jnp_dtype.itemsize
    held, made = graph.n_writers * per_token, 7 * (graph.n_readers // graph.n_layers) * per_token // 2
    tokens = batch_budget(device) // (held + made)
    if device.platform == "cpu":
        tokens = min(tokens, _CPU_BYTES // made)
    prompts, masks = max(1, min(batch, tokens // length)), max(1, min(n_masks, tokens // (batch * length)))
    return -(-batch // -(-batch // prompts)), -(-n_masks // -(-n_masks // masks))  # chunks of equal size


@dataclasses.dataclass(frozen=True)
class _Prompts:
    """What all masks of a run share.

    Attributes:
        graph: the model's graph.
        stream: the stream entering block ``start``, ``[batch, pos, d_model]``.
        context: positions and padding.
        known: what the writers before ``start`` lack, ``[writer, batch, pos, d_model]``.
        replacement: ``[writer, batch or 1, pos or 1, d_model]``.
        norms: parameters of the norms after attention, stacked over layers.
        start: the first block to run.
    """

    graph: ResidualGraph
    stream: jax.Array
    context: AttentionContext
    known: jax.Array
    replacement: jax.Array
    norms: Params | None
    start: int

    def take(self, rows: np.ndarray) -> "_Prompts":
        """Returns some of the prompts."""

        def of_rows(array: Any, axis: int = 0) -> Any:
            return array if array is None or array.shape[axis] == 1 else jnp.take(array, rows, axis=axis)

        context = dataclasses.replace(
            self.context,
            positions=of_rows(self.context.positions),
            token_mask=of_rows(self.context.token_mask),
            pos_embed=of_rows(self.context.pos_embed),
            text=None,
        )
        return dataclasses.replace(
            self, stream=jnp.take(self.stream, rows, axis=0), context=context,
            known=jnp.take(self.known, rows, axis=1), replacement=of_rows(self.replacement, 1),
        )  # fmt: skip


def _run_masks(
    cfg: HookedTransformerConfig, params: Params, prompts: _Prompts, masks: Any, state: _State, block: Any
) -> tuple[jax.Array, _State]:
    """Runs some masks through all blocks.

    Args:
        cfg, params, prompts: the model and the prompts.
        masks: ``[mask, batch or 1, pos or 1, writer, reader]``.
        state: arrays of the right shapes, with what the writers before the first block lack: from :func:`_start`, or
            from other masks' run, whose memory is used again.
        block: the compiled block.

    Returns:
        What the logits read, ``[mask, batch, pos, d_model]``, and the state at the end.
    """
    graph, library = prompts.graph, np if isinstance(masks, np.ndarray) else jnp
    absent = library.where(library.asarray(graph.edges), 1 - masks.astype(cfg.jnp_dtype), 0).astype(cfg.jnp_dtype)
    state = state._replace(stream=jnp.tile(prompts.stream, (len(masks), 1, 1)))
    context = _repeat(prompts.context, len(masks), len(prompts.stream))
    for layer in range(prompts.start, cfg.n_layers):
        own, columns = graph.writers_of(layer), graph.readers_of(layer)
        own_to_mlp = None
        if not (graph.attn_only or graph.parallel_attn_mlp):
            own_to_mlp = absent[..., own.start : own.start + graph.n_heads, columns.stop - 1 : columns.stop]
        state = block(
            block_module(cfg, layer), _shape_of(graph, layer), params["blocks"][layer], prompts.norms, state,
            context_of_layer(cfg, context, layer), _without(absent[..., columns], own), prompts.replacement[own],
            own_to_mlp, np.int32(own.start), np.int32(layer),
        )  # fmt: skip
    last = absent[..., graph.readers_of(graph.n_layers)]
    return _final(block_module(cfg, 0), graph.n_heads, prompts.norms, state, last), state


def _without(absent: Any, own: slice) -> Any:
    """Returns the absent edges into a layer with those of its own writers left out: these have not run yet."""
    before = np.arange(absent.shape[3]) < own.start
    return (np if isinstance(absent, np.ndarray) else jnp).where(before[:, None], absent, 0).astype(absent.dtype)


def _shape_of(graph: ResidualGraph, layer: int) -> "_LayerShape":
    """Returns what a block's program depends on besides the block: equal for layers that share programs."""
    experts = graph.experts[layer] if graph.experts else 0
    size = -(-graph.n_layers // _GROUPS)
    layers = min((layer // size + 1) * size, graph.n_layers)
    return _LayerShape(graph.n_heads, not graph.attn_only, experts, layers, graph.writers_of(layers - 1).stop)


class _LayerShape(NamedTuple):
    """What a block's program depends on besides the block.

    Attributes:
        n_heads, has_mlp, experts: heads of the layer, whether it has an MLP, how many of its experts are writers.
        layers, writers: how many layers and writers the block reads: those up to the end of the layer's group.
    """

    n_heads: int
    has_mlp: bool
    experts: int
    layers: int
    writers: int


def _begin(
    cfg: HookedTransformerConfig,
    params: Params,
    value: Any,
    context: AttentionContext,
    replacement: jax.Array,
    start: int,
    lacking: Any,
) -> tuple[jax.Array, AttentionContext, jax.Array]:
    """Returns the stream before the first block to run, the context, and what is lacking there ``[writer, ...]``."""
    if start and cfg.has_norms_after:
        raise InputError("A run of a circuit of a model with norms after attention starts at the tokens.")
    if start:
        stream = jnp.asarray(value)
        known = jnp.moveaxis(jnp.asarray(lacking, stream.dtype), 2, 0)
    else:
        names = ("hook_embed",)
        stream, seen = run_forward(cfg, params, value, context, hooks=HookDictionary(), names=names, stop=0)
        known = (replacement[:1] - seen["hook_embed"][None]).astype(stream.dtype)
    if cfg.positional_embedding_type == "shortformer" and context.pos_embed is None:
        placed = embed_positions(embedding_module(cfg), params["pos_embed"], stream, context)
        context = dataclasses.replace(context, pos_embed=placed)
    return stream, context, known


def _start(cfg: HookedTransformerConfig, prompts: _Prompts, n_masks: int) -> _State:
    """Returns the state of ``n_masks`` copies of the prompts' run that are about to enter block ``start``."""
    known, (batch, length, width) = prompts.known, prompts.stream.shape
    lacking = jnp.zeros((n_masks, prompts.graph.n_writers, batch, length, width), known.dtype)
    combined = None
    if cfg.has_norms_after:
        combined = jnp.zeros((n_masks, cfg.n_layers, batch, length, width), known.dtype)
    return _State(jnp.tile(prompts.stream, (n_masks, 1, 1)), lacking.at[:, : len(known)].set(known[None]), combined)


def _repeat(context: AttentionContext, times: int, batch: int) -> AttentionContext:
    """Returns the context of ``times`` copies of the prompts."""

    def repeated(array: Any) -> Any:
        if array is None or array.shape[0] == 1 != batch:
            return array
        return jnp.tile(array, (times, *(1,) * (array.ndim - 1)))

    return dataclasses.replace(
        context,
        positions=repeated(context.positions),
        token_mask=repeated(context.token_mask),
        pos_embed=repeated(context.pos_embed),
        text=None,
    )


def _post_norms(cfg: HookedTransformerConfig, params: Params) -> Params | None:
    """Returns the parameters of the norms after attention, stacked over layers; ``None`` if the model has none."""
    if not cfg.has_norms_after:
        return None
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(block["ln1_post"] for block in params["blocks"]))


def _run_block(
    module: Any,
    shape: _LayerShape,
    params: Params,
    norms: Params | None,
    state: _State,
    context: AttentionContext,
    absent: jax.Array,
    replacement: jax.Array,
    own_to_mlp: jax.Array | None,
    first: jax.Array,
    layer: jax.Array,
) -> _State:
    """Runs one block of all masks.

    Args:
        module, shape: the block, and what else its program depends on.
        params, norms: its parameters, and those of the norms after attention of all layers.
        state: the run so far.
        context: positions and padding.
        absent: ``[mask, batch or 1, pos or 1, writer, reader of the layer]``, 0 for writers that have not run yet.
        replacement: ``[writer of the layer, batch or 1, pos or 1, d_model]``.
        own_to_mlp: ``[mask, batch or 1, pos or 1, head, 1]``, the absent edges from the block's heads to its MLP;
            ``None`` if there are no such edges.
        first, layer: number of the layer's first writer, and of the layer.
    """
    cfg, heads = module.cfg, shape.n_heads
    variables = {"params": params}
    combined = None if state.combined is None else state.combined[:, : shape.layers]
    known = _State(state.stream, state.lacking[:, : shape.writers], combined)
    reached = jax.tree.map(lambda leaf: leaf[: shape.layers], norms)
    lacks = corrections(module, reached, known, absent[..., : shape.writers, :], heads)
    read, slots = _by_reader(lacks[:, : lacks.shape[1] - shape.has_mlp]) + state.stream[None], {}
    with matmul_precision(cfg):
        heads_read: Any = module.apply(variables, read, context, method="read_apart")
    for letter, value in heads_read.items():
        slots[f"attn.hook_{letter}"] = HookSlot(HookPoint(f"hook_{letter}", _HEADS), (Replace(value),))
    slots[HEADS] = HookSlot(HookPoint(HEADS), captured=True)
    with matmul_precision(cfg):
        attn_out, seen = apply_with_slots(module, variables, slots, state.stream, context, method="attention_branch")
    results = outputs_by_head(cfg, params["attn"]["W_O"], seen[HEADS])
    own = _lacking_of(replacement[:heads], results, len(lacks))
    state, before = _wrote(state, own, first), state
    whole = None
    if state.combined is not None:
        summed = results.sum(axis=0) + params["attn"]["b_O"][None, None]
        whole = summed.reshape(_masked_shape(summed, len(lacks)))[:, None]
        state = state._replace(combined=jax.lax.dynamic_update_slice(state.combined, whole, (0, layer, 0, 0, 0)))
    if not shape.has_mlp:
        return state._replace(stream=before.stream + attn_out)
    stream, lack = before.stream, lacks[:, -1:]
    if own_to_mlp is not None:
        stream = stream + attn_out
        change = _contract(cfg, own_to_mlp, own)
        lack = lack + (change if whole is None else _change_of_norm(module, params["ln1_post"], whole, change))
    slots = {"hook_mlp_in": HookSlot(HookPoint("hook_mlp_in", _RESID), (Add(_by_reader(lack)[0]),))}
    if shape.experts:
        slots[EXPERTS] = HookSlot(HookPoint(EXPERTS), captured=True)
    with matmul_precision(cfg):
        mlp_out, seen = apply_with_slots(module, variables, slots, stream, method="mlp_branch")
    outputs = jnp.moveaxis(mlp_outputs(cfg, shape.experts, mlp_out, seen.get(EXPERTS)), 2, 0)
    state = _wrote(state, _lacking_of(replacement[heads:], outputs, len(lacks)), first + heads)
    return state._replace(stream=before.stream + attn_out + mlp_out)


_block = jax.jit(_run_block, static_argnums=(0, 1))
_block_in_place = jax.jit(_run_block, static_argnums=(0, 1), donate_argnums=4)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _final(module: Any, n_heads: int, norms: Params | None, state: _State, absent: jax.Array) -> jax.Array:
    lacks = corrections(module, norms, state, absent, n_heads)
    return state.stream.reshape(_masked_shape(state.stream, len(lacks))) + lacks[:, 0]


def corrections(module: Any, norms: Params | None, state: _State, absent: jax.Array, n_heads: int) -> jax.Array:
    """Computes what absent edges change in readers' inputs, ``[mask, reader, batch, pos, d_model]``.

    With norms after attention, a layer's heads are mixed before that norm, and the change is that of its output.
    """
    if state.combined is None:
        return _contract(module.cfg, absent, state.lacking)
    n_layers = state.combined.shape[1]
    own = (state.lacking.shape[1] - 1) // n_layers
    heads = np.append(False, np.tile(np.arange(own) < n_heads, n_layers))
    total = _contract(module.cfg, jnp.where(heads[:, None], 0, absent), state.lacking)

    def heads_by_layer(array: jax.Array, axis: int) -> jax.Array:
        array = jax.lax.slice_in_dim(array, 1, None, axis=axis)
        split = array.reshape(*array.shape[:axis], n_layers, own, *array.shape[axis + 1 :])
        return jnp.moveaxis(jax.lax.slice_in_dim(split, 0, n_heads, axis=axis + 1), axis, 0)

    def add_layer(total: jax.Array, of_layer: Any) -> tuple[jax.Array, None]:
        norm, absent, lacking, combined = of_layer
        change = _contract(module.cfg, absent, lacking)
        return total + _change_of_norm(module, norm, combined[:, None], change), None

    layers = norms, heads_by_layer(absent, 3), heads_by_layer(state.lacking, 1), jnp.moveaxis(state.combined, 1, 0)
    return jax.lax.scan(add_layer, total, layers)[0]


def _change_of_norm(module: Any, norm: Params, whole: jax.Array, change: jax.Array) -> jax.Array:
    """Returns the change of what attention adds when its combined heads ``whole`` change by ``change``."""

    def out(combined: jax.Array) -> Any:
        return module.apply({"params": {"ln1_post": norm}}, combined, method="attention_output")

    return out(whole + change) - out(whole)


def _contract(cfg: HookedTransformerConfig, absent: jax.Array, lacking: jax.Array) -> jax.Array:
    """Sums ``absent`` ``[mask, batch or 1, pos or 1, writer, reader]`` times ``lacking`` over writers."""
    kept = [letter for letter, size in zip("bt", absent.shape[1:3], strict=True) if size > 1]
    squeezed = absent.reshape(absent.shape[0], *(s for s in absent.shape[1:3] if s > 1), *absent.shape[3:])
    with matmul_precision(cfg):
        return jnp.einsum(f"m{''.join(kept)}fr,mfbtd->mrbtd", squeezed, lacking)


def _by_reader(correction: jax.Array) -> jax.Array:
    """Reshapes ``[mask, reader, batch, pos, d_model]`` to ``[reader, mask * batch, pos, d_model]``."""
    moved = jnp.moveaxis(correction, 1, 0)
    return moved.reshape(moved.shape[0], -1, *moved.shape[3:])


def _masked_shape(stream: jax.Array, n_masks: int) -> tuple[int, ...]:
    return n_masks, stream.shape[0] // n_masks, *stream.shape[1:]


def _lacking_of(replacement: jax.Array, outputs: jax.Array, n_masks: int) -> jax.Array:
    """Returns ``r[u] - a[u]``, ``[mask, writer, batch, pos, d_model]``, of outputs ``[writer, mask * batch, ...]``."""
    split = outputs.reshape(outputs.shape[0], *_masked_shape(outputs[0], n_masks))
    return (replacement[:, None] - split).swapaxes(0, 1)


def _wrote(state: _State, lacking: jax.Array, first: jax.Array) -> _State:
    """Returns the state after writers ran, the first of them number ``first``."""
    written = jax.lax.dynamic_update_slice(state.lacking, lacking.astype(state.lacking.dtype), (0, first, 0, 0, 0))
    return state._replace(lacking=written)
