"""The interventions that write a sweep's values into packed batches."""

import dataclasses
import functools
import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from tljax.hooks.intervention import Intervention
from tljax.hooks.point import HookPoint
from tljax.hooks.points import HookPointSpec
from tljax.patching.engine.packing import BatchLayout, Rows
from tljax.processes import as_numpy
from tljax.scale.batch import gathered, on_devices


class TakeRows(Intervention):
    """Intervention that replaces an activation by entries of a table where all ``factors`` are true.

    Args:
        table: values to take, ``[..., *entry]``; the leading axes are indexed as one flattened axis.
        index: ``[lane, token]``, or ``[lane * row]`` for attention patterns: the entry to write there.
        factors: boolean arrays that broadcast to the activation; the mask is their conjunction. Without any, the whole
            activation is replaced, and what only it depended on is not computed.
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
        return taken if by_token or self.query_pos is None else taken[:, :, self.query_pos]

    def where(self, value: jax.Array, hook: HookPoint) -> jax.Array | None:
        return functools.reduce(operator.and_, self.factors) if self.factors else None

    def beside(self, params: Any) -> "TakeRows":
        """Returns it on the mesh that parameters lie on: each lane's part on its own devices, the table on all."""
        index, *factors = (on_devices(one, params) for one in (self.index, *self.factors))
        return TakeRows(gathered(self.table, params), index, factors, self.query_pos)


@runtime_checkable
class Edits(Protocol):
    """Protocol of objects that give the interventions for a sweep's packed batches."""

    @property
    def signature(self) -> Hashable:
        """Key that determines the structure of the interventions; equal for edits that share programs."""
        ...

    def slots(self, layer: int, layout: BatchLayout, queries: np.ndarray | None) -> dict[str, tuple[TakeRows, ...]]:
        """Returns the interventions at one block, by relative name; names, number and shapes are equal at all layers.

        Points of dictionaries are left out of layers without sites.

        Args:
            layer: the block.
            layout: the packed batch.
            queries: positions whose output the block computes; ``None`` means all.
        """
        ...

    def final(self, rows: Rows, pos: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Returns the values of rows that change only the final residual stream.

        Args:
            rows: the rows.
            pos: the one position wanted, or ``None`` for every position, padding too.

        Returns:
            Values ``[row, pos, d_model]`` and a mask of where they apply, ``[row, pos, d_model or 1]``.
        """
        ...


@dataclasses.dataclass(frozen=True)
class GridEdits:
    """Edits of a grid of sites that patch one point, each at one layer and at chosen entries of the point's axes.

    Attributes:
        spec: the hook table's row for the point, named relative to its block.
        tables: for each layer with sites, values ``[variant, batch, padded_pos, ...]`` (for patterns ``[variant, batch,
            head, padded_pos, padded_pos]``).
        layer: ``[site]``, the block each site patches; ``n_layers`` for the final residual stream.
        variant: ``[site]``, which variant of the values each site takes.
        chosen: for each axis with one entry a site, that entry, ``[site]``; or ``[site, batch]`` if it differs between
            prompts, -1 where a prompt has none.
        allowed: for each other axis that is patched in part, a mask of its entries, ``[entry]``; or ``[batch, entry]``
            if it differs between prompts.
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
        if layer not in self.tables and ".hook_sae_" in self.spec.name:
            return {}  # another layer's dictionary may be of another width, and runs twice where anything is edited
        table = self.tables.get(layer, next(iter(self.tables.values())))
        write = self._on_rows if "query_pos" in self.spec.axes else self._on_tokens
        return {self.spec.name: (write(table, layer, layout, queries),)}

    def _on_tokens(self, table: jax.Array, layer: int, layout: BatchLayout, queries: np.ndarray | None) -> TakeRows:
        tokens = layout.tokens(last=queries is not None and not self.spec.every_token)
        site = layout.rows.site[tokens.row]
        entry = self.variant[site] * (table.shape[1] * table.shape[2]) + tokens.source
        on = tokens.is_real & (self.layer[site] == layer) & picks(self, "pos", site, tokens.pos, tokens.prompt)
        factors = [expand(on, (0, 1), table.ndim - 1)]
        for number, axis in enumerate(self.spec.axes):
            if axis not in ("batch", "pos") and (axis in self.chosen or axis in self.allowed):
                here = picks(self, axis, site[..., None], np.arange(table.shape[number + 1]), tokens.prompt[..., None])
                factors.append(expand(here, (0, 1, number), table.ndim - 1))
        return TakeRows(table, entry.astype(np.int32), factors)

    def _on_rows(self, table: jax.Array, layer: int, layout: BatchLayout, queries: np.ndarray | None) -> TakeRows:
        prompt, site = layout.prompt.reshape(-1), layout.rows.site[layout.number.reshape(-1)]
        here = layout.is_row.reshape(-1) & (self.layer[site] == layer)
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
        return TakeRows(table, (self.variant[site] * table.shape[1] + prompt).astype(np.int32), factors, queries)

    def final(self, rows: Rows, pos: int | None) -> tuple[np.ndarray, np.ndarray]:
        table = as_numpy(self.tables[int(rows.layer[0])])
        positions = np.arange(table.shape[2]) if pos is None else np.asarray([pos])
        values = table[self.variant[rows.site][:, None], rows.prompt[:, None], positions[None]]
        where = picks(self, "pos", rows.site[:, None], positions[None], rows.prompt[:, None])[..., None]
        if "d_model" in self.chosen or "d_model" in self.allowed:
            where = where & picks(self, "d_model", rows.site[:, None, None], np.arange(values.shape[-1])[None, None])
        return values, where


@runtime_checkable
class Chooses(Protocol):
    """Protocol of objects with the ``chosen`` and ``allowed`` entries of sites, as in :class:`GridEdits`."""

    @property
    def chosen(self) -> Mapping[str, np.ndarray]: ...

    @property
    def allowed(self) -> Mapping[str, np.ndarray]: ...


def picks(sites: Chooses, axis: str, site: np.ndarray, entry: np.ndarray, prompt: np.ndarray | int = 0) -> np.ndarray:
    """Whether each site patches an entry of an axis in a prompt; ``site``, ``entry`` and ``prompt`` broadcast."""
    shape = np.broadcast_shapes(site.shape, entry.shape, np.shape(prompt))
    if axis in sites.chosen:
        chosen = sites.chosen[axis]
        return np.broadcast_to((chosen[site] if chosen.ndim == 1 else chosen[site, prompt]) == entry, shape)
    if axis not in sites.allowed:
        return np.broadcast_to(True, shape)
    allowed = sites.allowed[axis]
    return np.broadcast_to(allowed[entry] if allowed.ndim == 1 else allowed[prompt, entry], shape)


def expand(mask: np.ndarray, axes: Sequence[int], rank: int) -> np.ndarray:
    """Reshapes ``mask``, whose dimensions are the given axes of an activation, to have size one along the others."""
    shape = [1] * rank
    for axis, size in zip(axes, mask.shape, strict=True):
        shape[axis] = size
    return mask.reshape(shape)
