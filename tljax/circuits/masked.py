"""The forward pass of a circuit: each reader gets its own input, in which absent edges carry a replacement.

A reader's input is the residual stream of this very run plus, for each writer ``u`` whose edge to it is absent,
``r[u] - a[u]``: ``r[u]`` is the replacement, ``a[u]`` what ``u`` writes in this run. All masks run together, layer by
layer; one compiled program serves every layer of a kind.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import is_traced
from tljax.circuits.graph import ResidualGraph
from tljax.circuits.writers import EXPERTS, HEADS, MLP, head_outputs, mlp_outputs
from tljax.config import HookedTransformerConfig
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


class _State(NamedTuple):
    """A run of several masks on the same prompts, between two blocks.

    Attributes:
        stream: residual stream, ``[mask * batch, pos, d_model]``.
        lacking: what absent edges add, ``r[u] - a[u]``, ``[mask, writer, batch, pos, d_model]``; zero for writers that
            have not run yet.
        combined: in models with norms after attention, the heads' sum and ``b_O`` of each layer so far, ``[layer,
            mask, batch, pos, d_model]``; otherwise ``None``.
    """

    stream: jax.Array
    lacking: jax.Array
    combined: jax.Array | None


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
    n_masks = masks.shape[0]
    dtype = cfg.jnp_dtype
    absent = jnp.where(jnp.asarray(graph.edges), 1 - masks.astype(dtype), jnp.zeros((), dtype))
    replacement = jnp.moveaxis(jnp.asarray(replacement, dtype), 2, 0)
    state, context = _begin(cfg, params, graph, value, context, n_masks, replacement, start, lacking)
    run = _block if is_traced(state, absent, params, replacement) else _block_in_place
    norms = _post_norms(cfg, params)
    for layer in range(start, cfg.n_layers):
        own, columns = graph.writers_of(layer), graph.readers_of(layer)
        state = run(
            block_module(cfg, layer), _shape_of(graph, layer), params["blocks"][layer], norms, state,
            context_of_layer(cfg, context, layer), absent[..., columns], replacement[own], np.int32(own.start),
            np.int32(layer),
        )  # fmt: skip
    columns = graph.readers_of(graph.n_layers)
    return _final(block_module(cfg, 0), graph, norms, state, absent[..., columns])


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
    graph: ResidualGraph,
    value: Any,
    context: AttentionContext,
    n_masks: int,
    replacement: jax.Array,
    start: int,
    lacking: Any,
) -> tuple[_State, AttentionContext]:
    """Returns the state before the first block to run, and the context of all masks' prompts together."""
    hooks = HookDictionary()
    if start:
        stream = jnp.asarray(value)
        known = jnp.moveaxis(jnp.asarray(lacking, stream.dtype), 2, 0)
    else:
        names = ("hook_embed",)
        stream, seen = run_forward(cfg, params, value, context, hooks=hooks, names=names, stop=0)
        known = (replacement[:1] - seen["hook_embed"][None]).astype(stream.dtype)
    if cfg.positional_embedding_type == "shortformer" and context.pos_embed is None:
        placed = embed_positions(embedding_module(cfg), params["pos_embed"], stream, context)
        context = dataclasses.replace(context, pos_embed=placed)
    rows = jnp.tile(stream, (n_masks, 1, 1))
    unknown = jnp.zeros((graph.n_writers - len(known), *known.shape[1:]), known.dtype)
    every = jnp.concatenate([known, unknown])
    spread = jnp.broadcast_to(every[None], (n_masks, *every.shape))
    combined = None
    if cfg.has_norms_after:
        combined = jnp.zeros((cfg.n_layers, n_masks, *stream.shape), stream.dtype)
    return _State(rows, jnp.array(spread), combined), _repeat(context, n_masks, stream.shape[0])


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
    first: jax.Array,
    layer: jax.Array,
) -> _State:
    """Runs one block of all masks.

    Args:
        module, shape: the block, and what else its program depends on.
        params, norms: its parameters, and those of all norms after attention.
        state: the run so far.
        context: positions and padding.
        absent: ``[mask, batch or 1, pos or 1, writer, reader of the layer]``.
        replacement: ``[writer of the layer, batch or 1, pos or 1, d_model]``.
        first, layer: number of the layer's first writer, and of the layer.
    """
    cfg, heads, kv = module.cfg, shape.n_heads, shape.n_kv_heads
    n_masks = absent.shape[0]
    ends = np.cumsum([0, heads, kv, kv])
    variables = {"params": params}
    read_apart = _by_reader(corrections(module, norms, state, absent[..., : ends[-1]], heads)) + state.stream[None]
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
    if after.combined is not None:
        whole = (results.sum(axis=2) + params["attn"]["b_O"][None, None]).reshape(
            1, *_masked_shape(state.stream, n_masks)
        )
        at = (layer, *(0,) * (whole.ndim - 1))
        after = after._replace(combined=jax.lax.dynamic_update_slice(after.combined, whole, at))
    if shape.attn_only:
        return after._replace(stream=state.stream + attn_out)
    stream = state.stream if shape.parallel else state.stream + attn_out
    lacks = corrections(module, norms, state if shape.parallel else after, absent[..., ends[-1] :], heads)
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
def _final(module: Any, graph: ResidualGraph, norms: Params | None, state: _State, absent: jax.Array) -> jax.Array:
    n_masks = absent.shape[0]
    lacks = corrections(module, norms, state, absent, graph.n_heads)
    return state.stream.reshape(_masked_shape(state.stream, n_masks)) + lacks[:, 0]


def corrections(module: Any, norms: Params | None, state: _State, absent: jax.Array, n_heads: int) -> jax.Array:
    """Computes what absent edges change in readers' inputs, ``[mask, reader, batch, pos, d_model]``.

    With norms after attention, a layer's heads are mixed before that norm, and the change is that of its output.
    """
    if norms is None:
        return _contract(module.cfg, absent, state.lacking)
    assert state.combined is not None
    n_layers = state.combined.shape[0]
    per_layer = (state.lacking.shape[1] - 1) // n_layers
    is_head = np.tile(np.arange(per_layer) < n_heads, n_layers)
    others = np.concatenate([[True], ~is_head])
    total = _contract(module.cfg, jnp.where(others[:, None], absent, 0), state.lacking)

    def by_layer(array: jax.Array, axis: int) -> jax.Array:
        rest = jax.lax.slice_in_dim(array, 1, None, axis=axis)
        split = rest.reshape(*rest.shape[:axis], n_layers, per_layer, *rest.shape[axis + 1 :])
        return jnp.moveaxis(jax.lax.slice_in_dim(split, 0, n_heads, axis=axis + 1), axis, 0)

    def add_layer(total: jax.Array, of_layer: Any) -> tuple[jax.Array, None]:
        norm, absent, lacking, combined = of_layer
        change = _contract(module.cfg, absent, lacking)
        whole = combined[:, None]

        def out(value: jax.Array) -> Any:
            return module.apply({"params": {"ln1_post": norm}}, value, method="attention_output")

        return total + out(whole + change) - out(whole), None

    layers = norms, by_layer(absent, 3), by_layer(state.lacking, 1), state.combined
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
    split = outputs.reshape(*_masked_shape(outputs, n_masks))
    difference = replacement[None] - jnp.moveaxis(split, 3, 1)
    at = (0, first, *(0,) * (difference.ndim - 2))
    written = difference.astype(state.lacking.dtype)
    return state._replace(lacking=jax.lax.dynamic_update_slice(state.lacking, written, at))
