"""The sites of a sweep, the rows that they change, and the edits that patch them."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tljax.config import HookedTransformerConfig
from tljax.hooks.points import ENTRY, EXIT, HookPointSpec, layer_of, point_table, stage_of
from tljax.patching.engine.base_run import BaseRun
from tljax.patching.engine.edits import GridEdits, expand
from tljax.patching.engine.packing import Rows
from tljax.processes import as_numpy


@dataclasses.dataclass(frozen=True)
class Sites:
    """Sites that patch one kind of activation, each at one layer.

    Attributes:
        row: the hook table's row for the point, at any of its layers.
        layer: ``[site]``; zeros for a point of the embedding.
        values: for each layer, the values written, ``[variant, batch, padded_pos, ...]`` (patterns: ``[variant, batch,
            head, padded_pos, padded_pos]``).
        variant: ``[site]``, which variant of its layer's values each site writes.
        chosen: for each axis with one entry a site, that entry, ``[site]``; or ``[site, batch]`` if it differs between
            prompts, -1 where a prompt has none.
        allowed: for each other axis that is patched in part, a mask of its entries, ``[entry]``; or ``[batch, entry]``
            if it differs between prompts.
        tolerance: differences up to this share of the largest activation count as rounding, not as a change.
    """

    row: HookPointSpec
    layer: np.ndarray
    values: Mapping[int, jax.Array]
    variant: np.ndarray
    chosen: Mapping[str, np.ndarray]
    allowed: Mapping[str, np.ndarray]
    tolerance: float = 0.0

    def __len__(self) -> int:
        return len(self.layer)

    def take(self, index: np.ndarray) -> "Sites":
        """Returns the sites with these numbers."""
        layer = self.layer[index]
        return dataclasses.replace(
            self,
            layer=layer,
            variant=self.variant[index],
            chosen={axis: entries[index] for axis, entries in self.chosen.items()},
            values={number: values for number, values in self.values.items() if number in layer},
        )

    def full_name(self, layer: int) -> str:
        """Returns the point's full name at a layer."""
        return self.point if self.is_embedding else f"blocks.{layer}.{self.point}"

    @property
    def point(self) -> str:
        """The point's name within its block, or in the embedding."""
        return stage_of(self.row.name)[1]

    @property
    def is_embedding(self) -> bool:
        return layer_of(self.row.name) is None

    def enters_above(self, cfg: HookedTransformerConfig) -> int:
        """One if a change at the point is a known change of the residual stream entering the next layer, else zero.

        A dictionary that is spliced in between, in a layer of the sites, makes it unknown.
        """
        if EXIT not in (self.point, self.row.adds_to):
            return 0
        written = {splice.writes for layer in self.values for splice in cfg.layer_kinds[layer].splices}
        return int(written.isdisjoint((self.point, EXIT)))

    @property
    def enter_stream(self) -> bool:
        """Whether a change acts at one layer only, so that packed batches can run it.

        A change of a shortformer's position embeddings does not: queries and keys of every layer read them.
        """
        return not self.is_embedding or self.row.adds_to is not None


def find_rows(cfg: HookedTransformerConfig, base: BaseRun, sites: Sites, end: int) -> Rows:
    """Finds the patched prompts that differ from the base run before ``end``, and their first changed positions.

    The values themselves are compared, so a prefix that clean and corrupted prompts share costs nothing.
    """
    first = np.full((len(sites), base.batch), base.length)
    for layer, values in sites.values.items():
        at = np.flatnonzero(sites.layer == layer)
        changed, axes = _changed(base, sites, layer, values)
        first[at] = _first_position(changed, axes, sites, at)
    site, prompt = np.nonzero(first < end)
    start = first[site, prompt] if cfg.attention_dir == "causal" else np.zeros(len(site), int)
    layer = sites.layer[site] + sites.enters_above(cfg)
    return Rows(site, prompt, layer, start)


def _changed(base: BaseRun, sites: Sites, layer: int, values: jax.Array) -> tuple[np.ndarray, list[str]]:
    """Returns where values differ, ``[variant, batch, *axes]``, and ``axes``: position, then others that sites use."""
    spec = sites.row
    position = "query_pos" if "query_pos" in spec.axes else "pos"
    named = [axis for axis in spec.axes if axis in sites.chosen or axis in sites.allowed]
    axes = [position, *(axis for axis in named if axis != position)]
    old = base.activations[sites.full_name(layer)]
    numbers = (0, *(spec.axes.index(axis) for axis in axes))
    changed = _differs(values, old, np.float32(sites.tolerance), numbers)
    return as_numpy(changed)[:, :, : base.length], axes


@functools.partial(jax.jit, static_argnums=3)
def _differs(values: jax.Array, old: jax.Array, tolerance: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns where ``values`` ``[variant, ...]`` differ from ``old`` ``[...]``, reduced to ``[variant, *axes]``."""
    scale = jnp.where(jnp.isfinite(old), jnp.abs(old), 0).max().astype(jnp.float32)
    far = jnp.abs(values.astype(jnp.float32) - old[None].astype(jnp.float32)) > tolerance * scale
    changed = (values != old[None]) & (far | ~jnp.isfinite(values) | ~jnp.isfinite(old[None]))
    reduced = tuple(n + 1 for n in range(old.ndim) if n not in axes)
    changed = changed.any(axis=reduced, keepdims=True)
    return changed.transpose(0, *(n + 1 for n in axes), *reduced).reshape(
        changed.shape[0], *(changed.shape[n + 1] for n in axes)
    )


def _first_position(changed: np.ndarray, axes: Sequence[str], sites: Sites, at: np.ndarray) -> np.ndarray:
    """Returns the first changed position of the sites ``at``, ``[site, batch]``; the length where nothing changes."""
    length = changed.shape[2]
    for number, axis in enumerate(axes, start=2):
        if axis in sites.allowed:
            allowed = sites.allowed[axis][..., : changed.shape[number]]
            axes_of = (number,) if allowed.ndim == 1 else (1, number)
            changed = changed & expand(allowed, axes_of, changed.ndim)
    reduced = tuple(n for n, axis in enumerate(axes[1:], start=3) if axis not in sites.chosen)
    changed = np.moveaxis(as_numpy(changed.any(axis=reduced)), 2, -1)  # [variant, batch, *chosen, pos]
    entries = [_by_prompt(sites.chosen[axis][at]) for axis in axes[1:] if axis in sites.chosen]
    prompts = np.arange(changed.shape[1])[None]
    here = changed[(sites.variant[at][:, None], prompts, *entries)]  # [site, batch, pos]
    for chosen in entries:
        here = here & (chosen >= 0)[..., None]
    if axes[0] in sites.chosen:
        here = here & (_by_prompt(sites.chosen[axes[0]][at])[..., None] == np.arange(length))
    return np.where(here.any(-1), here.argmax(-1), length)


def _by_prompt(chosen: np.ndarray) -> np.ndarray:
    """Returns entries of sites as ``[site, batch or 1]``."""
    return chosen[:, None] if chosen.ndim == 1 else chosen


def place(cfg: HookedTransformerConfig, base: BaseRun, sites: Sites) -> GridEdits:
    """Returns the edits that patch the sites, at the point itself or where its change enters the residual stream."""
    above, entry = sites.enters_above(cfg), point_table(cfg)[f"blocks.0.{ENTRY}"].named(ENTRY)
    if not (above or sites.is_embedding):
        spec, tables = sites.row.named(sites.point), dict(sites.values)
    elif sites.point == EXIT:
        spec, tables = entry, {layer + 1: values for layer, values in sites.values.items()}
    else:
        spec, tables = entry, {}
        for layer, values in sites.values.items():
            old = base.activations[sites.full_name(layer)]
            tables[layer + above] = base.residual(layer + above)[None] + (values - old[None])
    return GridEdits(spec, tables, sites.layer + above, sites.variant, sites.chosen, sites.allowed)


def grid(sizes: Mapping[str, Sequence[int] | np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the entries of all combinations, flattened: one array for each axis, the last axis varying fastest.

    >>> {axis: list(map(int, entries)) for axis, entries in grid({"pos": [0, 3], "head": [0, 1]}).items()}
    {'pos': [0, 0, 3, 3], 'head': [0, 1, 0, 1]}
    """
    if not sizes:
        return {}
    mesh = np.meshgrid(*(np.asarray(entries, int) for entries in sizes.values()), indexing="ij")
    return {axis: entries.ravel() for axis, entries in zip(sizes, mesh, strict=True)}
