"""The interventions that patch one edge each in packed batches of the sweep engine.

A row whose edge ends at a query, key or value enters at its reader's layer with all queries, keys and values known:
those of the base run, but for the one head that reads the edge. So that block projects nothing. A row whose edge ends
at an MLP enters with the base run's attention output. Layers further up run as they are.
"""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Literal

import jax
import numpy as np

from tljax.circuits.graph import ResidualGraph
from tljax.config import HookedTransformerConfig
from tljax.hooks.points import point_table
from tljax.model.hooked_transformer import HookedTransformer
from tljax.modules.stack import block_weights
from tljax.patching.engine.base_run import BaseRun
from tljax.patching.engine.edits import TakeRows
from tljax.patching.engine.engine import Reach
from tljax.patching.engine.packing import BatchLayout, Rows
from tljax.patching.paths import read_heads
from tljax.processes import as_numpy

ReaderGroup = Literal["attention", "mlp", "logits"]
"""Readers of a layer whose edges are patched by the same interventions."""

HEAD_POINTS = {"q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v"}
_ATTN_OUT, _MLP_IN, _MLP_OUT, _FINAL = "hook_attn_out", "hook_mlp_in", "hook_mlp_out", "final"


def base_points(graph: ResidualGraph) -> tuple[str, ...]:
    """Returns full names of the points that a base run must keep, besides those of writers."""
    points = [*HEAD_POINTS.values()]
    if not graph.attn_only:
        points += [_ATTN_OUT, _MLP_IN, _MLP_OUT]
    return tuple(f"blocks.{layer}.{point}" for layer in range(graph.n_layers) for point in points)


def groups_of(graph: ResidualGraph, layer: int) -> dict[ReaderGroup, slice]:
    """Returns the groups of readers of a layer (``n_layers`` for the logits), as slices of the reader axis."""
    if layer == graph.n_layers:
        return {"logits": graph.readers_of(layer)}
    groups: dict[ReaderGroup, slice] = {
        "attention": slice(graph.readers_of(layer, "q").start, graph.readers_of(layer, "v").stop)
    }
    if not graph.attn_only:
        groups["mlp"] = graph.readers_of(layer, "mlp")
    return groups


@dataclasses.dataclass(frozen=True)
class EdgeEdits:
    """Edits of one edge a site, from a chunk of writers to one group of readers of a layer.

    Attributes:
        base: the unpatched run.
        layer: the readers' layer; ``n_layers`` for the logits.
        tables: by point, what readers read if an edge from a writer is patched, ``[writer, batch, padded_pos, ...]``.
        given: by point, the base run's activation, which holds in this block wherever ``tables`` are not read.
        changed: where the writers' replacements differ from what they write, ``[writer, batch, padded_pos]``.
        writer: ``[site]``, a number in ``tables``.
        head: by point with a head axis, the head that each site patches, ``[site]``; -1 for none.
        every_token: points that hold every packed token even in a block that computes only some tokens' outputs.
    """

    base: BaseRun
    layer: int
    tables: Mapping[str, jax.Array]
    given: Mapping[str, jax.Array]
    changed: np.ndarray
    writer: np.ndarray
    head: Mapping[str, np.ndarray]
    every_token: frozenset[str]

    @property
    def signature(self) -> Hashable:
        return "edges", tuple(self.tables), tuple(self.given)

    def rows(self, cfg: HookedTransformerConfig, reach: Reach) -> Rows:
        """Returns the edges and prompts whose patch changes something that the metric may depend on.

        A query or an MLP's input of the last layer matters at a position that is read only, and so does the final
        residual stream; a key or a value matters from its position on.
        """
        changed = self.changed[self.writer]
        if reach.only is not None and self.layer >= cfg.n_layers - 1:
            alone = np.ones(len(self.writer), bool)
            for point in (HEAD_POINTS["k"], HEAD_POINTS["v"]):
                alone &= self.head.get(point, np.int64(-1)) < 0
            changed = changed & (~alone[:, None, None] | (np.arange(changed.shape[2]) == reach.only))
        else:
            alone = np.zeros(len(self.writer), bool)
        first = np.where(changed.any(axis=2), changed.argmax(axis=2), reach.end)
        site, prompt = np.nonzero(first < reach.end)
        suffix = (cfg.attention_dir == "causal") | alone[site]
        start = np.where(suffix, first[site, prompt], 0)
        return Rows(site, prompt, np.full(len(site), self.layer), start)

    def slots(self, layer: int, layout: BatchLayout, queries: np.ndarray | None) -> dict[str, tuple[TakeRows, ...]]:
        """Returns the interventions at the readers' block. Later blocks need none, and have a program of their own."""
        slots: dict[str, tuple[TakeRows, ...]] = {}
        if layer != self.layer:
            return slots
        prompts, positions = self.changed.shape[1:]
        for point in (*self.given, *(point for point in self.tables if point not in self.given)):
            tokens, takes = layout.tokens(last=queries is not None and point not in self.every_token), []
            if point in self.given:
                takes.append(TakeRows(self.given[point], tokens.source, ()))
            if point in self.tables:
                site = layout.rows.site[tokens.row]
                entry = self.writer[site] * (prompts * positions) + tokens.source
                takes.append(TakeRows(self.tables[point], entry.astype(np.int32), self._factors(point, site)))
            slots[point] = tuple(takes)
        return slots

    def _factors(self, point: str, site: np.ndarray) -> tuple[np.ndarray, ...]:
        if point not in self.head:
            return ()
        heads = np.arange(self.tables[point].shape[3])
        return ((self.head[point][site][..., None] == heads)[..., None],)

    def final(self, rows: Rows, pos: int | None) -> tuple[np.ndarray, np.ndarray]:
        table = as_numpy(self.tables[_FINAL])
        positions = np.arange(table.shape[2]) if pos is None else np.asarray([pos])
        values = table[self.writer[rows.site][:, None], rows.prompt[:, None], positions[None]]
        return values, np.ones((*values.shape[:2], 1), bool)


def make_edits(
    model: HookedTransformer,
    base: BaseRun,
    graph: ResidualGraph,
    group: ReaderGroup,
    layer: int,
    changes: tuple[jax.Array, np.ndarray],
    edges: np.ndarray,
) -> EdgeEdits:
    """Makes the edits of some edges.

    Args:
        model, base, graph: the model, its unpatched run and its graph.
        group, layer: the readers.
        changes: what edges from a chunk of writers add when they are patched, ``[writer, batch, padded_pos, d_model]``,
            and where that is not zero, ``[writer, batch, padded_pos]``.
        edges: the edges, ``[site, 2]``: number of the writer in the chunk, number of the reader.
    """
    change, changed = changes
    writer, readers = edges[:, 0], [graph.readers[reader] for reader in edges[:, 1]]
    head: dict[str, np.ndarray] = {}

    def kept(point: str) -> jax.Array:
        return base.activations[f"blocks.{layer}.{point}"]

    if group == "logits":
        tables, given = {_FINAL: base.final[None] + change}, {}
    elif group == "mlp":
        tables, given = {_MLP_IN: kept(_MLP_IN)[None] + change}, {_ATTN_OUT: kept(_ATTN_OUT)}
    else:
        stream = base.residual(layer)[None] + change
        tables = {point: read_heads(model, base, layer, letter, stream) for letter, point in HEAD_POINTS.items()}
        given = {point: kept(point) for point in tables}
        if graph.parallel_attn_mlp and not graph.attn_only:
            given[_MLP_OUT] = kept(_MLP_OUT)
        for letter, point in HEAD_POINTS.items():
            head[point] = np.asarray([reader.number if reader.kind == letter else -1 for reader in readers])
    points = {*tables, *given} - {_FINAL}
    every_token = frozenset(p for p in points if point_table(model.cfg)[f"blocks.0.{p}"].every_token)
    return EdgeEdits(base, layer, tables, given, changed, writer, head, every_token)


def flops_saved(cfg: HookedTransformerConfig, group: ReaderGroup, layer: int, tokens: int, outputs: int) -> float:
    """Returns the FLOPs of matrices that the readers' own block leaves out.

    Args:
        cfg: the model's config.
        group, layer: the readers.
        tokens: packed tokens that enter.
        outputs: those whose output the block computes.
    """
    if group == "logits":
        return 0.0
    weights = block_weights(cfg, cfg.layer_kind(layer))
    attention = weights.queries + weights.heads
    if group == "mlp":
        left_out = attention
    else:
        left_out = weights.others - weights.heads if cfg.parallel_attn_mlp else weights.queries
    return 2.0 * (tokens * weights.read_later + outputs * left_out)
