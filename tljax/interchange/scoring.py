"""The answers that interchanges give on a set of pairs, with those of their controls, by one set of programs."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from tljax.interchange.baselines import random_columns
from tljax.interchange.pairs import InterchangePairs, check_task
from tljax.interchange.programs import (
    Rows,
    Site,
    Subspace,
    bytes_per_pair,
    evaluate,
    make_ends,
    make_plan,
    make_rows,
    take,
)
from tljax.interchange.settings import Settings
from tljax.interchange.sites import Point, climb, read_places
from tljax.memory import batch_budget
from tljax.model.hooked_transformer import HookedTransformer
from tljax.numerics import widened
from tljax.sizes import power_of_two_within

PLACEBOS = 4
"""Random subspaces that a placebo's score is averaged over."""


def picked(tree: Any, chosen: np.ndarray) -> Any:
    """Returns some entries along the first axis of every array."""
    return jax.tree.map(lambda one: one[chosen], tree)


class OnPairs:
    """A set of pairs, and the sites of each layer."""

    def __init__(self, model: HookedTransformer, pairs: InterchangePairs, point: Point, settings: Settings) -> None:
        self.model, self.pairs, self.point, self.settings = model, pairs, point, settings
        self.plan, self.ends = make_plan(model, pairs, point), make_ends(model, pairs)
        self.places = read_places(pairs, settings.pos, settings.source_pos, _tokens_of(model, pairs))
        self.sites = settings.sites(self.places)
        self.dtype = widened(model.cfg.jnp_dtype)
        self.strength = np.asarray(settings.strength, self.dtype)
        check_task(model, pairs)

    def layers(self) -> Iterator[Rows]:
        """Yields the pairs as each layer needs them."""
        for at in climb(self.model, self.pairs, self.point):
            yield make_rows(self.model, self.pairs, at)

    def chunks(self, count: int, layer: int) -> Iterator[np.ndarray]:
        """Yields numbers of sites to run together, always as many: the first sites fill the last chunk up."""
        each = bytes_per_pair(self.model.cfg, self.pairs.base.shape[1], layer) * self.settings.pairs_at_once
        fitting = max(1, batch_budget() // each)
        fitting = fitting if self.settings.max_sites is None else min(fitting, self.settings.max_sites)
        size = len(self.sites) if len(self.sites) <= fitting else power_of_two_within(fitting)
        for first in range(0, count, size):
            yield np.arange(first, first + size) % count


class Scores(OnPairs):
    """The answers of fits on one set of pairs."""

    def answers(self, layer: int, rows: Rows, fits: Subspace, controls: bool) -> dict[str, np.ndarray]:
        """Runs fits, the base runs alone, and controls.

        Args:
            layer, rows: where, and the pairs.
            fits: the subspaces, ``[site, ...]``.
            controls: whether to run swaps of the whole vector and placebos too.

        Returns:
            Classes: ``"fit"`` ``[site, pair]``, ``"unpatched"`` ``[pair]``; and with controls ``"full"`` ``[position
                and head, pair]``, ``"placebo"`` ``[site, placebo, pair]``.
        """
        every = np.arange(len(self.sites))
        runs: dict[str, np.ndarray] = {"fit": every, "unpatched": every[:1]}
        if controls:
            runs["full"] = every[:: self.settings.n_repeats()]
            runs |= {f"placebo {draw}": every for draw in range(PLACEBOS)}
        which = np.concatenate(list(runs.values()))
        kind = np.repeat(list(runs), [len(chosen) for chosen in runs.values()])
        moved = picked(fits, which)
        moved.gate[np.isin(kind, ("unpatched", "full"))] = 0
        whole = (kind == "full").astype(self.dtype)
        placebo = np.concatenate([self._placebo(fits, name)[chosen] for name, chosen in runs.items()])
        found = self.run(layer, rows, picked(self.sites, which), moved, whole, placebo)[0]
        result = {name: found[kind == name] for name in ("fit", "full") if name in runs}
        result["unpatched"] = found[kind == "unpatched"][0]
        if controls:
            result["placebo"] = np.stack([found[kind == f"placebo {draw}"] for draw in range(PLACEBOS)], axis=1)
        return result

    def _placebo(self, fits: Subspace, name: str) -> np.ndarray:
        """Returns columns of random subspaces as large as the fits, ``[site, d, n]``; zeros for another run."""
        d, (count, n) = self.point.width, fits.gate.shape
        if not name.startswith("placebo "):
            return np.zeros((count, d, n), self.dtype)
        open_ = (fits.gate > 0.5).sum(axis=-1)
        draw = int(name.removeprefix("placebo "))
        columns = [
            random_columns(d, n, (self.settings.seeds[seed], draw, 2)) * (np.arange(n) < size)
            for seed, size in zip(self.sites.seed, open_, strict=True)
        ]
        return np.stack(columns).astype(self.dtype)

    def run(
        self, layer: int, rows: Rows, sites: Site, subspaces: Subspace, whole: Any, placebo: Any, keep: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Runs interchanges at some sites of a layer.

        Returns:
            Answers and losses ``[site, pair]``, and task logits ``[site, pair, class]`` or ``None``.
        """
        count, size = len(self.pairs), self.settings.pairs_at_once
        kept = []
        for chosen in self.chunks(len(sites), layer):
            mine, *others = jax.device_put(picked((sites, subspaces, whole, placebo), chosen))
            parts = []
            for first in range(0, count, size):
                rows_here = np.arange(first, first + size)
                taken = np.tile(np.where(rows_here < count, rows_here, -1).astype(np.int32), (len(chosen), 1))
                part = take(self.plan, rows, mine, taken)
                found = evaluate(
                    self.plan, self.model, self.ends, layer, part, others[0], self.strength, *others[1:], keep=keep
                )
                parts.append(jax.device_get(found))
            kept.append(jax.tree.map(lambda *each: np.concatenate(each, axis=1)[:, :count], *parts))
        return jax.tree.map(lambda *each: np.concatenate(each)[: len(sites)], *kept)


def _tokens_of(model: HookedTransformer, pairs: InterchangePairs) -> list[str]:
    """Returns the tokens that all base prompts share, ``""`` where they differ; none if lengths differ."""
    mask = np.asarray(pairs.base.mask)
    if model.tokenizer is None or len(set(mask.sum(axis=1).tolist())) > 1:
        return []
    rows = np.asarray(pairs.base.tokens)[mask].reshape(len(mask), -1)
    texts = model.to_str_tokens(rows[0])
    return [str(text) if (rows[:, n] == rows[0, n]).all() else "" for n, text in enumerate(texts)]
