"""The forward driver: embedding, blocks, unembedding, each one compiled program (:mod:`tljax.forward.stages`).

The loop over layers is Python's, and can start and stop anywhere. Under a user's own trace (``jit``, ``grad``,
``vmap``) the same code is traced into theirs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from tljax.config import HookedTransformerConfig
from tljax.forward.stages import Stage, attention_input, block_module, embedding_module, head_module, run_stage
from tljax.hooks.dictionary import HookDictionary, HookEntry, make_slot
from tljax.hooks.intervention import Intervention
from tljax.hooks.names import stage_of
from tljax.hooks.point import HookSlot
from tljax.hooks.points import block_points, embedding_points, head_points
from tljax.modules.context import AttentionContext
from tljax.modules.embedding import EmbeddingStage
from tljax.modules.products import LAYOUTS
from tljax.typing import Params

_EMBEDDING, _HEAD = "embedding", "head"
POSITIONS = "hook_pos_embed"


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
    layouts: Params | None = None,
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
        layouts: other layouts of some of the parameters, by the same paths.
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
    asked = (*names, POSITIONS) if unasked else names
    for stage, inputs in _stages(cfg, params, layouts or {}, context, hooks, asked, start, stop):
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
    layouts: Params,
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
        variables = {"params": _part(params, "embed", "pos_embed")}
        alone = dataclasses.replace(context, pasts=None, window=None, text=None)
        yield Stage(embedding_module(cfg), variables, "", *parts(_EMBEDDING)), (alone,)
    laid_out = layouts.get("blocks", ({},) * cfg.n_layers)
    for layer in range(start or 0, cfg.n_layers if stop is None else stop):
        prefix = f"blocks.{layer}."
        module = block_module(cfg, cfg.layer_kind(layer))
        variables = {"params": params["blocks"][layer], LAYOUTS: laid_out[layer]}
        stage = Stage(module, variables, prefix, *parts(prefix), "hook_resid_pre", "hook_resid_post")
        yield stage, (context_of_layer(cfg, context, layer),)
    if stop is None:
        variables = {"params": _part(params, "ln_final", "unembed"), LAYOUTS: _part(layouts, "unembed")}
        last = "unembed.hook_out" if cfg.output_logits_soft_cap <= 0 and cfg.logits_multiplier == 1.0 else None
        yield Stage(head_module(cfg), variables, "", *parts(_HEAD), None, last), ()


def _part(tree: Params, *keys: str) -> Params:
    return {key: tree[key] for key in keys if key in tree}


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
