"""The forward driver: embedding, blocks, unembedding, each one compiled program, with hooks and captures between.

The compiled unit is the block. Its executable depends on the module, the captured names and the structure of its
hooks, never on the layer's index or on any number, so equal-shaped layers share it and new values reuse it. Plain
Python hooks run between compiled programs on concrete arrays. Under a user's own trace (``jit``, ``grad``, ``vmap``)
the same code is traced into theirs.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import is_traced
from tljax.config import HookedTransformerConfig, LayerKind
from tljax.hooks.dictionary import HookDictionary, HookEntry, make_slot
from tljax.hooks.intervention import Intervention
from tljax.hooks.interventions import Replace
from tljax.hooks.point import HookPoint, HookSlot, apply_with_slots, is_compiled, leaked_tracer
from tljax.hooks.points import (
    EMBEDDING,
    ENTRY,
    EXIT,
    HEAD,
    HookPointSpec,
    attention_input,
    block_points,
    embedding_points,
    head_points,
    stage_of,
)
from tljax.modules.block import TransformerBlock
from tljax.modules.context import AttentionContext
from tljax.modules.embedding import EmbeddingStage, HeadStage
from tljax.numerics import matmul_precision
from tljax.typing import Params

POSITIONS = "hook_pos_embed"


@functools.lru_cache(maxsize=256)
def _module(make: Callable[..., Any], computation: HookedTransformerConfig, *static: Any) -> Any:
    """One object for all equal modules, which is what compiled programs are found by."""
    return make(computation, *static)


def block_module(cfg: HookedTransformerConfig, kind: LayerKind) -> TransformerBlock:
    """The block of a config; one object for all layers of a kind, and for all models that compute the same."""
    return _module(TransformerBlock, cfg.computation, kind)


def embedding_module(cfg: HookedTransformerConfig) -> EmbeddingStage:
    """The embedding stage of a config."""
    return _module(EmbeddingStage, cfg.computation)


def head_module(cfg: HookedTransformerConfig) -> HeadStage:
    """The final norm and unembedding of a config."""
    return _module(HeadStage, cfg.computation)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One compiled step of the forward pass.

    Attributes:
        module: the Linen module.
        params: its parameters.
        prefix: what its points' full names start with.
        captured: points to record, by relative name, in firing order.
        slots: hooks by relative name, in firing order.
        repeated: those of the hooked points that fire several times.
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
    repeated: frozenset[str] = frozenset()


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
    if python_backward or not stage.repeated.isdisjoint(python_forward) or (traced and python_forward):
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


def _hooked_rows(
    cfg: HookedTransformerConfig, stage: str, hooked: Collection[str], captured: Sequence[str]
) -> tuple[list[HookPointSpec], frozenset[str]]:
    """The rows of a stage's hooked points as they are in this run, and the names of those that fire several times."""
    if not hooked:
        return [], frozenset()
    if stage in (EMBEDDING, HEAD):
        rows, repeated = (embedding_points(cfg) if stage == EMBEDDING else head_points(cfg)), frozenset[str]()
    else:
        kind = cfg.layer_kind(int(stage.split(".")[1]))
        form = attention_input(block_points(cfg, kind), (*hooked, *captured))
        rows = block_points(cfg, kind, form)
        repeated = frozenset(row.name for row in rows if form == "split" and len(row.read_by) > 1)
    return [row for row in rows if row.name in hooked], repeated


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
    traced = is_traced(params, value, context, hooks)
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

    def stage_at(module: nn.Module, own: Params, key: str, entry: str | None = None, exit: str | None = None) -> Stage:
        here, wanted, prefix = entries.get(key, {}), captured.get(key, ()), key if key.startswith("blocks.") else ""
        rows, repeated = _hooked_rows(cfg, key, here, wanted)
        slots = {row.name: make_slot(row.name, row, prefix + row.name, here[row.name]) for row in rows}
        slots = {name: _in_text(slot, context) for name, slot in slots.items()}
        return Stage(module, own, prefix, wanted, slots, entry, exit, repeated)

    if start is None:
        own = {key: params[key] for key in ("embed", "pos_embed") if key in params}
        alone = dataclasses.replace(context, pasts=None, window=None, text=None)
        yield stage_at(embedding_module(cfg), own, EMBEDDING), (alone,)
    for layer in range(start or 0, cfg.n_layers if stop is None else stop):
        module = block_module(cfg, cfg.layer_kind(layer))
        stage = stage_at(module, params["blocks"][layer], f"blocks.{layer}.", ENTRY, EXIT)
        yield stage, (context_of_layer(cfg, context, layer),)
    if stop is None:
        own = {key: params[key] for key in ("ln_final", "unembed") if key in params}
        last = "unembed.hook_out" if cfg.output_logits_soft_cap <= 0 and cfg.logits_multiplier == 1.0 else None
        yield stage_at(head_module(cfg), own, HEAD, exit=last), ()


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


def init_params(cfg: HookedTransformerConfig, seed: int = 0) -> Params:
    """Draws fresh parameters.

    Args:
        cfg: shapes and init mode; ``d_vocab`` must be known. Without ``init_weights`` everything is zero.
        seed: the random seed.

    Returns:
        The parameter tree.
    """
    keys = jax.random.split(jax.random.key(seed), cfg.n_layers + 2)
    tokens = np.zeros((1, 1), np.int32)
    residual = np.zeros((1, 1, cfg.d_model), cfg.jnp_dtype)
    context = AttentionContext()
    if cfg.positional_embedding_type == "shortformer":
        context = AttentionContext(pos_embed=jnp.zeros_like(residual))

    made = _draw if cfg.init_weights else _zeros
    drawn = dataclasses.replace(cfg.computation, init_mode=cfg.init_mode, initializer_range=cfg.initializer_range)
    blocks = tuple(
        made(_module(TransformerBlock, drawn, kind), key, residual, context)
        for kind, key in zip(cfg.layer_kinds, keys[2:], strict=True)
    )
    embedding = made(_module(EmbeddingStage, drawn), keys[0], tokens, context)
    head = made(_module(HeadStage, drawn), keys[1], residual)
    return {**embedding, "blocks": blocks, **head}


@functools.partial(jax.jit, static_argnums=0)
def _draw(module: nn.Module, key: jax.Array, *inputs: Any) -> Params:
    return dict(module.init(key, *inputs)).get("params", {})


def _zeros(module: nn.Module, key: jax.Array, *inputs: Any) -> Params:
    shapes = jax.eval_shape(functools.partial(_draw, module), key, *inputs)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
