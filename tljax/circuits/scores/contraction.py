"""Scores of all edges: what writers' outputs change by, times the gradients at what readers read.

Both are made for a few tokens at a time and multiplied as matrices, so nothing of size writers (or edges) × batch ×
position × d_model is ever held.
"""

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax.circuits.graph import ResidualGraph
from tljax.circuits.scores.gradients import Slopes, reader_slopes
from tljax.circuits.writers import EMBED, EXPERTS, HEADS, MLP, mlp_outputs, outputs_by_head
from tljax.config import HookedTransformerConfig
from tljax.memory import how_many
from tljax.modules.context import AttentionContext
from tljax.modules.stack import block_module
from tljax.numerics import matmul_precision, widened
from tljax.processes import as_numpy
from tljax.quantized_weight import as_floats
from tljax.typing import Params

_SEGMENTS = 4
"""Groups of layers whose writers are multiplied at once: each number of groups is a program of its own."""


class _Kept(NamedTuple):
    """Whether prompts and positions are kept apart, or summed."""

    prompt: bool
    position: bool


class _LayerChanges(NamedTuple):
    """What a layer's activations change by, and its heads' values in the run (with norms after attention)."""

    z: jax.Array
    mlp: jax.Array | None
    experts: jax.Array | None
    now: jax.Array | None


class Gradients(NamedTuple):
    """A metric's gradients on one run, for :func:`edge_products`.

    Attributes:
        streams: residual stream entering each layer.
        layers: gradients at each layer's projections.
        final: gradient at the stream that the logits read.
    """

    streams: tuple[jax.Array, ...]
    layers: tuple[Slopes, ...]
    final: jax.Array


def edge_products(
    cfg: HookedTransformerConfig,
    params: Params,
    graph: ResidualGraph,
    context: AttentionContext,
    changes: Mapping[str, jax.Array],
    gradients: Gradients,
    *,
    by_prompt: bool,
    by_position: bool,
    runs: int = 1,
    heads_now: Mapping[str, jax.Array] | None = None,
) -> np.ndarray:
    """Computes, for each edge, the change of its writer's output times the gradient at its reader.

    Args:
        cfg, params, graph: the model and its graph.
        context: positions and padding (:func:`~tljax.circuits.scores.gradients.full_context`).
        changes: what activations change by, by full name, ``[batch, pos, ...]``, zero at padding.
        gradients: gradients at readers; of several runs of the same prompts one after another, which are summed.
        by_prompt, by_position: whether prompts and positions are kept apart, or summed.
        runs: number of runs that ``gradients`` hold.
        heads_now: ``hook_z`` of the run by full name: heads' changes then go through the derivative of the norm after
            attention, taken at this run, and there is one run only.

    Returns:
        float32 or wider, ``[batch, pos, writer, reader]`` without the axes that are summed. Entries that are no edges
        are zero.
    """
    batch, pos = gradients.final.shape[0] // runs, gradients.final.shape[1]
    width = widened(np.dtype(cfg.jnp_dtype))
    sizes = (*((batch,) if by_prompt else ()), *((pos,) if by_position else ()), *graph.shape)
    total = np.zeros(sizes, width)
    token_bytes = (graph.n_writers + 2 * cfg.n_heads + 2 * cfg.kv_heads) * cfg.d_model * width.itemsize
    groups, kept = _groups(graph), _Kept(by_prompt, by_position)
    for prompts, tokens in token_parts(batch, pos, how_many(token_bytes)):
        cut = functools.partial(_cut, prompts, tokens, (batch, pos))
        here = _of_part(context, cut)
        segments = [
            _segment(
                cfg, _structure(cfg, graph, layers), kept, tuple(params["blocks"][layer] for layer in layers),
                cut(changes[EMBED]) if not number else None,
                tuple(_changes_of(graph, changes, heads_now, layer, cut) for layer in layers),
            )
            for number, layers in enumerate(groups)
        ]  # fmt: skip
        places = (*((prompts,) if by_prompt else ()), *((tokens,) if by_position else ()))
        found = []
        for number, layers in enumerate(groups):
            for layer in layers:
                module, own = block_module(cfg, layer), params["blocks"][layer]
                along = gradients.streams[layer], gradients.layers[layer]
                parts = (_run(along, run, runs) for run in range(runs))
                read = (_readers(module, kept, own, cut(stream), here, cut(slopes)) for stream, slopes in parts)
                readers = functools.reduce(operator.add, read)
                products = _products(cfg, kept, tuple(segments[: number + 1]), readers)
                found.append((graph.readers_of(layer), products))
        finals = (_laid_out(cut(_run(gradients.final, run, runs))[None], kept) for run in range(runs))
        last = functools.reduce(operator.add, finals)
        found.append((graph.readers_of(graph.n_layers), _products(cfg, kept, tuple(segments), last)))
        for columns, products in found:
            total[(*places, slice(products.shape[-2]), columns)] += as_numpy(products)
    total[..., ~graph.edges] = 0
    return total


def _run(tree: Any, run: int, runs: int) -> Any:
    """Returns the part that belongs to one of several runs, which lie one after another along the first axis."""
    if runs == 1:
        return tree
    return jax.tree.map(lambda array: array[run * len(array) // runs : (run + 1) * len(array) // runs], tree)


def _groups(graph: ResidualGraph) -> list[list[int]]:
    """Returns the layers in a few groups of consecutive ones."""
    size = -(-graph.n_layers // _SEGMENTS)
    return [list(range(first, min(first + size, graph.n_layers))) for first in range(0, graph.n_layers, size)]


def token_parts(batch: int, pos: int, tokens: int) -> Iterator[tuple[slice, slice]]:
    """Yields prompts and positions of parts of about ``tokens`` tokens: whole prompts, or pieces of one."""
    prompts = max(1, min(batch, tokens // pos))
    prompts = -(-batch // -(-batch // prompts))  # of even sizes
    length = pos if tokens >= pos else -(-pos // -(-pos // tokens))
    for first in range(0, batch, prompts):
        for start in range(0, pos, length):
            yield slice(first, min(first + prompts, batch)), slice(start, min(start + length, pos))


def _cut(prompts: slice, tokens: slice, whole: tuple[int, int], tree: Any) -> Any:
    """Returns a part of arrays ``[batch, pos, ...]``."""
    if (prompts.start, prompts.stop, tokens.start, tokens.stop) == (0, whole[0], 0, whole[1]):
        return tree
    return jax.tree.map(lambda array: array[prompts, tokens], tree)


def _of_part(context: AttentionContext, cut: Any) -> AttentionContext:
    """Returns the context of a part: what is read of it are position embeddings alone (shortformer)."""
    if context.pos_embed is None:
        return AttentionContext()
    length = context.pos_embed.shape[1]
    whole = jnp.broadcast_to(context.pos_embed, (*cut.args[2][:1], length, context.pos_embed.shape[2]))
    return AttentionContext(pos_embed=cut(whole[:, : cut.args[2][1]]))


def _structure(cfg: HookedTransformerConfig, graph: ResidualGraph, layers: Sequence[int]) -> tuple[Any, ...]:
    experts = graph.experts or (0,) * graph.n_layers
    return tuple((block_module(cfg, layer), experts[layer]) for layer in layers)


def _changes_of(
    graph: ResidualGraph,
    changes: Mapping[str, jax.Array],
    heads_now: Mapping[str, jax.Array] | None,
    layer: int,
    cut: Any,
) -> _LayerChanges:
    prefix = f"blocks.{layer}."
    return _LayerChanges(
        cut(changes[prefix + HEADS]),
        None if graph.attn_only else cut(changes[prefix + MLP]),
        cut(changes[prefix + EXPERTS]) if graph.experts and graph.experts[layer] else None,
        None if heads_now is None else cut(heads_now[prefix + HEADS]),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _segment(
    cfg: HookedTransformerConfig,
    structure: tuple[tuple[Any, int], ...],
    kept: _Kept,
    params: tuple[Params, ...],
    embed: jax.Array | None,
    changes: tuple[_LayerChanges, ...],
) -> jax.Array:
    """Returns what some layers' writers change by, laid out by :func:`_laid_out`."""
    parts = [] if embed is None else [embed[None]]
    for (module, n_experts), own, change in zip(structure, params, changes, strict=True):
        parts.append(_head_changes(module, own, change))
        if change.mlp is not None:
            parts.append(jnp.moveaxis(mlp_outputs(cfg, n_experts, change.mlp, change.experts), 2, 0))
    return _laid_out(jnp.concatenate(parts), kept)


def _head_changes(module: Any, params: Params, change: _LayerChanges) -> jax.Array:
    """Returns what a layer's heads change in the residual stream, ``[head, batch, pos, d_model]``."""
    cfg, W_O = module.cfg, as_floats(params["attn"]["W_O"])
    heads = outputs_by_head(cfg, W_O, change.z)
    if change.now is None:
        return heads
    now = change.now.astype(heads.dtype)
    combined = outputs_by_head(cfg, W_O, now).sum(axis=0) + params["attn"]["b_O"][None, None]

    def added(combined: jax.Array) -> Any:
        norm = {"params": {"ln1_post": params["ln1_post"]}}
        return module.apply(norm, combined, method="attention_output").astype(heads.dtype)

    return jax.vmap(lambda head: jax.jvp(added, (combined,), (head,))[1])(heads)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _readers(
    module: Any, kept: _Kept, params: Params, stream: jax.Array, context: AttentionContext, slopes: Slopes
) -> jax.Array:
    """Returns gradients at a layer's readers, laid out by :func:`_laid_out`."""
    heads = reader_slopes(module, params, stream, context, slopes)
    parts = [heads] if slopes.mlp is None else [heads, slopes.mlp[None].astype(heads.dtype)]
    return _laid_out(jnp.concatenate(parts), kept)


def _laid_out(array: jax.Array, kept: _Kept) -> jax.Array:
    """Puts the axes of ``[writer or reader, batch, pos, d_model]`` that are kept first, and joins those that are not.

    With one axis to sum over, a product takes a quarter of the time on a CPU that it takes with two.
    """
    first = array.shape[0]
    if kept.position:
        return jnp.moveaxis(array, 0, 2)
    if kept.prompt:
        return jnp.moveaxis(array, 0, 1).reshape(array.shape[1], first, -1)
    return array.reshape(first, -1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _products(
    cfg: HookedTransformerConfig, kept: _Kept, segments: tuple[jax.Array, ...], readers: jax.Array
) -> jax.Array:
    """Returns products of changes and gradients, ``[batch, pos, writer, reader]`` without the axes that are summed."""
    with matmul_precision(cfg):
        parts = [
            jnp.einsum("...fk,...rk->...fr", segment, readers, preferred_element_type=segment.dtype)
            for segment in segments
        ]
    joined = jnp.concatenate(parts, axis=-2)
    return joined.sum(axis=0) if kept.position and not kept.prompt else joined
