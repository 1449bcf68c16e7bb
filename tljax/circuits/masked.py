"""The forward pass of a circuit: each reader gets its own input, in which absent edges carry a replacement.

A reader's input is the residual stream of this very run plus, for each writer ``u`` whose edge to it is absent,
``r[u] - a[u]``: ``r[u]`` is the replacement, ``a[u]`` what ``u`` writes in this run. All masks run together, layer by
layer; one compiled program serves every layer of a kind.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import is_traced
from tljax.circuits.graph import ResidualGraph
from tljax.circuits.masked_block import (
    State,
    final_streams,
    pass_block_in_place,
    run_block,
    run_block_in_place,
    shape_of,
)
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.forward.forward import context_of_layer, embed_positions, run_forward
from tljax.hooks.dictionary import HookDictionary
from tljax.memory import batch_budget
from tljax.modules.context import AttentionContext
from tljax.modules.stack import block_module, embedding_module
from tljax.typing import Params

_CPU_BYTES = 24 * 2**20
"""Bytes of intermediate results that a block may make on a CPU. The C library takes larger arrays (32 MB) from the
operating system anew each time, and touching them for the first time costs more than computing them."""


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
        return _run_masks(cfg, params, prompts, masks, _start(cfg, prompts, len(masks)), run_block)[0]
    masks = np.asarray(masks)
    n_prompts, n_masks = _at_once(cfg, graph, stream, len(masks))
    streams = []
    for row in range(0, len(stream), n_prompts):
        rows = np.arange(row, row + n_prompts).clip(max=len(stream) - 1)  # the last is repeated: one compiled size
        some, of_rows, parts = prompts.take(rows), masks if masks.shape[1] == 1 else masks[:, rows], []
        state = _start(cfg, some, n_masks)
        for first in range(0, len(masks), n_masks):
            numbers = np.arange(first, first + n_masks).clip(max=len(masks) - 1)
            run, state = _run_masks(cfg, params, some, of_rows[numbers], state, run_block_in_place)
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
    return _even(batch, prompts), _even(n_masks, masks)


def _even(count: int, most: int) -> int:
    """Returns how many of ``count`` to run at once: of the sizes from half of ``most`` upward, one that pads least."""
    return min(range(most, (most - 1) // 2, -1), key=lambda size: -(-count // size) * size)


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
    cfg: HookedTransformerConfig, params: Params, prompts: _Prompts, masks: Any, state: State, block: Any
) -> tuple[jax.Array, State]:
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
        if state.combined is None and _is_idle(graph, masks, own):
            state = pass_block_in_place(
                cfg, params["blocks"][layer], state, prompts.replacement[own], np.int32(own.start)
            )
            continue
        own_to_mlp = None
        if not (graph.attn_only or graph.parallel_attn_mlp):
            own_to_mlp = absent[..., own.start : own.start + graph.n_heads, columns.stop - 1 : columns.stop]
        state = block(
            block_module(cfg, layer), shape_of(graph, layer), params["blocks"][layer], prompts.norms, state,
            context_of_layer(cfg, context, layer), _without(absent[..., columns], own), prompts.replacement[own],
            own_to_mlp, np.int32(own.start), np.int32(layer),
        )  # fmt: skip
    last = absent[..., graph.readers_of(graph.n_layers)]
    return final_streams(block_module(cfg, 0), graph.n_heads, prompts.norms, state, last), state


def _is_idle(graph: ResidualGraph, masks: Any, own: slice) -> bool:
    """Returns whether no mask has an edge from these writers: never of traced masks, as an edge at 0 has a gradient."""
    return isinstance(masks, np.ndarray) and not np.any(masks[..., own, :] * graph.edges[own])


def _without(absent: Any, own: slice) -> Any:
    """Returns the absent edges into a layer with those of its own writers left out: these have not run yet."""
    before = np.arange(absent.shape[3]) < own.start
    return (np if isinstance(absent, np.ndarray) else jnp).where(before[:, None], absent, 0).astype(absent.dtype)


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


def _start(cfg: HookedTransformerConfig, prompts: _Prompts, n_masks: int) -> State:
    """Returns the state of ``n_masks`` copies of the prompts' run that are about to enter block ``start``."""
    known, (batch, length, width) = prompts.known, prompts.stream.shape
    lacking = jnp.zeros((n_masks, prompts.graph.n_writers, batch, length, width), known.dtype)
    combined = None
    if cfg.has_norms_after:
        combined = jnp.zeros((n_masks, cfg.n_layers, batch, length, width), known.dtype)
    return State(jnp.tile(prompts.stream, (n_masks, 1, 1)), lacking.at[:, : len(known)].set(known[None]), combined)


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
