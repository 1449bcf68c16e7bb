"""``Settings``: what is fitted at each site of a layer, and how."""

import dataclasses
from typing import Any

import numpy as np
import optax

from tljax.interchange.baselines import UNTRAINED
from tljax.interchange.programs import Site
from tljax.interchange.sites import Places


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is fitted, and how; options are documented at :func:`~tljax.interchange.train_interchange`.

    ``pairs_at_once`` is the number of pairs of a site that run together, in training and in scoring.
    """

    method: str
    ranks: tuple[int, ...]
    seeds: tuple[int, ...]
    heads: tuple[int, ...] | None
    pos: Any
    source_pos: Any
    pairs_at_once: int
    epochs: int = 20
    batch_size: int = 128
    lr: Any = None
    strength: float = 1.0
    featurizer: Any = "identity"
    tie_masks: bool = False
    penalty: float | None = None
    temperature: tuple[float, float] | None = None
    optimizer: optax.GradientTransformation | None = None
    max_sites: int | None = None
    progress: bool | None = None

    @property
    def trained(self) -> bool:
        """Whether the method trains anything."""
        return self.method not in UNTRAINED

    def axes(self) -> tuple[str, ...]:
        """Returns the names of the axes of sites within a layer."""
        return ("pos", *(() if self.heads is None else ("head",)), *(("rank",) if len(self.ranks) > 1 else ()), "seed")

    def n_repeats(self) -> int:
        """Returns how often each position and head is fitted: by ranks and seeds."""
        return len(self.ranks) * len(self.seeds)

    def sites(self, places: Places) -> Site:
        """Returns the sites of a layer in the order of :meth:`axes`, the last axis varying fastest."""
        heads = (0,) if self.heads is None else self.heads
        grid = np.indices((len(places.base), len(heads), len(self.ranks), len(self.seeds))).reshape(4, -1)
        head = np.asarray(heads, np.int32)[grid[1]]
        return Site(places.base[grid[0]], places.source[grid[0]], head, grid[3].astype(np.int32))
