"""Fits interchanges at every site of a grid, and runs them on other pairs, layer by layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from tljax.interchange.baselines import featurizer_columns, untrained_subspace
from tljax.interchange.methods import Method
from tljax.interchange.pairs import InterchangePairs
from tljax.interchange.programs import Rows, Subspace
from tljax.interchange.scoring import OnPairs, Scores, picked
from tljax.interchange.settings import Settings
from tljax.interchange.sites import Point
from tljax.interchange.training import Steps, make_order, train
from tljax.model.hooked_transformer import HookedTransformer
from tljax.progress import Progress


@dataclasses.dataclass(frozen=True)
class Labels:
    """Other labels of the same pairs, for a second fit.

    Attributes:
        targets: ``[pair]``.
        seen: numbers of the pairs that this fit may use.
    """

    targets: np.ndarray
    seen: np.ndarray


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Fits at every site.

    Attributes:
        columns: orthonormal columns ``[layer, site, d, n]``; ``None`` for the activation's own coordinates.
        gates: which are set, ``[layer, site, n]``.
        losses: mean loss of each epoch ``[epoch, layer, site]``; no epochs for untrained methods.
        answers: for each set of pairs, the answers of :meth:`~tljax.interchange.scoring.Scores.answers` by name,
            ``[layer, ...]``; ``"labels"`` are those of the second fit.
        positions: labels of the positions.
    """

    columns: np.ndarray | None
    gates: np.ndarray
    losses: np.ndarray
    answers: dict[str, dict[str, np.ndarray]]
    positions: tuple[str, ...]


def fit_sites(
    model: HookedTransformer,
    pairs: InterchangePairs,
    scored: Mapping[str, InterchangePairs],
    point: Point,
    settings: Settings,
    *,
    weights: np.ndarray | None = None,
    controlled: str | None = None,
    labels: Labels | None = None,
) -> Fitted:
    """Fits every site and runs it.

    Args:
        model: the model.
        pairs: the pairs to fit on.
        scored: sets of pairs to run, by name.
        point: the activation.
        settings: what is fitted.
        weights: how much each of ``pairs`` counts in the loss.
        controlled: the set that controls run on: swaps of the whole vector, placebos, and the fit of ``labels``.
        labels: other labels to fit, if any.
    """
    fit = Fit(model, pairs, point, settings, weights)
    relabelled = labels and Fit(model, pairs.with_targets(labels.targets), point, settings, weights, labels.seen)
    runs = {name: Scores(model, each, point, settings) for name, each in scored.items()}
    parts: list[dict[str, Any]] = []
    with Progress(len(point.layers), settings.progress, "interchange", "layer") as bar:
        layers = zip(point.layers, fit.layers(), *(one.layers() for one in runs.values()), strict=True)
        for layer, mine, *others in layers:
            found, losses = fit.run(layer, mine)
            part = {"columns": found.columns, "gates": found.gate, "losses": losses.T}
            for (name, one), rows in zip(runs.items(), others, strict=True):
                answers = one.answers(layer, rows, found, controls=name == controlled)
                if relabelled and name == controlled:
                    second, _ = relabelled.run(layer, mine)
                    answers["labels"] = one.answers(layer, rows, second, controls=False)["fit"]
                part[name] = answers
            parts.append(part)
            bar.advance(1)
    whole = jax.tree.map(lambda *each: np.stack(each), *parts)
    losses = np.moveaxis(whole["losses"], -1, 0)
    return Fitted(whole["columns"], whole["gates"], losses, {name: whole[name] for name in runs}, fit.places.labels)


class Fit(OnPairs):
    """The fits of one set of pairs."""

    def __init__(
        self,
        model: HookedTransformer,
        pairs: InterchangePairs,
        point: Point,
        settings: Settings,
        weights: np.ndarray | None = None,
        seen: np.ndarray | None = None,
    ) -> None:
        super().__init__(model, pairs, point, settings)
        self.counts = np.ones(len(pairs), np.float32) if weights is None else weights.astype(np.float32)
        if settings.trained:
            self.method = Method(settings.method, point.width, settings.tie_masks)  # type: ignore[arg-type]
            self.steps = self._steps(seen)

    def _steps(self, seen: np.ndarray | None) -> Steps:
        own = self.settings
        order = make_order(
            len(self.pairs), seeds=own.seeds, epochs=own.epochs, batch_size=own.batch_size,
            micro_batch_size=own.pairs_at_once, rows=seen,
        )  # fmt: skip
        factor, temperature = self.method.schedule(order.shape[1], own.temperature)
        penalty = self.method.default_penalty() if own.penalty is None else own.penalty
        rates = {name: np.asarray(rate, self.dtype) for name, rate in self.method.rates(own.lr).items()}
        factor, temperature, penalty = (np.asarray(one, self.dtype) for one in (factor, temperature, penalty))
        return Steps(order, factor, temperature, rates, penalty, self.strength)

    def run(self, layer: int, rows: Rows) -> tuple[Subspace, np.ndarray]:
        """Returns the subspaces at every site of a layer, on the host, and losses ``[epoch, site]``."""
        fixed, count = self._fixed(rows), len(self.sites)
        if not self.settings.trained:
            return fixed, np.zeros((0, count), np.float32)
        targets, weights = jax.device_put((self.pairs.targets, self.counts))
        rows = dataclasses.replace(rows, targets=targets, weights=weights)
        starts = [self.method.start(self.settings.seeds[number], fixed.gate.shape[-1]) for number in self.sites.seed]
        start = {name: np.stack([one[name] for one in starts]).astype(self.dtype) for name in starts[0]}
        kept: list[tuple[Subspace, np.ndarray]] = []
        for chosen in self.chunks(count, layer):
            sites, mine, given = picked((self.sites, start, fixed), chosen)
            trained, losses = train(
                self.plan, self.method, self.model, self.ends, layer, rows, sites, mine, given, self.steps,
                self.settings.optimizer,
            )  # fmt: skip
            kept.append((jax.device_get(trained), losses))
        trained = jax.tree.map(lambda *each: np.concatenate(each)[:count], *[one for one, _ in kept])
        return trained, self._by_epoch(np.concatenate([one for _, one in kept], axis=1)[:, :count])

    def _by_epoch(self, losses: np.ndarray) -> np.ndarray:
        """Averages the losses of batches ``[step, site]`` over each epoch, by the weight of their pairs."""
        order = self.steps.order[self.sites.seed]  # [site, step, micro, pair]
        weight = np.where(order >= 0, self.counts[order], 0).sum(axis=(2, 3)).T
        shape = (self.settings.epochs, -1, losses.shape[1])
        losses, weight = losses.reshape(shape), weight.reshape(shape)
        return (losses * weight).sum(axis=1) / weight.sum(axis=1)

    def _fixed(self, rows: Rows) -> Subspace:
        """Returns what is not trained of columns and gates, ``[site, ...]``."""
        own, d = self.settings, self.point.width
        n = d if own.method in ("boundless", "full", "neuron", "random_neuron") else max(own.ranks)
        count, repeats = len(self.sites), own.n_repeats()
        ranks = np.tile(np.repeat(own.ranks, len(own.seeds)), count // repeats)
        if own.method in ("das", "mdas", "boundless"):
            gate = np.ones((count, n)) if own.method == "boundless" else np.arange(n)[None] < ranks[:, None]
            return Subspace(None, gate.astype(self.dtype))
        sources, found = np.asarray(rows.sources, np.float32), []
        for first in range(0, count, repeats):
            vectors = sources[np.arange(len(sources)), self.sites.source[first]]
            vectors = vectors[:, self.sites.head[first]] if own.heads is not None else vectors
            if own.method == "dbm":
                columns = featurizer_columns(own.featurizer, vectors, d)
                found += [(columns, np.ones(d if columns is None else columns.shape[1]))] * repeats
                continue
            found += [
                untrained_subspace(
                    own.method, vectors, self.pairs.targets, int(ranks[site]), n, own.seeds[self.sites.seed[site]]
                )
                for site in range(first, first + repeats)
            ]
        gates = np.stack([gate for _, gate in found]).astype(self.dtype)
        made = [columns for columns, _ in found if columns is not None]
        return Subspace(np.stack(made).astype(self.dtype) if made else None, gates)
