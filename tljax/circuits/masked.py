"""The forward pass of a circuit: each reader gets its own input, in which absent edges carry a replacement.

A reader's input is the residual stream of this very run plus, for each writer ``u`` whose edge to it is absent,
``r[u] - a[u]``: ``r[u]`` is the replacement, ``a[u]`` what ``u`` writes in this run. All masks run together, layer by
layer; one compiled program serves every layer of a kind.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import is_traced
from tljax.circuits.graph import ResidualGraph
from tljax.circuits.writers import EXPERTS, HEADS, MLP, head_outputs, mlp_outputs
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.forward.forward import context_of_layer, embed_positions, run_forward
from tljax.hooks.dictionary import HookDictionary
from tljax.hooks.interventions import Add, Replace
from tljax.hooks.point import HookPoint, HookSlot, apply_with_slots
from tljax.modules.context import AttentionContext
from tljax.modules.stack import block_module, embedding_module
from tljax.numerics import matmul_precision
from tljax.typing import Params

_HEADS = ("batch", "pos", "head", "d_head")
RESULT = "attn.hook_result"
_RESID = ("batch", "pos", "d_model")


_SEGMENTS = 4
"""Into how many arrays what the writers lack is cut; a block reads only those whose writers have run."""


class _State(NamedTuple):
    """A run of several masks on the same prompts, between two blocks.

    Attributes:
        stream: residual stream, ``[mask * batch, pos, d_model]``.
        lacking: what absent edges add, ``r[u] - a[u]``, as arrays ``[mask, writer, batch, pos, d_model]``: one for the
            token embedding and one for each group of layers that has begun; zero for writers that have not run yet.
        combined: in models with norms after attention, the heads' sum and ``b_O`` by layer, arrays ``[mask, layer,
            batch, pos, d_model]`` for the same groups of layers; otherwise empty.
    """

    stream: jax.Array
    lacking: tuple[jax.Array, ...]
    combined: tuple[jax.Array, ...] = ()


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
    masks = jnp.asarray(masks)
    dtype = cfg.jnp_dtype
    absent = jnp.where(jnp.asarray(graph.edges), 1 - masks.astype(dtype), jnp.zeros((), dtype))
    replacement = jnp.moveaxis(jnp.asarray(replacement, dtype), 2, 0)
    groups = _groups(cfg.n_layers)
    stream, context, known = _begin(cfg, params, value, context, replacement, start, lacking)
    state, context = (
        _spread(cfg, graph, groups, stream, known, len(masks), start),
        _repeat(context, len(masks), len(stream)),
    )
    run = _block if is_traced(state, absent, params, replacement) else _block_in_place
    norms = _post_norms(cfg, params, groups)
    for layer in range(start, cfg.n_layers):
        group = layer // len(groups[0])
        if len(state.lacking) < group + 2:
            state = _open_group(cfg, graph, groups[group], state)
        own, columns = graph.writers_of(layer), graph.readers_of(layer)
        first = graph.writers_of(groups[group][0]).start
        parts = _by_group(graph, groups[: group + 1], absent[..., columns])
        state = run(
            block_module(cfg, layer), _shape_of(graph, layer), params["blocks"][layer], norms[: group + 1], state,
            context_of_layer(cfg, context, layer), parts, replacement[own], np.int32(own.start - first),
            np.int32(layer - groups[group][0]),
        )  # fmt: skip
    parts = _by_group(graph, groups, absent[..., graph.readers_of(graph.n_layers)])
    return _final(block_module(cfg, 0), graph.n_heads, norms, state, parts)


def _groups(n_layers: int) -> list[range]:
    """Cuts the layers into groups of equal length (the last may be shorter)."""
    size = -(-n_layers // _SEGMENTS)
    return [range(first, min(first + size, n_layers)) for first in range(0, n_layers, size)]


def _by_group(graph: ResidualGraph, groups: Sequence[range], absent: jax.Array) -> tuple[jax.Array, ...]:
    """Cuts ``[mask, batch or 1, pos or 1, writer, reader]`` into the token embedding and groups of layers."""
    cuts = [slice(0, 1), *(_writers_of_group(graph, group) for group in groups)]
    return tuple(absent[..., cut, :] for cut in cuts)


def _writers_of_group(graph: ResidualGraph, group: range) -> slice:
    return slice(graph.writers_of(group[0]).start, graph.writers_of(group[-1]).stop)


def _open_group(cfg: HookedTransformerConfig, graph: ResidualGraph, group: range, state: _State) -> _State:
    """Returns the state with zeros for the writers of a group of layers."""
    n_masks, _, batch, length, width = state.lacking[0].shape
    own, dtype = _writers_of_group(graph, group), state.lacking[0].dtype
    lacking = jnp.zeros((n_masks, own.stop - own.start, batch, length, width), dtype)
    combined = state.combined
    if cfg.has_norms_after:
        combined = (*combined, jnp.zeros((n_masks, len(group), batch, length, width), dtype))
    return _State(state.stream, (*state.lacking, lacking), combined)


def _shape_of(graph: ResidualGraph, layer: int) -> "_LayerShape":
    """Returns what a block's program depends on besides the block: equal for layers that share programs."""
    experts = graph.experts[layer] if graph.experts else 0
    return _LayerShape(graph.n_heads, graph.n_kv_heads, graph.parallel_attn_mlp, graph.attn_only, experts)


class _LayerShape(NamedTuple):
    n_heads: int
    n_kv_heads: int
    parallel: bool
    attn_only: bool
    experts: int


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


def _spread(
    cfg: HookedTransformerConfig,
    graph: ResidualGraph,
    groups: Sequence[range],
    stream: jax.Array,
    known: jax.Array,
    n_masks: int,
    start: int,
) -> _State:
    """Returns the state of ``n_masks`` copies of a run that is about to enter block ``start``."""
    if start and cfg.has_norms_after:
        raise InputError("A run of a circuit of a model with norms after attention starts at the tokens.")
    spread = jnp.array(jnp.broadcast_to(known[None, :1], (n_masks, 1, *known.shape[1:])))
    state = _State(jnp.tile(stream, (n_masks, 1, 1)), (spread,))
    for group in groups:
        own = _writers_of_group(graph, group)
        if own.start < len(known):
            state = _open_group(cfg, graph, group, state)
            run = known[None, own]
            *before, opened = state.lacking
            state = state._replace(lacking=(*before, opened.at[:, : run.shape[1]].set(run)))
    return state


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


def _post_norms(cfg: HookedTransformerConfig, params: Params, groups: Sequence[range]) -> tuple[Params | None, ...]:
    """Returns the parameters of the norms after attention, stacked by group of layers; ``None`` without such norms."""
    if not cfg.has_norms_after:
        return (None,) * len(groups)
    norms = [block["ln1_post"] for block in params["blocks"]]
    return tuple(jax.tree.map(lambda *leaves: jnp.stack(leaves), *norms[group.start : group.stop]) for group in groups)


def _run_block(
    module: Any,
    shape: _LayerShape,
    params: Params,
    norms: tuple[Params | None, ...],
    state: _State,
    context: AttentionContext,
    absent: tuple[jax.Array, ...],
    replacement: jax.Array,
    first: jax.Array,
    layer: jax.Array,
) -> _State:
    """Runs one block of all masks.

    Args:
        module, shape: the block, and what else its program depends on.
        params, norms: its parameters, and those of all norms after attention, by group of layers.
        state: the run so far.
        context: positions and padding.
        absent: ``[mask, batch or 1, pos or 1, writer, reader of the layer]``, for each array of ``state.lacking``.
        replacement: ``[writer of the layer, batch or 1, pos or 1, d_model]``.
        first, layer: number of the layer's first writer within its group, and of the layer.
    """
    cfg, heads, kv = module.cfg, shape.n_heads, shape.n_kv_heads
    n_masks = absent[0].shape[0]
    ends = np.cumsum([0, heads, kv, kv])
    variables = {"params": params}
    read_apart = (
        _by_reader(corrections(module, norms, state, [part[..., : ends[-1]] for part in absent], heads))
        + state.stream[None]
    )
    slots = {}
    for letter, (begin, end) in zip("qkv", itertools.pairwise(ends), strict=True):
        with matmul_precision(cfg):
            read: Any = module.apply(variables, read_apart[begin:end], context, letter, method="read_apart")
        slots[f"attn.hook_{letter}"] = HookSlot(HookPoint(f"hook_{letter}", _HEADS), (Replace(read),))
    captured = (RESULT,) if cfg.has_norms_after else (HEADS,)
    slots |= {name: HookSlot(HookPoint(name), captured=True) for name in captured}
    with matmul_precision(cfg):
        attn_out, seen = apply_with_slots(module, variables, slots, state.stream, context, method="attention_branch")
    results = seen[RESULT] if cfg.has_norms_after else head_outputs(cfg, params["attn"]["W_O"], seen[HEADS])
    after = _wrote(state, replacement[:heads], results, first, n_masks)
    if after.combined:
        whole = results.sum(axis=2) + params["attn"]["b_O"][None, None]
        whole = whole.reshape(_masked_shape(whole, n_masks))[:, None]
        *before, last = after.combined
        last = jax.lax.dynamic_update_slice(last, whole, (0, layer, 0, 0, 0))
        after = after._replace(combined=(*before, last))
    if shape.attn_only:
        return after._replace(stream=state.stream + attn_out)
    stream = state.stream if shape.parallel else state.stream + attn_out
    of_mlp = [part[..., ends[-1] :] for part in absent]
    lacks = corrections(module, norms, state if shape.parallel else after, of_mlp, heads)
    slots = {"hook_mlp_in": HookSlot(HookPoint("hook_mlp_in", _RESID), (Add(_by_reader(lacks)[0]),))}
    wanted = (MLP, EXPERTS) if shape.experts else (MLP,)
    slots |= {name: HookSlot(HookPoint(name), captured=True) for name in wanted}
    with matmul_precision(cfg):
        mlp_out, seen = apply_with_slots(module, variables, slots, stream, method="mlp_branch")
    outputs = mlp_outputs(cfg, shape.experts, mlp_out, seen.get(EXPERTS))
    after = _wrote(after, replacement[heads:], outputs, first + heads, n_masks)
    return after._replace(stream=state.stream + attn_out + mlp_out)


_block = jax.jit(_run_block, static_argnums=(0, 1))
_block_in_place = jax.jit(_run_block, static_argnums=(0, 1), donate_argnums=4)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _final(
    module: Any, n_heads: int, norms: tuple[Params | None, ...], state: _State, absent: tuple[jax.Array, ...]
) -> jax.Array:
    lacks = corrections(module, norms, state, absent, n_heads)
    return state.stream.reshape(_masked_shape(state.stream, len(lacks))) + lacks[:, 0]


def corrections(
    module: Any, norms: Sequence[Params | None], state: _State, absent: Sequence[jax.Array], n_heads: int
) -> jax.Array:
    """Computes what absent edges change in readers' inputs, ``[mask, reader, batch, pos, d_model]``.

    With norms after attention, a layer's heads are mixed before that norm, and the change is that of its output.
    """
    total = _contract(module.cfg, absent[0], state.lacking[0])
    for number, (part, lacking) in enumerate(zip(absent[1:], state.lacking[1:], strict=True)):
        if not state.combined:
            total = total + _contract(module.cfg, part, lacking)
            continue
        total = _through_norms(module, norms[number], n_heads, total, part, lacking, state.combined[number])
    return total


def _through_norms(
    module: Any,
    norms: Params | None,
    n_heads: int,
    total: jax.Array,
    absent: jax.Array,
    lacking: jax.Array,
    combined: jax.Array,
) -> jax.Array:
    """Adds to ``total`` what a group of layers lacks, with each layer's heads mixed before the norm that follows."""
    n_layers = combined.shape[1]
    own = lacking.shape[1] // n_layers
    is_head = np.tile(np.arange(own) < n_heads, n_layers)
    total = total + _contract(module.cfg, jnp.where(is_head[:, None], 0, absent), lacking)

    def heads_by_layer(array: jax.Array, axis: int) -> jax.Array:
        split = array.reshape(*array.shape[:axis], n_layers, own, *array.shape[axis + 1 :])
        return jnp.moveaxis(jax.lax.slice_in_dim(split, 0, n_heads, axis=axis + 1), axis, 0)

    def add_layer(total: jax.Array, of_layer: Any) -> tuple[jax.Array, None]:
        norm, absent, lacking, combined = of_layer
        change, whole = _contract(module.cfg, absent, lacking), combined[:, None]

        def out(value: jax.Array) -> Any:
            return module.apply({"params": {"ln1_post": norm}}, value, method="attention_output")

        return total + out(whole + change) - out(whole), None

    layers = norms, heads_by_layer(absent, 3), heads_by_layer(lacking, 1), jnp.moveaxis(combined, 1, 0)
    return jax.lax.scan(add_layer, total, layers)[0]


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


def _wrote(state: _State, replacement: jax.Array, outputs: jax.Array, first: jax.Array, n_masks: int) -> _State:
    """Returns the state after writers ran: ``outputs`` ``[mask * batch, pos, writer, d_model]``."""
    *before, last = state.lacking
    difference = replacement[None] - jnp.moveaxis(outputs.reshape(_masked_shape(outputs, n_masks)), 3, 1)
    written = jax.lax.dynamic_update_slice(last, difference.astype(last.dtype), (0, first, 0, 0, 0))
    return state._replace(lacking=(*before, written))
