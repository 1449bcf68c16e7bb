"""The forward driver: embedding, blocks, unembedding, each one compiled program (:mod:`tljax.forward.stages`).

The loop over layers runs in Python, and can start and stop anywhere. Under a user's own ``jit``, ``grad`` or ``vmap``
the same code becomes part of their trace.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import is_traced
from tljax.config import HookedTransformerConfig
from tljax.dictionary_params import DICTIONARIES
from tljax.errors import InputError
from tljax.forward.stages import Stage, run_stage
from tljax.hooks.dictionary import HookDictionary, HookEntry, make_slot
from tljax.hooks.intervention import Intervention
from tljax.hooks.point import HookSlot
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
from tljax.hooks.splices import value_after
from tljax.modules.context import AttentionContext
from tljax.modules.embedding import EmbeddingStage
from tljax.modules.products import LAYOUTS
from tljax.modules.stack import block_module, embedding_module, head_module
from tljax.offload import Deferred, HostBlock, Walk, is_offloaded
from tljax.scale.batch import kept_spread, spread
from tljax.splice import Splice
from tljax.typing import Params

POSITIONS = "hook_pos_embed"


@functools.lru_cache(maxsize=1024)
def _group_names(names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Groups full names by stage, as names relative to it."""
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
    """Returns a stage's hooked points as they are in this run, and the names of those that fire several times."""
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


def rows_of_run(cfg: HookedTransformerConfig, names: Sequence[str], hooks: HookDictionary) -> dict[str, HookPointSpec]:
    """Returns the points of a run that have one gradient, as they are in this run, by full name in firing order.

    Left out are points that hold whole numbers, and those that fire several times: ``ln1``, where queries, keys and
    values have inputs of their own.

    Args:
        cfg: the model's config.
        names: the points, which the run also records.
        hooks: the hooks of the run; where they sit decides how a block calls ``ln1``.
    """
    named, found = set(names), {}
    for stage, relative in _group_names((*names, *(entry.name for entry in hooks.entries))).items():
        prefix = stage if stage.startswith("blocks.") else ""
        rows, repeated = _hooked_rows(cfg, stage, relative, ())
        once = {prefix + row.name: row for row in rows if not row.holds_numbers and row.name not in repeated}
        found |= {name: row for name, row in once.items() if name in named}
    return {name: found[name] for name in names if name in found}


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
    remat: bool = False,
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
        remat: whether a backward pass recomputes each stage, so that it keeps no more than the residual streams between
            them.

    Returns:
        Logits ``[batch, pos, d_vocab_out]``, or with ``stop`` the residual stream ``[batch, pos, d_model]``; and the
        recorded activations by full name, in firing order.
    """
    traced = is_traced(params, value, context, hooks)
    remat = remat and traced
    layers = range(start or 0, cfg.n_layers if stop is None else stop)
    blocks = Deferred(params["blocks"]) if remat and is_offloaded(params) else Walk(params.get("blocks", ()), layers)
    value = value if traced else spread(value, params, positions=True)
    cache: dict[str, Any] = {}
    shortformer, positions = cfg.positional_embedding_type == "shortformer", None
    unasked = shortformer and start is None and POSITIONS not in names
    if shortformer and start is not None and start < cfg.n_layers:
        positions = embed_positions(embedding_module(cfg), params["pos_embed"], value, context)
    asked = (*names, POSITIONS) if unasked else names
    if start is None and context.tokens is None and excludes_tokens(cfg):
        context = dataclasses.replace(context, tokens=jnp.asarray(value))
    for stage, inputs in _stages(cfg, params, layouts or {}, context, hooks, asked, start, stop, blocks):
        if shortformer and stage.entry is not None:  # a block
            inputs = (dataclasses.replace(inputs[0], pos_embed=positions),)
        entering = value
        value, recorded = run_stage(stage, (entering, *inputs), traced, remat)
        if stage.entry is not None:
            blocks.ahead(entering)
        value = value if traced else kept_spread(value, entering)
        positions = recorded.get(POSITIONS, positions)
        wanted = [name for name in stage.captured if not (unasked and name == POSITIONS)]
        recorded = {stage.prefix + name: recorded[name] for name in wanted}
        cache |= keep(recorded) if keep is not None and recorded else recorded
    return value, cache


@functools.partial(jax.jit, static_argnums=0)
def embed_positions(module: EmbeddingStage, params: Params, stream: jax.Array, context: AttentionContext) -> jax.Array:
    """Returns position embeddings ``[batch, pos, d_model]`` for a shortformer run that starts at a residual stream."""
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
    blocks: "Walk | Deferred",
) -> Iterator[tuple[Stage, tuple[Any, ...]]]:
    captured, entries = _group_names(names), _group_entries(hooks)

    def stage_at(
        module: nn.Module,
        own: Params | HostBlock,
        other: Params,
        key: str,
        entry: str | None = None,
        exit: str | None = None,
    ) -> Stage:
        here, wanted, prefix = entries.get(key, {}), captured.get(key, ()), key if key.startswith("blocks.") else ""
        rows, repeated = _hooked_rows(cfg, key, here, wanted)
        slots = {row.name: make_slot(row.name, row, prefix + row.name, here[row.name]) for row in rows}
        slots = {name: _in_text(slot, context) for name, slot in slots.items()}
        return Stage(module, {"params": own, LAYOUTS: other}, prefix, wanted, slots, entry, exit, repeated)

    if start is None:
        alone = dataclasses.replace(context, pasts=None, window=None, text=None)
        alone = _with_needed_tokens(alone, cfg.embedding_splices)
        own = _part(params, "embed", "pos_embed", DICTIONARIES)
        yield stage_at(embedding_module(cfg), own, {}, EMBEDDING), (alone,)
    laid_out = layouts.get("blocks", ({},) * cfg.n_layers)
    for layer in range(start or 0, cfg.n_layers if stop is None else stop):
        module = block_module(cfg, layer)
        last = value_after(EXIT, module.splices)
        stage = stage_at(module, blocks.take(layer), laid_out[layer], f"blocks.{layer}.", ENTRY, last)
        yield stage, (context_of_layer(cfg, context, layer),)
    if stop is None:
        own, other = _part(params, "ln_final", "unembed"), _part(layouts, "unembed")
        last = "unembed.hook_out" if cfg.output_logits_soft_cap <= 0 and cfg.logits_multiplier == 1.0 else None
        yield stage_at(head_module(cfg), own, other, HEAD, exit=last), ()


def block_stage(
    cfg: HookedTransformerConfig, params: Params, context: AttentionContext, hooks: HookDictionary, layer: int
) -> tuple[Stage, tuple[Any, ...]]:
    """Returns one block as a stage, and its inputs besides the residual stream; a shortformer's need ``pos_embed``."""
    blocks = Walk(params["blocks"], [layer])
    return next(_stages(cfg, params, {}, context, hooks, (), layer, layer + 1, blocks))


def embedding_stage(
    cfg: HookedTransformerConfig, params: Params, context: AttentionContext, hooks: HookDictionary
) -> tuple[Stage, tuple[Any, ...]]:
    """Returns the embedding as a stage, and its inputs besides the tokens."""
    return next(_stages(cfg, params, {}, context, hooks, (), None, 0, Walk(params["blocks"], ())))


def _part(tree: Params, *keys: str) -> Params:
    return {key: tree[key] for key in keys if key in tree}


def _in_text(slot: HookSlot, context: AttentionContext) -> HookSlot:
    """Returns the slot with the run's window, and with the text's padding mask if its interventions need it."""
    counts = any(isinstance(function, Intervention) and function.counts_positions
                 for function in (*slot.forward, *slot.backward))  # fmt: skip
    text = context.text if counts else None
    if context.window is None and text is None:
        return slot
    return dataclasses.replace(slot, window=context.window, text=text)


def context_of_layer(cfg: HookedTransformerConfig, context: AttentionContext, layer: int) -> AttentionContext:
    """Returns the context with this layer's own past and divisor, as data, so that layers share one executable."""
    if context.pasts is not None or context.window is not None or context.text is not None:
        past = None if context.pasts is None else context.pasts[layer]
        context = dataclasses.replace(context, past=past, pasts=None, window=None, text=None)
    context = _with_needed_tokens(context, cfg.layer_kinds[layer].splices)
    if not cfg.scale_attn_by_inverse_layer_idx:
        return context
    return dataclasses.replace(context, score_divisor=np.float32(layer + 1))


def excludes_tokens(cfg: HookedTransformerConfig) -> bool:
    """Whether a dictionary spliced into the model leaves out some tokens, so that runs have to know theirs."""
    return any(splice.exclude_tokens for splice in cfg.splices)


def _with_needed_tokens(context: AttentionContext, splices: Sequence[Splice]) -> AttentionContext:
    """Returns the context with tokens only where dictionaries of a stage leave some of them out.

    Raises:
        InputError: they do, and the tokens are unknown.
    """
    needed = any(splice.exclude_tokens for splice in splices)
    if needed and context.tokens is None:
        raise InputError(
            f"The dictionary at {splices[0].writes} leaves out some tokens (exclude_tokens), and this run starts from "
            "a residual stream, whose tokens are unknown. Pass tokens= as well, or splice without exclude_tokens."
        )
    return context if needed or context.tokens is None else dataclasses.replace(context, tokens=None)
