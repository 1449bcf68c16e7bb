"""Runs the pages of a sweep, block by block, and hands the final residual streams to the metrics."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from tljax.config import HookedTransformerConfig
from tljax.forward import Stage, block_module, context_of_layer, run_stage
from tljax.hooked_transformer import HookedTransformer
from tljax.hooks.point import HookPoint, HookSlot
from tljax.hooks.points import block_points
from tljax.modules.attention import AttentionContext
from tljax.modules.packing import Packing
from tljax.patching.base_run import BaseRun, keys_and_values
from tljax.patching.edits import Edits
from tljax.patching.pages import Page, PageLayout, PageLimits, Rows, lay_out, plan_pages
from tljax.patching.report import block_flops, block_flops_per_token


@dataclasses.dataclass(frozen=True)
class Reach:
    """Which positions of a run matter.

    Attributes:
        end: one past the last position that the metric reads (or that such a position attends to).
        only: the one position the metric reads, or ``None`` if it reads several.
    """

    end: int
    only: int | None


def reach_of(cfg: HookedTransformerConfig, length: int, positions: tuple[int, ...] | None) -> Reach:
    """What a metric that reads these positions (``None``: all) needs of prompts of this length."""
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
        reach: positions that matter.
        limits: sizes of pages.
        advance: called after each block with the work done since the last call, in runs.
    """

    def __init__(
        self,
        model: HookedTransformer,
        base: BaseRun,
        reach: Reach,
        limits: PageLimits,
        advance: Callable[[float], None] = lambda runs: None,
    ) -> None:
        self.cfg, self.params = model.cfg, model.params
        self.base, self.reach, self.limits, self.advance = base, reach, limits, advance
        self.spent = Spent()
        self._first = 0

    def run(self, rows: Rows, edits: Edits, first: int, n_sites: int) -> np.ndarray:
        """The final residual stream of some sites.

        Args:
            rows: rows whose change reaches the metric; every other prompt of a site ends as in the base run.
            edits: what the rows change.
            first, n_sites: the first site, and how many there are.

        Returns:
            ``[site, batch, pos, d_model]``, with only position ``reach.only`` if the metric reads just one.
        """
        final = np.asarray(self.base.final)
        only = self.reach.only
        kept = final[:, : self.base.length] if only is None else final[:, only : only + 1]
        finals = np.tile(kept[None], (n_sites, 1, 1, 1))
        self._first = first
        at_end = rows.layer == self.cfg.n_layers
        if at_end.any():
            self._finish(rows.take(np.flatnonzero(at_end)), edits, finals)
        running = rows.take(np.flatnonzero(~at_end))
        pages = plan_pages(running, self.reach.end, self.cfg.n_layers, self.limits)
        for layout in self._layouts(pages):
            self._collect(layout, np.asarray(self._run_page(layout, edits)), finals)
        self.spent.floor += self._floor(running)
        return finals

    def streams(self, rows: Rows, edits: Edits, n_sites: int, layers: Sequence[int]) -> dict[int, np.ndarray]:
        """The residual stream of each site entering some layers (or leaving the last one), every position.

        Args:
            rows, edits, n_sites: as in :meth:`run`, the first site being 0.
            layers: which; the number of layers means the final residual stream.

        Returns:
            For each layer, ``[site, batch, pos, d_model]``.
        """
        kept = {layer: np.asarray(self.base.residual(layer))[:, : self.base.length] for layer in layers}
        streams = {layer: np.tile(stream[None], (n_sites, 1, 1, 1)) for layer, stream in kept.items()}
        at_end = rows.layer == self.cfg.n_layers
        if at_end.any() and self.cfg.n_layers in streams:
            self._finish(rows.take(np.flatnonzero(at_end)), edits, streams[self.cfg.n_layers])
        below = rows.take(np.flatnonzero(rows.layer < max(layers)))
        for layout in self._layouts(plan_pages(below, self.reach.end, max(layers), self.limits)):
            stream, indices = self._first_stream(layout), self._indices(layout, None)
            for layer in range(layout.page.layer, max(layers)):
                stream = self._run_block(layer, stream, indices, layout, edits, None)
                if layer + 1 in streams:
                    self._collect(layout, np.asarray(stream), streams[layer + 1])
        return streams

    def _first_stream(self, layout: PageLayout) -> jax.Array:
        return _take_tokens(self.base.residual(layout.page.layer), jax.device_put(layout.source))

    def _layouts(self, pages: Sequence[Page]) -> Iterator[PageLayout]:
        for page in pages:
            only = self.reach.only
            yield lay_out(page, self.base.frame, self.reach.end, self.reach.end - 1 if only is None else only)

    def _finish(self, rows: Rows, edits: Edits, finals: np.ndarray) -> None:
        values, where = edits.final(rows, self.reach.only)
        length = finals.shape[2]
        old = finals[rows.site - self._first, rows.prompt]
        finals[rows.site - self._first, rows.prompt] = np.where(where[:, :length, None], values[:, :length], old)

    def _collect(self, layout: PageLayout, stream: np.ndarray, finals: np.ndarray) -> None:
        rows = layout.page.rows
        if self.reach.only is not None:
            finals[rows.site - self._first, rows.prompt, 0] = stream[0, : len(rows)]
            return
        real = layout.is_real
        row = layout.row[real]
        finals[rows.site[row] - self._first, rows.prompt[row], layout.pos[real]] = stream[0, real]

    def _run_page(self, layout: PageLayout, edits: Edits) -> jax.Array:
        """The final residual stream of the page's tokens, or of each row's last one, ``[1, token or row, d_model]``."""
        page, n_layers = layout.page, self.cfg.n_layers
        stream = self._first_stream(layout)
        indices, queries = self._indices(layout, None), None
        for layer in range(page.layer, n_layers):
            if layer == n_layers - 1 and self.reach.only is not None:
                queries = np.asarray([self.reach.only], np.int32)
                indices = self._indices(layout, queries)
            stream = self._run_block(layer, stream, indices, layout, edits, queries)
            self.advance(len(page.rows) / (n_layers - page.layer))
        return stream

    def _run_block(
        self,
        layer: int,
        stream: jax.Array,
        indices: dict[str, Any],
        layout: PageLayout,
        edits: Edits,
        queries: np.ndarray | None,
    ) -> jax.Array:
        cfg, page = self.cfg, layout.page
        axes = {spec.name: spec.axes for spec in block_points(cfg)}
        slots = {
            name: HookSlot(HookPoint(name, axes[name]), written)
            for name, written in edits.slots(layer, layout, queries).items()
        }
        k, v = (self.base.activations[f"blocks.{layer}.{name}"] for name in _read_names(cfg))
        packing = Packing(past_k=k, past_v=v, **indices["packing"])
        context = AttentionContext(indices["positions"], indices["token_mask"], packing=packing)
        module = block_module(cfg, cfg.layer_kind(layer))
        stage = Stage(module, self.params["blocks"][layer], f"blocks.{layer}.", (), slots)
        computed = page.n_tokens if queries is None else page.n_rows
        columns = self.base.frame if queries is None else 1
        self.spent.flops += block_flops(cfg, page.n_tokens, computed, page.n_rows, columns, self.base.frame)
        return run_stage(stage, (stream, context_of_layer(cfg, context, layer)), traced=False)[0]

    def _indices(self, layout: PageLayout, queries: np.ndarray | None) -> dict[str, Any]:
        """Positions, mask and layout of a page, on the device, for blocks that compute all outputs or the last ones."""
        base, rows = self.base.context, np.arange(layout.page.n_rows, dtype=np.int32)
        whole = queries is None
        packing = {
            "key_source": layout.key_source,
            "query_source": layout.query_source if whole else rows[:, None],
            "query_pos": np.arange(self.base.frame, dtype=np.int32) if whole else queries,
            "slot": layout.row * np.int32(self.base.frame) + layout.pos if whole else rows,
            "computed": None if whole else layout.last,
        }
        positions, mask = np.asarray(base.positions), np.asarray(base.token_mask)
        positions = positions.reshape(-1)[layout.source][None]
        return jax.device_put({"packing": packing, "positions": positions, "token_mask": mask[layout.prompt]})

    def _floor(self, rows: Rows) -> float:
        skipped = 1 if self.reach.only is not None else 0
        layers = np.maximum(self.cfg.n_layers - skipped - rows.layer, 0)
        return float((layers * (self.reach.end - rows.start)).sum() * block_flops_per_token(self.cfg))


@functools.lru_cache(maxsize=256)
def _read_names(cfg: HookedTransformerConfig) -> tuple[str, str]:
    return keys_and_values(cfg.positional_embedding_type)


@jax.jit
def _take_tokens(residual: jax.Array, source: jax.Array) -> jax.Array:
    """Tokens of ``[batch, frame, d_model]`` by flat number, as ``[1, token, d_model]``."""
    return residual.reshape(-1, residual.shape[-1])[source][None]
