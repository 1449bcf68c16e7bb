"""The sites of a sweep: what is patched where, which prompts that changes from which position on, and how it is run."""

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


@dataclasses.dataclass(frozen=True)
class Sites:
    """Sites that patch one kind of activation, each at one layer.

    Attributes:
        row: the point's row in the table, at any of its layers.
        layer: ``[site]``; zeros for a point of the embedding.
        values: for each layer, what is written, ``[variant, batch, padded_pos, ...]`` (patterns: ``[variant, batch,
            head, padded_pos, padded_pos]``).
        variant: ``[site]``, which of its layer's values a site writes.
        chosen: for each axis along which sites are told apart, the entry of each site ``[site]``, or for each prompt
            ``[site, batch]``, -1 where it has none.
        allowed: for each other axis of which only a part is patched, a mask of its entries ``[entry]``, or for each
            prompt ``[batch, entry]``.
        tolerance: differences up to this share of the largest activation are rounding, not a change.
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
        """The sites with these numbers."""
        layer = self.layer[index]
        return dataclasses.replace(
            self,
            layer=layer,
            variant=self.variant[index],
            chosen={axis: entries[index] for axis, entries in self.chosen.items()},
            values={number: values for number, values in self.values.items() if number in layer},
        )

    def full_name(self, layer: int) -> str:
        """The point's full name at a layer."""
        return self.point if self.is_embedding else f"blocks.{layer}.{self.point}"

    @property
    def point(self) -> str:
        """The point's name within its block, or in the embedding."""
        return stage_of(self.row.name)[1]

    @property
    def is_embedding(self) -> bool:
        return layer_of(self.row.name) is None

    @property
    def enters_above(self) -> int:
        """One if a change at the point is a known change of the residual stream entering the next layer, else zero."""
        return int(EXIT in (self.point, self.row.adds_to))

    @property
    def enter_stream(self) -> bool:
        """Whether a change reaches the metric through one block's residual stream, so that packed batches carry it out.

        The position embeddings of a shortformer do not: queries and keys of every layer read them.
        """
        return not self.is_embedding or self.row.adds_to is not None


def find_rows(cfg: HookedTransformerConfig, base: BaseRun, sites: Sites, end: int) -> Rows:
    """The patched prompts that differ from the base run before ``end``, and from where on.

    Decided on the values themselves, so a prefix that clean and corrupted prompts share costs nothing.
    """
    first = np.full((len(sites), base.batch), base.length)
    for layer, values in sites.values.items():
        at = np.flatnonzero(sites.layer == layer)
        changed, axes = _changed(base, sites, layer, values)
        first[at] = _first_position(changed, axes, sites, at)
    site, prompt = np.nonzero(first < end)
    start = first[site, prompt] if cfg.attention_dir == "causal" else np.zeros(len(site), int)
    layer = sites.layer[site] + sites.enters_above
    return Rows(site, prompt, layer, start)


def _changed(base: BaseRun, sites: Sites, layer: int, values: jax.Array) -> tuple[np.ndarray, list[str]]:
    """Where the values differ, ``[variant, batch, *axes]``, and those axes: the position, then those sites name."""
    spec = sites.row
    position = "query_pos" if "query_pos" in spec.axes else "pos"
    named = [axis for axis in spec.axes if axis in sites.chosen or axis in sites.allowed]
    axes = [position, *(axis for axis in named if axis != position)]
    old = base.activations[sites.full_name(layer)]
    numbers = (0, *(spec.axes.index(axis) for axis in axes))
    changed = _differs(values, old, np.float32(sites.tolerance), numbers)
    return np.asarray(changed)[:, :, : base.length], axes


@functools.partial(jax.jit, static_argnums=3)
def _differs(values: jax.Array, old: jax.Array, tolerance: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Whether ``[variant, ...]`` differs from ``[...]``, by the given axes of the latter, in their order."""
    scale = jnp.where(jnp.isfinite(old), jnp.abs(old), 0).max().astype(jnp.float32)
    far = jnp.abs(values.astype(jnp.float32) - old[None].astype(jnp.float32)) > tolerance * scale
    changed = (values != old[None]) & (far | ~jnp.isfinite(values) | ~jnp.isfinite(old[None]))
    reduced = tuple(n + 1 for n in range(old.ndim) if n not in axes)
    changed = changed.any(axis=reduced, keepdims=True)
    return changed.transpose(0, *(n + 1 for n in axes), *reduced).reshape(
        changed.shape[0], *(changed.shape[n + 1] for n in axes)
    )


def _first_position(changed: np.ndarray, axes: Sequence[str], sites: Sites, at: np.ndarray) -> np.ndarray:
    """First changed position of each of the sites numbered ``at``, for each prompt; the length where there is none."""
    length = changed.shape[2]
    for number, axis in enumerate(axes, start=2):
        if axis in sites.allowed:
            allowed = sites.allowed[axis][..., : changed.shape[number]]
            axes_of = (number,) if allowed.ndim == 1 else (1, number)
            changed = changed & expand(allowed, axes_of, changed.ndim)
    reduced = tuple(n for n, axis in enumerate(axes[1:], start=3) if axis not in sites.chosen)
    changed = np.moveaxis(np.asarray(changed.any(axis=reduced)), 2, -1)  # [variant, batch, *chosen, pos]
    entries = [_by_prompt(sites.chosen[axis][at]) for axis in axes[1:] if axis in sites.chosen]
    prompts = np.arange(changed.shape[1])[None]
    here = changed[(sites.variant[at][:, None], prompts, *entries)]  # [site, batch, pos]
    for chosen in entries:
        here = here & (chosen >= 0)[..., None]
    if axes[0] in sites.chosen:
        here = here & (_by_prompt(sites.chosen[axes[0]][at])[..., None] == np.arange(length))
    return np.where(here.any(-1), here.argmax(-1), length)


def _by_prompt(chosen: np.ndarray) -> np.ndarray:
    """Entries of sites ``[site, batch or 1]``."""
    return chosen[:, None] if chosen.ndim == 1 else chosen


def place(cfg: HookedTransformerConfig, base: BaseRun, sites: Sites) -> GridEdits:
    """The edits that carry the sites out: at the point itself, or where its change enters the residual stream."""
    above, entry = sites.enters_above, point_table(cfg)[f"blocks.0.{ENTRY}"].named(ENTRY)
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
    """Entries of every combination, flattened: one array for each axis, the last axis fastest.

    >>> {axis: list(map(int, entries)) for axis, entries in grid({"pos": [0, 3], "head": [0, 1]}).items()}
    {'pos': [0, 0, 3, 3], 'head': [0, 1, 0, 1]}
    """
    if not sizes:
        return {}
    mesh = np.meshgrid(*(np.asarray(entries, int) for entries in sizes.values()), indexing="ij")
    return {axis: entries.ravel() for axis, entries in zip(sizes, mesh, strict=True)}
