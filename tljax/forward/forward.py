"""The forward driver: embedding, blocks, unembedding, each one compiled program, with hooks and captures between.

The compiled unit is the block. Its executable depends on the module, the captured names and the structure of its
hooks, never on the layer's index or on any number, so equal-shaped layers share it and new values reuse it. Plain
Python hooks run between compiled programs on concrete arrays. Under a user's own trace (``jit``, ``grad``, ``vmap``)
the same code is traced into theirs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.core import Tracer

from tljax.config import HookedTransformerConfig
from tljax.hooks.dictionary import HookDictionary, HookEntry, make_slot
from tljax.hooks.intervention import Intervention
from tljax.hooks.interventions import Replace
from tljax.hooks.names import stage_of
from tljax.hooks.point import HookPoint, HookSlot, apply_with_slots, is_compiled, leaked_tracer
from tljax.hooks.points import AttentionInput, block_points, embedding_points, head_points
from tljax.modules.context import AttentionContext
from tljax.modules.embedding import EmbeddingStage
from tljax.modules.stages import block_module, embedding_module, head_module
from tljax.numerics import matmul_precision
from tljax.typing import Params

_EMBEDDING, _HEAD = "embedding", "head"
POSITIONS = "hook_pos_embed"
_SEVERAL_TIMES = ("ln1.", "attn.kv_latent_norm.", "attn.hook_kv_latent")
"""How points start that fire more than once where queries, keys and values read apart."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One compiled step of the forward pass.

    Attributes:
        module: the Linen module.
        params: its parameters.
        prefix: what its points' full names start with.
        captured: points to record, by relative name, in firing order.
        slots: hooks by relative name, in firing order.
        entry: the point that fires first, on the stage's input; ``None`` if there is none.
        exit: the point whose value is the stage's output; ``None`` if there is none.
    """

    module: nn.Module
    params: Params
    prefix: str
    captured: tuple[str, ...]
    slots: dict[str, HookSlot]
    entry: str | None = None
    exit: str | None = None


def _apply(
    module: Any,
    captured: tuple[str, ...],
    params: Params,
    slots: Mapping[str, HookSlot],
    inputs: tuple[Any, ...],
) -> tuple[Any, dict[str, Any]]:
    slots = dict(slots)
    for name in captured:
        slots[name] = dataclasses.replace(slots.get(name, HookSlot(HookPoint(name))), captured=True)
    with matmul_precision(module.cfg):
        return apply_with_slots(module, params, slots, *inputs)


_apply_compiled = jax.jit(_apply, static_argnums=(0, 1))


def _call_compiled(
    stage: Stage, captured: tuple[str, ...], slots: Mapping[str, HookSlot], inputs: tuple[Any, ...]
) -> tuple[Any, dict[str, Any]]:
    try:
        return _apply_compiled(stage.module, captured, stage.params, slots, inputs)
    except jax.errors.UnexpectedTracerError as error:
        raise leaked_tracer(stage.prefix + " or ".join(slots)) from error


def run_stage(stage: Stage, inputs: tuple[Any, ...], traced: bool) -> tuple[Any, dict[str, Any]]:
    """Runs one stage.

    Args:
        stage: what to run.
        inputs: arguments of its module; the first is the activation that flows through.
        traced: whether a caller's trace is under way.

    Returns:
        The stage's output, and the captured activations by relative name.
    """
    slots = stage.slots
    python_forward = [name for name, slot in slots.items() if not all(map(is_compiled, slot.forward))]
    python_backward = any(not all(map(is_compiled, slot.backward)) for slot in slots.values())
    heads_read_apart = attention_input((*slots, *stage.captured)) == "split"
    fires_often = any(name.startswith(_SEVERAL_TIMES) for name in python_forward)
    if python_backward or (fires_often and heads_read_apart) or (traced and python_forward):
        return _apply(stage.module, stage.captured, stage.params, slots, inputs)
    if python_forward:
        return _run_with_python_hooks(stage, python_forward, inputs)
    return _call_compiled(stage, stage.captured, slots, inputs)


def _run_with_python_hooks(stage: Stage, hooked: Sequence[str], inputs: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
    """Runs a stage some of whose hooks are plain Python functions, which get concrete arrays and may do anything.

    The compiled stage records each such point; the function is called on the value; only if it returned a new one does
    the stage run again with that value put in place, so reading costs nothing and writing costs one more block. Hooks
    at the stage's first and last point need no second run.
    """
    slots = dict(stage.slots)
    seen: dict[str, Any] = {}
    pending = list(hooked)
    if stage.entry in pending:
        inputs = (slots.pop(stage.entry).apply(inputs[0]), *inputs[1:])
        pending.remove(stage.entry)
    tails: dict[str, HookSlot] = {}
    for name in pending:
        slots[name], tails[name] = _split_at_python(name, slots[name])

    def run() -> tuple[Any, dict[str, Any]]:
        names = dict.fromkeys((*stage.captured, *pending))
        return _call_compiled(stage, tuple(names), slots, inputs)

    output, recorded = run()
    seen |= recorded
    while pending:
        name = pending.pop(0)
        value = seen[name]
        changed = tails[name].apply(value)
        seen[name] = changed
        if changed is value:
            continue
        slots[name] = HookSlot(HookPoint(name, slots[name].point.axes), (Replace(changed),), slots[name].backward)
        if name == stage.exit:
            output = changed
        else:
            output, recorded = run()
            seen |= recorded
    return output, {name: seen[name] for name in stage.captured}


def _split_at_python(relative: str, slot: HookSlot) -> tuple[HookSlot, HookSlot]:
    """The part of a slot before its first Python function, to compile, and the rest, to call.

    The compiled part is told the block-relative name where only interventions are in it, as in ``make_slot``.
    """
    first = next(n for n, function in enumerate(slot.forward) if not is_compiled(function))
    compiled = (*slot.forward[:first], *slot.backward)
    anonymous = all(isinstance(function, Intervention) for function in compiled)
    point = HookPoint(relative, slot.point.axes) if anonymous else slot.point
    head = dataclasses.replace(slot, point=point, forward=slot.forward[:first])
    return head, dataclasses.replace(slot, forward=slot.forward[first:], backward=())


@functools.lru_cache(maxsize=1024)
def _group_names(names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Full names by stage, as names relative to it."""
    groups: dict[str, list[str]] = {}
    for name in names:
        stage, relative = stage_of(name)
        groups.setdefault(stage, []).append(relative)
    return {stage: tuple(relative) for stage, relative in groups.items()}


def _group_entries(hooks: HookDictionary) -> dict[str, dict[str, list[HookEntry]]]:
    groups: dict[str, dict[str, list[HookEntry]]] = {}
    for entry in hooks.entries:
        stage, relative = stage_of(entry.name)
        groups.setdefault(stage, {}).setdefault(relative, []).append(entry)
    return groups


def attention_input(names: Sequence[str]) -> AttentionInput:
    """How a block calls ln1, given the relative names of the points in use there."""
    if any(name in names for name in ("hook_q_input", "hook_k_input", "hook_v_input")):
        return "split"
    return "per_head" if "hook_attn_in" in names else "shared"


def _make_slots(
    cfg: HookedTransformerConfig, stage: str, entries: Mapping[str, list[HookEntry]], captured: Sequence[str]
) -> dict[str, HookSlot]:
    if not entries:
        return {}
    if stage == _EMBEDDING:
        specs, prefix = embedding_points(cfg), ""
    elif stage == _HEAD:
        specs, prefix = head_points(cfg), ""
    else:
        kind = cfg.layer_kind(int(stage.split(".")[1]))
        specs, prefix = block_points(cfg, kind, attention_input((*entries, *captured))), stage
    return {
        spec.name: make_slot(spec.name, spec, prefix + spec.name, entries[spec.name])
        for spec in specs
        if spec.name in entries
    }


def run_forward(
    cfg: HookedTransformerConfig,
    params: Params,
    value: jax.Array | np.ndarray,
    context: AttentionContext,
    *,
    hooks: HookDictionary,
    names: tuple[str, ...] = (),
    start: int | None = None,
    stop: int | None = None,
    keep: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Runs the model, or a range of its blocks.

    Args:
        cfg: the model's config.
        params: its parameters.
        value: token ids ``[batch, pos]``, or with ``start`` the residual stream ``[batch, pos, d_model]`` entering it.
        context: positions and padding.
        hooks: what to apply.
        names: full names of the points to record.
        start: first block to run; ``None`` starts at the tokens.
        stop: block to stop before; ``None`` runs to the logits.
        keep: applied to the recorded activations of each stage as they come (slice, move to another device).

    Returns:
        Logits ``[batch, pos, d_vocab_out]``, or with ``stop`` the residual stream ``[batch, pos, d_model]``; and the
        recorded activations by full name, in firing order.
    """
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((params, value, context, hooks)))
    cache: dict[str, Any] = {}
    shortformer, positions = cfg.positional_embedding_type == "shortformer", None
    unasked = shortformer and start is None and POSITIONS not in names
    if shortformer and start is not None and start < cfg.n_layers:
        positions = embed_positions(embedding_module(cfg), params["pos_embed"], value, context)
    for stage, inputs in _stages(cfg, params, context, hooks, (*names, POSITIONS) if unasked else names, start, stop):
        if shortformer and stage.entry is not None:  # a block
            inputs = (dataclasses.replace(inputs[0], pos_embed=positions),)
        value, recorded = run_stage(stage, (value, *inputs), traced)
        positions = recorded.get(POSITIONS, positions)
        wanted = [name for name in stage.captured if not (unasked and name == POSITIONS)]
        recorded = {stage.prefix + name: recorded[name] for name in wanted}
        cache |= keep(recorded) if keep is not None and recorded else recorded
    return value, cache


@functools.partial(jax.jit, static_argnums=0)
def embed_positions(module: EmbeddingStage, params: Params, stream: jax.Array, context: AttentionContext) -> jax.Array:
    """Position embeddings ``[batch, pos, d_model]`` of a residual stream that a shortformer's run starts at."""
    alone = dataclasses.replace(context, past=None, pasts=None, window=None)
    embedded: Any = module.apply({"params": {"pos_embed": params}}, stream[..., 0], alone, method="embed_positions")
    return embedded


def _stages(
    cfg: HookedTransformerConfig,
    params: Params,
    context: AttentionContext,
    hooks: HookDictionary,
    names: tuple[str, ...],
    start: int | None,
    stop: int | None,
) -> Iterator[tuple[Stage, tuple[Any, ...]]]:
    captured, entries = _group_names(names), _group_entries(hooks)

    def parts(key: str) -> tuple[tuple[str, ...], dict[str, HookSlot]]:
        wanted = captured.get(key, ())
        slots = _make_slots(cfg, key, entries.get(key, {}), wanted)
        return wanted, {name: _in_text(slot, context) for name, slot in slots.items()}

    if start is None:
        own = {key: params[key] for key in ("embed", "pos_embed") if key in params}
        alone = dataclasses.replace(context, pasts=None, window=None, text=None)
        yield Stage(embedding_module(cfg), own, "", *parts(_EMBEDDING)), (alone,)
    for layer in range(start or 0, cfg.n_layers if stop is None else stop):
        prefix = f"blocks.{layer}."
        module = block_module(cfg, cfg.layer_kind(layer))
        stage = Stage(module, params["blocks"][layer], prefix, *parts(prefix), "hook_resid_pre", "hook_resid_post")
        yield stage, (context_of_layer(cfg, context, layer),)
    if stop is None:
        own = {key: params[key] for key in ("ln_final", "unembed") if key in params}
        last = "unembed.hook_out" if cfg.output_logits_soft_cap <= 0 and cfg.logits_multiplier == 1.0 else None
        yield Stage(head_module(cfg), own, "", *parts(_HEAD), None, last), ()


def _in_text(slot: HookSlot, context: AttentionContext) -> HookSlot:
    """A slot that knows which part of which text its activation holds, as far as its hooks need that."""
    counts = any(isinstance(function, Intervention) and function.counts_positions
                 for function in (*slot.forward, *slot.backward))  # fmt: skip
    text = context.text if counts else None
    if context.window is None and text is None:
        return slot
    return dataclasses.replace(slot, window=context.window, text=text)


def context_of_layer(cfg: HookedTransformerConfig, context: AttentionContext, layer: int) -> AttentionContext:
    """The context with what is this layer's own, as data: layers still share one executable."""
    if context.pasts is not None or context.window is not None or context.text is not None:
        past = None if context.pasts is None else context.pasts[layer]
        context = dataclasses.replace(context, past=past, pasts=None, window=None, text=None)
    if not cfg.scale_attn_by_inverse_layer_idx:
        return context
    return dataclasses.replace(context, score_divisor=np.float32(layer + 1))
