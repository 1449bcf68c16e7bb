"""Gradients of a metric at what readers read, from one ordinary backward pass.

The backward pass goes from block to block, each recomputed from the residual stream that enters it, so that memory is
one block and the streams. It gives gradients at queries, keys and values before rotation, and at the MLP's input; a
reader's gradient is that of its own queries, keys or values, pulled back through its projection and the norm that all
heads share. No residual stream is copied for each head, and key/value heads are as many as the model has.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from tljax.config import HookedTransformerConfig
from tljax.forward.forward import context_of_layer, embed_positions, run_forward
from tljax.hooks.dictionary import HookDictionary, HookEntry
from tljax.hooks.intervention import Intervention
from tljax.hooks.interventions import Add
from tljax.hooks.point import HookPoint, HookSlot, apply_with_slots
from tljax.hooks.points import ENTRY, layer_of
from tljax.modules.context import AttentionContext
from tljax.modules.stack import block_module, embedding_module
from tljax.numerics import matmul_precision, widened
from tljax.typing import Params

HEADS_AXES, STREAM_AXES = ("batch", "pos", "head", "d_head"), ("batch", "pos", "d_model")
AXES = {"attn.hook_z": HEADS_AXES, "hook_mlp_out": STREAM_AXES, "hook_mlp_in": STREAM_AXES, ENTRY: STREAM_AXES}
"""Axes of the points that a path changes, by name within a block."""

Edits = Mapping[str, Intervention]
"""What a run changes, by full hook name."""


class Traceable(Protocol):
    """A metric that can be differentiated with respect to the final residual stream."""

    def traced(self, residual: Any) -> jax.Array:
        """Evaluates the metric as part of a trace."""
        ...


@dataclasses.dataclass(frozen=True)
class Path:
    """A run to differentiate: its residual streams, and what was changed in it.

    Attributes:
        streams: residual stream entering each layer, ``[batch, pos, d_model]``.
        final: residual stream that the logits read.
        activations: other activations of the run, by full name.
        edits: what the run changed.
    """

    streams: tuple[jax.Array, ...]
    final: jax.Array
    activations: Mapping[str, jax.Array]
    edits: Edits = dataclasses.field(default_factory=dict)


class Slopes(NamedTuple):
    """A metric's gradients in one layer.

    Attributes:
        q, k, v: at queries, keys and values before rotation, ``[batch, pos, head, d_head]``.
        mlp: at the MLP's input, ``[batch, pos, d_model]``; ``None`` without MLPs.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    mlp: jax.Array | None


def full_context(
    cfg: HookedTransformerConfig, params: Params, context: AttentionContext, stream: jax.Array
) -> AttentionContext:
    """Returns the context with the position embeddings that blocks read, in models whose blocks do (shortformer)."""
    if cfg.positional_embedding_type != "shortformer" or context.pos_embed is not None:
        return context
    placed = embed_positions(embedding_module(cfg), params["pos_embed"], stream, context)
    return dataclasses.replace(context, pos_embed=placed)


def follow(
    cfg: HookedTransformerConfig,
    params: Params,
    value: Any,
    context: AttentionContext,
    edits: Edits,
    names: tuple[str, ...] = (),
    *,
    start: int | None = None,
    before: tuple[jax.Array, ...] = (),
) -> Path:
    """Runs the model with some activations changed.

    Args:
        cfg, params: the model.
        value: token ids ``[batch, pos]``; with ``start``, the residual stream entering that layer.
        context: positions and padding.
        edits: what to change.
        names: other activations to keep, by full name.
        start: first layer to run, where nothing before it changes.
        before: with ``start``, the streams entering the layers below.
    """
    first = start or 0
    entries = [f"blocks.{layer}.{ENTRY}" for layer in range(first, cfg.n_layers)]
    hooks = HookDictionary(entries=tuple(HookEntry(name, edit) for name, edit in edits.items()))
    final, seen = run_forward(
        cfg, params, value, context, hooks=hooks, names=(*entries, *names), start=start, stop=cfg.n_layers
    )
    streams = (*before[:first], *(seen[name] for name in entries))
    return Path(streams, final, {name: seen[name] for name in names}, edits)


def final_slope(measure: Traceable, final: jax.Array, length: int, factor: Any = 1.0) -> tuple[jax.Array, jax.Array]:
    """Returns a run's metric, and ``factor`` times the gradient of its sum at the stream that the logits read.

    Args:
        measure: the metric.
        final: ``[batch, padded_pos, d_model]``.
        length: the prompts' length; what follows is padding.
        factor: a number, or one for each prompt.
    """

    def total(final: jax.Array) -> tuple[jax.Array, jax.Array]:
        value = measure.traced(final[:, :length])
        return (value * jnp.asarray(factor, value.dtype)).sum(), value

    (_, value), slope = jax.value_and_grad(total, has_aux=True)(final)
    return value, slope


def layer_slopes(
    cfg: HookedTransformerConfig, params: Params, context: AttentionContext, path: Path, slope: jax.Array
) -> tuple[list[Slopes], jax.Array]:
    """Computes gradients at the projections of every layer, last layer first.

    Args:
        cfg, params: the model.
        context: positions and padding (:func:`full_context`).
        path: the run.
        slope: gradient at its final stream.

    Returns:
        Gradients by layer, and the gradient at the stream that enters the first.
    """
    found: list[Slopes] = []
    for layer in reversed(range(cfg.n_layers)):
        own = {name: edit for name, edit in path.edits.items() if layer_of(name) == layer}
        edits = {name.partition(".")[2].partition(".")[2]: edit for name, edit in own.items()}
        slope, slopes = _back(
            block_module(cfg, layer), params["blocks"][layer], edits, path.streams[layer],
            context_of_layer(cfg, context, layer), slope,
        )  # fmt: skip
        found.append(slopes)
    return found[::-1], slope


@functools.partial(jax.jit, static_argnums=0)
def _back(
    module: Any, params: Params, edits: Edits, stream: jax.Array, context: AttentionContext, slope: jax.Array
) -> tuple[jax.Array, Slopes]:
    """Recomputes a block, and pulls the gradient at its output back to its input and its projections."""
    cfg = module.cfg
    edited = {name: HookSlot(HookPoint(name, AXES[name]), (edit,)) for name, edit in edits.items()}

    def run(stream: jax.Array, offsets: Slopes) -> jax.Array:
        added = {f"attn.hook_{letter}": getattr(offsets, letter) for letter in "qkv"}
        slots = dict(edited)
        for name, offset in added.items():
            slots[name] = HookSlot(HookPoint(name, HEADS_AXES), (Add(offset),))
        if offsets.mlp is not None:
            name = "hook_mlp_in"
            edits = edited[name].forward if name in edited else ()
            slots[name] = HookSlot(HookPoint(name, STREAM_AXES), (*edits, Add(offsets.mlp)))
        with matmul_precision(cfg):
            return apply_with_slots(module, {"params": params}, slots, stream, context)[0]

    batch, pos, _ = stream.shape
    d_head, d_value = cfg.d_head, cfg.d_head if cfg.d_value is None else cfg.d_value
    wide = widened(stream.dtype)
    zeros = Slopes(
        jnp.zeros((batch, pos, cfg.n_heads, d_head), wide),
        jnp.zeros((batch, pos, cfg.kv_heads, d_head), wide),
        jnp.zeros((batch, pos, cfg.kv_heads, d_value), wide),
        None if cfg.attn_only else jnp.zeros(stream.shape, wide),
    )
    _, pull = jax.vjp(run, stream, zeros)
    return pull(slope)


def reader_slopes(
    module: Any, params: Params, stream: jax.Array, context: AttentionContext, slopes: Slopes
) -> jax.Array:
    """Computes the gradients at what a layer's heads read, ``[reader, batch, pos, d_model]``: queries, keys, values.

    Args:
        module, params: the block.
        stream: residual stream that enters it, ``[batch, pos, d_model]``.
        context: positions and padding.
        slopes: gradients at its projections.
    """
    variables = {"params": params}
    at_norm = []
    with matmul_precision(module.cfg):
        for letter in "qkv":
            slope = getattr(slopes, letter)
            normalized: Any = module.apply(variables, stream, context, letter, method="attention_input")
            apart = jnp.broadcast_to(normalized, (slope.shape[2], *normalized.shape))

            def project(apart: jax.Array, letter: str = letter) -> Any:
                return module.apply(variables, apart, letter, method="project_apart")

            read, pull = jax.vjp(project, apart)
            at_norm.append(pull(slope.astype(read.dtype))[0])

        def norm(stream: jax.Array) -> Any:  # queries and keys may get positions added, which changes no gradient
            return module.apply(variables, stream, context, "v", method="attention_input")

        _, pull = jax.vjp(norm, stream)
        return jax.vmap(lambda slope: pull(slope)[0])(jnp.concatenate(at_norm))
