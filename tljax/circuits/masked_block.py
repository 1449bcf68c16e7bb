"""One block of several circuits on the same prompts, as one compiled program, and what absent edges change in it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax.circuits.graph import ResidualGraph
from tljax.circuits.writers import EXPERTS, HEADS, mlp_outputs, outputs_by_head
from tljax.config import HookedTransformerConfig
from tljax.hooks.interventions import Add, Replace
from tljax.hooks.point import HookPoint, HookSlot, apply_with_slots
from tljax.modules.activations import scaled
from tljax.modules.context import AttentionContext
from tljax.numerics import matmul_precision
from tljax.quantized_weight import as_floats
from tljax.typing import Params

_HEADS = ("batch", "pos", "head", "d_head")
_RESID = ("batch", "pos", "d_model")

_GROUPS = 4
"""Into how many groups layers are cut. A block reads what writers lack up to the end of its layer's group: there is a
program for each group, and not for each layer."""


class State(NamedTuple):
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


class LayerShape(NamedTuple):
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


def shape_of(graph: ResidualGraph, layer: int) -> LayerShape:
    """Returns what a block's program depends on besides the block: equal for layers that share programs."""
    experts = graph.experts[layer] if graph.experts else 0
    size = -(-graph.n_layers // _GROUPS)
    layers = min((layer // size + 1) * size, graph.n_layers)
    return LayerShape(graph.n_heads, not graph.attn_only, experts, layers, graph.writers_of(layers - 1).stop)


def _run_block(
    module: Any,
    shape: LayerShape,
    params: Params,
    norms: Params | None,
    state: State,
    context: AttentionContext,
    absent: jax.Array,
    replacement: jax.Array,
    own_to_mlp: jax.Array | None,
    first: jax.Array,
    layer: jax.Array,
) -> State:
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
    known = State(state.stream, state.lacking[:, : shape.writers], combined)
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
    results = outputs_by_head(cfg, as_floats(params["attn"]["W_O"]), seen[HEADS])
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


def _pass_block(
    cfg: HookedTransformerConfig, params: Params, state: State, replacement: jax.Array, first: jax.Array
) -> State:
    """Runs one block none of whose writers is read by any mask: all it adds is the replacement and the heads' bias.

    Args:
        cfg, params: the model, and the block's parameters.
        state: the run so far, without norms after attention.
        replacement: ``[writer of the layer, batch or 1, pos or 1, d_model]``.
        first: number of the layer's first writer.
    """
    shape = _masked_shape(state.stream, len(state.lacking))
    added = replacement.sum(axis=0) + scaled(params["attn"]["b_O"], cfg.residual_multiplier)[None, None]
    nothing = jnp.zeros((shape[0], len(replacement), *shape[1:]), state.lacking.dtype)
    stream = (state.stream.reshape(shape) + added[None]).reshape(state.stream.shape)
    return _wrote(state._replace(stream=stream), nothing, first)


pass_block_in_place = jax.jit(_pass_block, static_argnums=0, donate_argnums=2)
run_block = jax.jit(_run_block, static_argnums=(0, 1))
run_block_in_place = jax.jit(_run_block, static_argnums=(0, 1), donate_argnums=4)


@functools.partial(jax.jit, static_argnums=(0, 1))
def final_streams(module: Any, n_heads: int, norms: Params | None, state: State, absent: jax.Array) -> jax.Array:
    """Returns what the logits read, ``[mask, batch, pos, d_model]``; ``absent`` as in :func:`_contract`."""
    lacks = corrections(module, norms, state, absent, n_heads)
    return state.stream.reshape(_masked_shape(state.stream, len(lacks))) + lacks[:, 0]


def corrections(module: Any, norms: Params | None, state: State, absent: jax.Array, n_heads: int) -> jax.Array:
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


def _wrote(state: State, lacking: jax.Array, first: jax.Array) -> State:
    """Returns the state after writers ran, the first of them number ``first``."""
    written = jax.lax.dynamic_update_slice(state.lacking, lacking.astype(state.lacking.dtype), (0, first, 0, 0, 0))
    return state._replace(lacking=written)
