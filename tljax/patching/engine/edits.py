"""What a sweep writes into packed runs: interventions that take a table's rows at some tokens of some rows."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from tljax.hooks.intervention import Intervention
from tljax.hooks.point import HookPoint
from tljax.hooks.points import HookPointSpec
from tljax.patching.engine.packing import BatchLayout, Rows


class TakeRows(Intervention):
    """Replaces an activation by rows of a table where every factor of a mask is true.

    Args:
        table: ``[..., *entry]``, values to take: the leading axes are counted through as one.
        index: ``[token]``, or ``[row]`` for attention patterns: which entry stands there.
        factors: boolean arrays that broadcast to the activation.
        query_pos: for patterns, the query positions of the table that the activation holds; ``None`` means all.
    """

    arrays = ("table", "index", "factors", "query_pos")
    table: jax.Array
    index: jax.Array
    factors: tuple[jax.Array, ...]
    query_pos: jax.Array | None

    def __init__(self, table: Any, index: Any, factors: Sequence[Any], query_pos: Any = None) -> None:
        super().__init__()
        for name, value in (("table", table), ("index", index), ("factors", tuple(factors)), ("query_pos", query_pos)):
            self._set(name, value)

    def transform(self, value: jax.Array, hook: HookPoint) -> jax.Array:
        by_token = "query_pos" not in hook.axes
        entry = self.table.shape[self.table.ndim - value.ndim + (2 if by_token else 1) :]
        taken = self.table.reshape(-1, *entry)[self.index]
        if by_token:
            return taken[None]
        return taken if self.query_pos is None else taken[:, :, self.query_pos]

    def where(self, value: jax.Array, hook: HookPoint) -> jax.Array | None:
        chosen = self.factors[0]
        for factor in self.factors[1:]:
            chosen = chosen & factor
        return chosen


@runtime_checkable
class Edits(Protocol):
    """A source of interventions for the packed batches of a sweep."""

    @property
    def signature(self) -> Hashable:
        """What decides the structure of the interventions, equal for edits that share programs."""
        ...

    def slots(self, layer: int, layout: BatchLayout, queries: np.ndarray | None) -> dict[str, tuple[TakeRows, ...]]:
        """Interventions at one block, by relative name; their names, number and shapes are those of every layer.

        Args:
            layer: which block.
            layout: the packed batch.
            queries: positions whose output the block computes; ``None`` means all.
        """
        ...

    def final(self, rows: Rows, pos: int | None) -> tuple[np.ndarray, np.ndarray]:
        """What rows that change only the final residual stream have there.

        Args:
            rows: such rows.
            pos: the one position wanted, or ``None`` for every position, padding too.

        Returns:
            Values ``[row, pos, d_model]`` and where they apply, ``[row, pos, d_model or 1]``.
        """
        ...


@dataclasses.dataclass(frozen=True)
class GridEdits:
    """Edits of a grid of sites: one point, patched at chosen entries of its axes, a site at one layer.

    Attributes:
        spec: the point, named relative to its block, whose axes are addressed.
        tables: for each layer with sites, values ``[variant, batch, padded_pos, ...]`` (for patterns ``[variant, batch,
            head, padded_pos, padded_pos]``).
        layer: ``[site]``, block each site acts in; the number of layers for the final residual stream.
        variant: ``[site]``, which variant of the values it takes.
        chosen: for each axis along which sites are told apart, the entry of each site ``[site]``, or for each prompt
            ``[site, batch]``, -1 where it has none.
        allowed: for each axis along which part of the entries is patched, a mask of its entries ``[entry]``, or for
            each prompt ``[batch, entry]``.
    """

    spec: HookPointSpec
    tables: Mapping[int, jax.Array]
    layer: np.ndarray
    variant: np.ndarray
    chosen: Mapping[str, np.ndarray]
    allowed: Mapping[str, np.ndarray]

    @property
    def signature(self) -> Hashable:
        return self.spec.name, tuple(self.chosen), tuple(self.allowed)

    def slots(self, layer: int, layout: BatchLayout, queries: np.ndarray | None) -> dict[str, tuple[TakeRows, ...]]:
        site = np.full(layout.n_rows, -1)
        site[: len(layout.rows)] = layout.rows.site
        here = (site >= 0) & (self.layer[site] == layer)
        table = self.tables.get(layer, next(iter(self.tables.values())))
        entry = self.variant[site] * table.shape[1]
        if "query_pos" in self.spec.axes:
            return {self.spec.name: (self._on_rows(table, entry, layout.prompt, site, here, queries),)}
        entry = entry[layout.row] * table.shape[2] + layout.source
        return {self.spec.name: (self._on_tokens(table, entry, site, here, layout, queries),)}

    def _on_tokens(
        self,
        table: jax.Array,
        entry: np.ndarray,
        site: np.ndarray,
        here: np.ndarray,
        layout: BatchLayout,
        queries: np.ndarray | None,
    ) -> TakeRows:
        tokens = slice(None) if queries is None or self.spec.every_token else layout.last
        site = site[layout.row[tokens]]
        row = layout.row[tokens]
        on = here[row] & layout.is_real[tokens] & picks(self, "pos", site, layout.pos[tokens], layout.prompt[row])
        factors = [expand(on[None], (0, 1), table.ndim - 1)]
        for number, axis in enumerate(self.spec.axes):
            if axis not in ("batch", "pos") and (axis in self.chosen or axis in self.allowed):
                here = picks(self, axis, site[:, None], np.arange(table.shape[number + 1])[None])
                factors.append(expand(here[None], (0, 1, number), table.ndim - 1))
        return TakeRows(table, entry[tokens].astype(np.int32), factors)

    def _on_rows(
        self,
        table: jax.Array,
        entry: np.ndarray,
        prompt: np.ndarray,
        site: np.ndarray,
        here: np.ndarray,
        queries: np.ndarray | None,
    ) -> TakeRows:
        key_pos = np.arange(table.shape[-1])
        query_pos = key_pos if queries is None else queries
        factors = [
            here[:, None, None, None],
            *(
                expand(picks(self, axis, site[:, None], entries[None], prompt[:, None]), (0, number), 4)
                for number, (axis, entries) in enumerate(
                    (("head", np.arange(table.shape[2])), ("query_pos", query_pos), ("key_pos", key_pos)), start=1
                )
            ),
        ]
        return TakeRows(table, (entry + prompt).astype(np.int32), factors, queries)

    def final(self, rows: Rows, pos: int | None) -> tuple[np.ndarray, np.ndarray]:
        table = np.asarray(self.tables[int(rows.layer[0])])
        positions = np.arange(table.shape[2]) if pos is None else np.asarray([pos])
        values = table[self.variant[rows.site][:, None], rows.prompt[:, None], positions[None]]
        where = picks(self, "pos", rows.site[:, None], positions[None], rows.prompt[:, None])[..., None]
        if "d_model" in self.chosen or "d_model" in self.allowed:
            where = where & picks(self, "d_model", rows.site[:, None, None], np.arange(values.shape[-1])[None, None])
        return values, where


@runtime_checkable
class Chooses(Protocol):
    """Something that tells sites apart along some axes and restricts others."""

    @property
    def chosen(self) -> Mapping[str, np.ndarray]: ...

    @property
    def allowed(self) -> Mapping[str, np.ndarray]: ...


def picks(sites: Chooses, axis: str, site: np.ndarray, entry: np.ndarray, prompt: np.ndarray | int = 0) -> np.ndarray:
    """Whether each site patches an entry of an axis in a prompt, all broadcast together."""
    shape = np.broadcast_shapes(site.shape, entry.shape, np.shape(prompt))
    if axis in sites.chosen:
        chosen = sites.chosen[axis]
        return np.broadcast_to((chosen[site] if chosen.ndim == 1 else chosen[site, prompt]) == entry, shape)
    if axis not in sites.allowed:
        return np.broadcast_to(True, shape)
    allowed = sites.allowed[axis]
    return np.broadcast_to(allowed[entry] if allowed.ndim == 1 else allowed[prompt, entry], shape)


def expand(mask: np.ndarray, axes: Sequence[int], rank: int) -> np.ndarray:
    """``mask``, whose dimensions are the given axes of an activation, with size one along the others."""
    shape = [1] * rank
    for axis, size in zip(axes, mask.shape, strict=True):
        shape[axis] = size
    return mask.reshape(shape)
