"""Runs the packed batches of a sweep, block by block, and hands the final residual streams to the metrics."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tljax.config import HookedTransformerConfig
from tljax.forward.forward import context_of_layer
from tljax.forward.stages import Stage, run_stage
from tljax.hooks.point import HookPoint, HookSlot
from tljax.hooks.points import ENTRY, block_points
from tljax.model.hooked_transformer import HookedTransformer
from tljax.modules.attention import KEYS_AND_VALUES
from tljax.modules.context import AttentionContext
from tljax.modules.packing import Packing
from tljax.modules.stack import block_module
from tljax.offload import Walk
from tljax.patching.engine.base_run import BaseRun
from tljax.patching.engine.edits import Edits, TakeRows
from tljax.patching.engine.packing import (
    BatchLayout,
    BatchLimits,
    BlockRun,
    PackedBatch,
    Programs,
    Rows,
    lay_out,
    plan_batches,
)
from tljax.patching.engine.report import block_flops, block_flops_per_token
from tljax.processes import as_numpy
from tljax.scale.batch import gathered, kept_spread, on_devices
from tljax.scale.mesh import mesh_of
from tljax.sizes import next_packed_size
from tljax.text.padding import pad_axis
from tljax.typing import Params

_OVERHEAD = 90
"""Fixed cost of running a block once, in tokens."""


@dataclasses.dataclass(frozen=True)
class Reach:
    """The positions of a run that the metric depends on.

    Attributes:
        end: one past the last position that the metric reads (or that such a position attends to).
        only: the one position the metric reads, or ``None`` if it reads several.
    """

    end: int
    only: int | None


def reach_of(cfg: HookedTransformerConfig, length: int, positions: tuple[int, ...] | None) -> Reach:
    """Returns the reach of a metric that reads ``positions`` (``None``: all) of prompts of ``length`` tokens."""
    only = positions[0] if positions is not None and len(positions) == 1 else None
    if cfg.attention_dir != "causal" or positions is None:
        return Reach(length, only)
    return Reach(max(positions, default=0) + 1, only)


@dataclasses.dataclass
class Spent:
    """FLOPs of a sweep's blocks, counted as they run."""

    flops: float = 0.0
    floor: float = 0.0


class Engine:
    """Runs rows of a sweep against one base run.

    Args:
        model: the model; hooks it carries are not applied.
        base: the unpatched run.
        reach: positions that the metric depends on.
        limits: largest sizes of packed batches.
        advance: called after each block with the work done since the last call, in runs.
    """

    def __init__(
        self,
        model: HookedTransformer,
        base: BaseRun,
        reach: Reach,
        limits: BatchLimits,
        advance: Callable[[float], None] = lambda runs: None,
    ) -> None:
        self.cfg, self.params = model.cfg, model.params
        self.base, self.reach, self.limits, self.advance = base, reach, limits, advance
        self.spent = Spent()
        self._first = 0

    def run(self, rows: Rows, edits: Edits, first: int, n_sites: int) -> np.ndarray:
        """Computes the final residual streams of some sites.

        Args:
            rows: rows whose change reaches the metric; every other prompt of a site ends as in the base run.
            edits: what the rows change.
            first, n_sites: the first site, and how many there are.

        Returns:
            ``[site, batch, pos, d_model]``, with only position ``reach.only`` if the metric reads just one.
        """
        final = as_numpy(self.base.final)
        only = self.reach.only
        kept = final[:, : self.base.length] if only is None else final[:, only : only + 1]
        finals = np.tile(kept[None], (n_sites, 1, 1, 1))
        self._first = first
        at_end = rows.layer == self.cfg.n_layers
        enter(finals, rows.take(np.flatnonzero(at_end)), edits, only, first)
        self.advance(float(at_end.sum()))
        running = rows.take(np.flatnonzero(~at_end))
        top = self.cfg.n_layers
        for packed in self._plan(running, edits, top, only):
            for layer, layout, stream in self._climb(packed, edits, top, only):
                self.advance(packed.n_rows / (top - packed.layer))
                if layer == top:
                    self._collect(layout, as_numpy(stream), finals, only)
        self.spent.floor += floor_flops(self.cfg, running, self.reach)
        return finals

    def streams(self, rows: Rows, edits: Edits, n_sites: int, layers: Sequence[int]) -> dict[int, np.ndarray]:
        """Computes the residual stream of each site entering some layers (or leaving the last one), at every position.

        Args:
            rows, edits, n_sites: as in :meth:`run`, the first site being 0. Rows whose change enters the stream at one
                of ``layers`` itself are left to :func:`enter`.
            layers: the layers; ``n_layers`` means the final residual stream.

        Returns:
            For each layer, ``[site, batch, pos, d_model]``.
        """
        kept = {layer: as_numpy(self.base.residual(layer))[:, : self.base.length] for layer in layers}
        streams = {layer: np.tile(stream[None], (n_sites, 1, 1, 1)) for layer, stream in kept.items()}
        top = max(layers)
        below = rows.take(np.flatnonzero(rows.layer < top))
        for packed in self._plan(below, edits, top, None):
            for layer, layout, stream in self._climb(packed, edits, top, None):
                self.advance(packed.n_rows / (top - packed.layer))
                if layer in streams:
                    self._collect(layout, as_numpy(stream), streams[layer], None)
        return streams

    def _plan(self, rows: Rows, edits: Edits, top: int, only: int | None) -> list[PackedBatch]:
        mesh = mesh_of(self.params)
        programs = _programs(self.cfg.computation, self.base.batch, self.base.padded_length, edits.signature, mesh)
        return plan_batches(rows, self.reach.end, (top, self._narrow(only)), self.limits, programs)

    def _narrow(self, only: int | None) -> int | None:
        """Returns the block that computes only one token a row; ``None`` if there is none."""
        return None if only is None else self.cfg.n_layers - 1

    def _collect(self, layout: BatchLayout, stream: np.ndarray, finals: np.ndarray, only: int | None) -> None:
        rows = layout.rows
        if only is not None:
            finals[rows.site - self._first, rows.prompt, 0] = stream[layout.is_row]
            return
        row, prompt, pos, _, real = layout.tokens(last=False)
        finals[rows.site[row[real]] - self._first, prompt[real], pos[real]] = stream[real]

    def _climb(
        self, packed: PackedBatch, edits: Edits, top: int, only: int | None
    ) -> Iterator[tuple[int, BatchLayout, jax.Array]]:
        """Runs a packed batch up to block ``top``.

        Yields:
            After each block, the number of the next layer, the layout of the tokens, and the residual stream entering
            that layer, ``[lane, token, d_model]``. With ``only``, the stream after the model's last block has one
            position a row, ``[lane, row, d_model]``.
        """
        stream, entered = None, np.zeros(len(packed.lanes), int)
        blocks = Walk(self.params["blocks"], range(packed.layer, top))
        for layer in range(packed.layer, top):
            read = self.reach.end - 1 if only is None else only
            layout = lay_out(packed, layer, self.base.padded_length, self.reach.end, read)
            queries = np.asarray([only], np.int32) if layer == self._narrow(only) else None
            slots = edits.slots(layer, layout, queries)
            newcomers = (np.arange(layout.n_tokens) >= entered[:, None])[..., None]
            take_in = TakeRows(self.base.residual(layer), layout.source, [newcomers])
            slots[ENTRY] = (take_in, *slots.get(ENTRY, ()))
            entered = layout.entered
            fitted = self._fit(stream, layout)
            stream = self._run_block(layer, blocks.take(layer), fitted, layout, slots, queries)
            blocks.ahead(fitted)
            yield layer + 1, layout, stream

    def _run_block(
        self,
        layer: int,
        params: Params,
        stream: jax.Array,
        layout: BatchLayout,
        edits: Mapping[str, tuple[TakeRows, ...]],
        queries: np.ndarray | None,
    ) -> jax.Array:
        cfg = self.cfg
        indices = self._indices(layout, queries)
        axes = {spec.name: spec.axes for spec in block_points(cfg, cfg.layer_kind(layer))}
        slots = {
            name: HookSlot(HookPoint(name, axes[name]), tuple(one.beside(self.params) for one in written))
            for name, written in edits.items()
            if name in axes
        }
        k, v = (self.base.activations[f"blocks.{layer}.{name}"] for name in KEYS_AND_VALUES)
        packing = Packing(gathered(k, self.params), gathered(v, self.params), **indices["packing"])
        placed, tokens = self.base.context.pos_embed, self.base.context.tokens
        context = AttentionContext(
            indices["positions"], indices["token_mask"], lengths=indices["lengths"], packing=packing,
            pos_embed=None if placed is None else _taken(placed, layout.source),
            tokens=None if tokens is None else tokens.reshape(-1)[layout.source],
        )  # fmt: skip
        module = block_module(cfg, layer)
        stage = Stage(module, {"params": params}, f"blocks.{layer}.", (), slots)
        computed = layout.n_tokens if queries is None else layout.n_rows
        columns = self.base.padded_length if queries is None else 1
        size = layout.n_tokens, computed, layout.n_rows, columns, self.base.padded_length
        self.spent.flops += layout.lanes * block_flops(cfg, *size)
        after = run_stage(stage, (stream, context_of_layer(cfg, context, layer)), traced=False)[0]
        return kept_spread(after, stream)

    def _fit(self, stream: jax.Array | None, layout: BatchLayout) -> jax.Array:
        """Cuts or pads a stream ``[lane, token, d_model]`` to a layout's tokens; returns zeros if there is none yet.

        It resizes from one standard size to the next, so that programs exist for neighbouring sizes, not for all pairs.
        """
        if stream is None:
            final = self.base.final
            zeros = np.zeros((layout.lanes, layout.n_tokens, final.shape[-1]), final.dtype)
            return on_devices(zeros, self.params)
        fitted: jax.Array = stream
        while fitted.shape[1] != layout.n_tokens:
            fitted = kept_spread(_resize(fitted, next_packed_size(fitted.shape[1], layout.n_tokens)), fitted)
        return fitted

    def _indices(self, layout: BatchLayout, queries: np.ndarray | None) -> dict[str, Any]:
        """Puts positions, mask and layout of a packed batch on the device; ``queries`` as in :meth:`Edits.slots`."""
        base, whole = self.base.context, queries is None
        rows = np.broadcast_to(np.arange(layout.n_rows, dtype=np.int32), (layout.lanes, layout.n_rows))
        packing = {
            "key_source": layout.key_source,
            "query_source": layout.query_source if whole else rows[..., None],
            "slot": layout.row * np.int32(self.base.padded_length) + layout.pos if whole else rows,
            "computed": None if whole else layout.last,
        }
        positions, mask = as_numpy(base.positions), as_numpy(base.token_mask)
        lengths = np.broadcast_to(positions.max(axis=1, keepdims=True) + np.int32(1), positions.shape)
        positions, lengths = (array.reshape(-1)[layout.source] for array in (positions, lengths))
        tokens = {"positions": positions, "lengths": lengths, "token_mask": mask[layout.prompt.reshape(-1)]}
        by_lane = on_devices({"packing": packing, **tokens}, self.params)
        query_pos = jax.device_put(np.arange(self.base.padded_length, dtype=np.int32) if whole else queries)
        return by_lane | {"packing": by_lane["packing"] | {"query_pos": gathered(query_pos, self.params)}}


def floor_flops(cfg: HookedTransformerConfig, rows: Rows, reach: Reach) -> float:
    """Returns the least FLOPs that an exact sweep of some rows can spend in blocks."""
    layers = np.maximum(cfg.n_layers - (reach.only is not None) - rows.layer, 0)
    return float((layers * np.maximum(reach.end - rows.start, 0)).sum() * block_flops_per_token(cfg))


@functools.lru_cache(maxsize=256)
def _programs(
    computation: HookedTransformerConfig, batch: int, padded_length: int, signature: Hashable, mesh: Mesh | None
) -> Programs:
    """Returns the sizes of packed batches run so far with these arguments, which determine the rest of a program.

    They are kept for the whole process because jax keeps its programs so, and has no public way to list them. They only
    decide how packed batches are padded: what compiles, and results up to rounding. Evicted entries are planned anew.
    """
    return Programs(functools.partial(_run_cost, computation, padded_length))


def _run_cost(cfg: HookedTransformerConfig, padded_length: int, run: BlockRun) -> float:
    """Returns the cost of running a block, in FLOPs; starting it and reading its weights count as some tokens."""
    tokens, rows = run.tokens + _OVERHEAD, run.rows
    queries, columns = (rows, 1) if run.narrow else (tokens, padded_length)
    return float(block_flops(cfg, tokens, queries, rows, columns, padded_length))


def enter(streams: np.ndarray, rows: Rows, edits: Edits, only: int | None, first: int = 0) -> None:
    """Writes into ``streams`` the changes that enter the residual stream above the last block that ran.

    Args:
        streams: ``[site, batch, pos, d_model]``, with position ``only`` alone if that is not ``None``.
        rows, edits: the rows that enter, and what they change.
        first: number of the first site in ``streams``.
    """
    if len(rows):
        values, where = edits.final(rows, only)
        at, length = (rows.site - first, rows.prompt), streams.shape[2]
        streams[at] = np.where(where[:, :length], values[:, :length], streams[at])


@jax.jit
def _taken(base: jax.Array, source: Any) -> jax.Array:
    """Gathers packed tokens ``[lane, token, d_model]`` from the base run's ``[batch, padded_pos, d_model]``."""
    return base.reshape(-1, base.shape[-1])[source]


@functools.partial(jax.jit, static_argnums=1)
def _resize(stream: jax.Array, n_tokens: int) -> jax.Array:
    return pad_axis(stream[:, :n_tokens], n_tokens)
