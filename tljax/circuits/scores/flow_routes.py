"""Information flow routes: how much of what a reader reads comes from each writer (Ferrando & Voita 2024).

As in EAP-IG: the contribution of ``u`` to an input ``x`` is ``max(0, |x| - |x - a_u|)`` in the L1 norm, as a share of
all writers' contributions, averaged over tokens. No metric and no source are needed.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.circuits.graph import ResidualGraph
from tljax.circuits.scores.contraction import token_parts
from tljax.circuits.writers import EMBED, EXPERTS, HEADS, MLP, mlp_outputs, outputs_by_head
from tljax.config import HookedTransformerConfig
from tljax.hooks.interventions import Replace
from tljax.hooks.point import HookPoint, HookSlot, apply_with_slots
from tljax.memory import how_many
from tljax.modules.stack import block_module
from tljax.numerics import widened
from tljax.patching.engine.base_run import BaseRun
from tljax.processes import as_numpy
from tljax.quantized_weight import as_floats
from tljax.text import positions
from tljax.typing import Params

MID = "hook_resid_mid"


def flow_points(graph: ResidualGraph) -> tuple[str, ...]:
    """Returns full names of the points, besides writers', that :func:`flow_shares` needs of a base run."""
    if graph.attn_only or graph.parallel_attn_mlp:
        return ()
    return tuple(f"blocks.{layer}.{MID}" for layer in range(graph.n_layers))


def flow_shares(
    cfg: HookedTransformerConfig,
    params: Params,
    graph: ResidualGraph,
    base: BaseRun,
    text: np.ndarray,
    *,
    by_prompt: bool,
    by_position: bool,
    through_norms: bool,
) -> np.ndarray:
    """Computes the share that each writer has in what each reader reads.

    Args:
        cfg, params, graph: the model and its graph.
        base: the run, with the activations of :func:`~tljax.circuits.writers.writer_points` and :func:`flow_points`.
        text: which entries of the padded prompts are text, ``[batch, pos]``.
        by_prompt, by_position: whether prompts and positions are kept apart, or summed.
        through_norms: whether heads are counted as they arrive in the stream, divided by the scale of a norm after
            attention; otherwise before that norm.

    Returns:
        Shares over the number of the prompt's tokens, so that positions sum to their mean: ``[batch, pos, writer,
        reader]`` without the axes that are summed. Positions count in each prompt's text.
    """
    batch, pos = text.shape
    width = widened(np.dtype(cfg.jnp_dtype))
    total = np.zeros((*((batch,) if by_prompt else ()), *((pos,) if by_position else ()), *graph.shape), width)
    weights = text / text.sum(axis=1, keepdims=True)
    for prompts, tokens in token_parts(batch, pos, how_many(graph.n_writers * cfg.d_model * width.itemsize)):
        part = prompts, tokens
        written = {-1: base.activations[EMBED][part][None]}
        ranks = positions.ranks(text)[part]
        for layer in range(cfg.n_layers + 1):
            if layer < cfg.n_layers:
                written[layer] = _written(cfg, params, graph, base, layer, part, through_norms)
            for read, columns in _reads(graph, base, layer):
                shares = _shares(graph, written, read[part], columns) * weights[part][..., None]
                for row, prompt in enumerate(range(prompts.start, prompts.stop)):
                    own = (prompt,) if by_prompt else ()
                    if by_position:
                        kept = ranks[row] >= 0
                        total[(*own, ranks[row][kept], slice(None), columns)] += shares[row][kept][..., None]
                    else:
                        total[(*own, slice(None), columns)] += shares[row].sum(axis=0)[:, None]
    return total


def _reads(graph: ResidualGraph, base: BaseRun, layer: int) -> list[tuple[jax.Array, slice]]:
    """Returns the streams that a layer reads, each with the readers that read it."""
    if layer == graph.n_layers:
        return [(base.final, graph.readers_of(layer))]
    stream, columns = base.residual(layer), graph.readers_of(layer)
    if graph.attn_only or graph.parallel_attn_mlp:
        return [(stream, columns)]
    mlp = graph.readers_of(layer, "mlp")
    return [(stream, slice(columns.start, mlp.start)), (base.activations[f"blocks.{layer}.{MID}"], mlp)]


def _shares(graph: ResidualGraph, written: Mapping[int, jax.Array], read: jax.Array, columns: slice) -> np.ndarray:
    """Returns the shares in a stream ``[batch, pos, d_model]`` of all writers, ``[batch, pos, writer]``."""
    known = graph.edges[:, columns.start]
    found = np.zeros((*read.shape[:2], graph.n_writers))
    for layer, outputs in written.items():
        rows = graph.writers_of(layer)
        if known[rows].any():
            found[..., rows] = np.moveaxis(as_numpy(_contributions(outputs, read)), 0, -1) * known[rows]
    whole = found.sum(axis=-1, keepdims=True)
    return found / np.where(whole > 0, whole, 1)


@jax.jit
def _contributions(outputs: jax.Array, read: jax.Array) -> jax.Array:
    wide = jnp.promote_types(read.dtype, jnp.float32)
    read = read.astype(wide)[None]
    left = jnp.abs(read - outputs.astype(wide)).sum(axis=-1)
    return jnp.maximum(jnp.abs(read).sum(axis=-1) - left, 0)


def _written(
    cfg: HookedTransformerConfig,
    params: Params,
    graph: ResidualGraph,
    base: BaseRun,
    layer: int,
    part: tuple[slice, slice],
    through_norms: bool,
) -> jax.Array:
    """Returns what a layer's writers write, ``[writer, batch, pos, d_model]``."""
    prefix = f"blocks.{layer}."
    n_experts = graph.experts[layer] if graph.experts else 0
    mlp = None if graph.attn_only else base.activations[prefix + MLP][part]
    experts = base.activations[prefix + EXPERTS][part] if n_experts else None
    z = base.activations[prefix + HEADS][part]
    return _outputs(block_module(cfg, layer), n_experts, through_norms, params["blocks"][layer], z, mlp, experts)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _outputs(
    module: Any,
    n_experts: int,
    through_norms: bool,
    params: Params,
    z: jax.Array,
    mlp: jax.Array | None,
    experts: jax.Array | None,
) -> jax.Array:
    heads = outputs_by_head(module.cfg, as_floats(params["attn"]["W_O"]), z)
    if through_norms:
        heads = _through_norm(module, params, heads)
    parts = [heads] if mlp is None else [heads, jnp.moveaxis(mlp_outputs(module.cfg, n_experts, mlp, experts), 2, 0)]
    return jnp.concatenate(parts)


def _through_norm(module: Any, params: Params, heads: jax.Array) -> jax.Array:
    """Returns each head's part of what attention adds: the norm after attention with its scale as in this run."""
    name = "ln1_post.hook_scale"
    combined = heads.sum(axis=0) + params["attn"]["b_O"][None, None]

    def added(value: jax.Array, slot: HookSlot) -> tuple[Any, Any]:
        norm = {"params": {"ln1_post": params["ln1_post"]}}
        return apply_with_slots(module, norm, {name: slot}, value, method="attention_output")

    _, seen = added(combined, HookSlot(HookPoint(name), captured=True))
    scale = HookSlot(HookPoint(name), (Replace(seen[name][None]),))
    at_scale = functools.partial(added, slot=scale)
    return at_scale(heads)[0] - at_scale(jnp.zeros_like(heads))[0]
