"""``InterchangeResult``: subspaces and scores at every site of a grid, with their controls."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np

from tljax.errors import InputError
from tljax.hooks.interchanges import Interchange
from tljax.patching.result import PatchingResult
from tljax.viz.drawing import Drawable, Picture
from tljax.viz.heatmap import HeatmapOptions, heatmap

IIA = "IIA"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class InterchangeResult(Drawable):
    """Interchanges fitted at every layer, position, head, rank and seed, and what they score.

    Attributes:
        method: how the subspaces were found.
        activation_name: the point's name within a block.
        scores: shares of pairs, one metric each, ``["metric", "layer", "pos", ("head",) ("rank",) "seed"]``. ``"IIA"``:
            the intervened answer is the target. ``"full swap"``: the same when the whole vector is set. ``"placebo"``:
            random subspaces moved as far. ``"arbitrary labels"``: fitted on labels that mean nothing, and measured on
            keys that the fit has not seen. ``"random model"``: fitted on random weights. ``"iso"``: pairs that should
            keep the base's answer. ``"disentangle"``: the mean of IIA and iso.
        columns: orthonormal columns of each site, ``[layer, pos, ..., seed, d, n]``; ``None`` for the activation's own
            coordinates.
        gates: which of them are set, 0 or 1, ``[layer, pos, ..., seed, n]``.
        losses: mean training loss of each epoch in nats, ``[epoch, layer, pos, ..., seed]``; no epochs if nothing was
            trained.
        unpatched: share of pairs whose base run already answers the target.
        chance: one over the number of answers that occur, for comparison.
        is_right: whether each pair's intervened answer is the target, ``[layer, pos, ..., seed, pair]``.
        notes: what was not run, and why.
    """

    method: str
    activation_name: str
    scores: PatchingResult
    columns: np.ndarray | None
    gates: np.ndarray
    losses: np.ndarray
    unpatched: float
    chance: float
    is_right: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def iia(self) -> PatchingResult:
        """Interchange intervention accuracy: the share of pairs whose intervened answer is the target."""
        return self.scores[IIA]

    @property
    def n_open(self) -> np.ndarray:
        """Number of dimensions that each site sets, ``[layer, pos, ..., seed]``."""
        return (self.gates > 0.5).sum(axis=-1)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of the first axis."""
        return tuple(int(text[1:]) for text in self.scores.labels["layer"])

    def best(self) -> dict[str, int | str]:
        """Returns the site of the highest IIA, as the arguments of :meth:`basis`."""
        sites = self.iia.site_axes
        at = np.unravel_index(int(np.argmax(np.asarray(self.iia.values))), self.iia.values.shape)
        return {axis: self._label(axis, int(number)) for axis, number in zip(sites, at, strict=True)}

    def basis(self, **site: int | str) -> np.ndarray:
        """Returns the basis that was found at a site, orthonormal columns ``[d, k]``.

        Args:
            **site: an entry of each axis: ``basis(layer=2, pos="end", seed=0)``. Layers, heads, ranks and seeds go by
                their own numbers, positions by label or by number along the axis. An axis of one entry may be left out.

        Raises:
            InputError: an axis or an entry that the result does not have, or an axis of several left out.
        """
        at = self._at(site)
        open_ = self.gates[at] > 0.5
        own = np.eye(len(open_), dtype=self.gates.dtype) if self.columns is None else self.columns[at]
        return own[:, open_]

    def interchange(self, source: Any, site: Mapping[str, int | str], strength: Any = 1.0, **at: Any) -> Interchange:
        """Returns the interchange of a site, for any run.

        Args:
            source: the source's activations.
            site: as the arguments of :meth:`basis`.
            strength, **at: as for :class:`Interchange`.
        """
        return Interchange(source, self.basis(**site), strength, **at)

    def at(self, **site: int | str) -> dict[str, float]:
        """Returns the scores at a site by name; the arguments are those of :meth:`basis`."""
        at = self._at(site)
        values = np.asarray(self.scores.values)
        return {name: float(values[number][at]) for number, name in enumerate(self.scores.metric_names)}

    def _at(self, site: Mapping[str, int | str]) -> tuple[int, ...]:
        axes = self.iia.site_axes
        if unknown := [axis for axis in site if axis not in axes]:
            raise InputError(f"There is no axis {unknown[0]!r}; the axes are {axes}.")
        found = []
        for axis in axes:
            size = self.iia.sizes[axis]
            if axis not in site and size > 1:
                raise InputError(f"Say which {axis}: there are {size}, {list(self._labels(axis))[:8]}.")
            found.append(self._number(axis, site[axis]) if axis in site else 0)
        return tuple(found)

    def _number(self, axis: str, entry: int | str) -> int:
        labels = self._labels(axis)
        shown = str(entry) if isinstance(entry, str) or axis == "pos" else f"{axis[0].upper()}{entry}"
        if labels.count(shown) == 1:
            return labels.index(shown)
        if axis == "pos" and not isinstance(entry, str) and -len(labels) <= entry < len(labels):
            return int(entry) % len(labels)
        raise InputError(f"{axis}={entry!r} is not one of {labels}.")

    def _label(self, axis: str, number: int) -> int | str:
        label = self._labels(axis)[number]
        if axis == "pos":
            return label if self._labels(axis).count(label) == 1 and not label.lstrip("-").isdigit() else number
        return int(label[1:])

    def _labels(self, axis: str) -> list[str]:
        return list(self.iia.labels[axis])

    def picture(self, of: str | None = None, facet: str | None = None) -> Picture:
        """Returns heat maps of the scores, averaged over seeds: a panel for each score, or of the one named ``of``."""
        if of not in (None, *self.scores.metric_names):
            raise InputError(f"of={of!r} is not one of {', '.join(map(repr, self.scores.metric_names))}.")
        chosen = self.scores if of is None else self.scores[of]
        axes = tuple(axis for axis in chosen.axis_names if axis != "seed")
        values = np.asarray(chosen.values).mean(axis=-1)
        shape = tuple(size for axis, size in zip(axes, values.shape, strict=True) if size > 1 or axis in _KEPT)
        axes = tuple(axis for axis, size in zip(axes, values.shape, strict=True) if size > 1 or axis in _KEPT)
        averaged = PatchingResult(
            jnp.asarray(values.reshape(shape)), axes, metric_names=chosen.metric_names,
            activation_name=f"{self.method}, {self.activation_name}", labels=chosen.labels,
        )  # fmt: skip
        return dataclasses.replace(averaged.picture("values", facet), colour_title="share of pairs", one_scale=True)

    def plot(self, **options: Unpack[HeatmapOptions]) -> Any:
        """Draws the heat maps; the options are those of :func:`tljax.viz.heatmap`."""
        return heatmap(self, **({"signed": False} | options))  # type: ignore[arg-type]

    def __repr__(self) -> str:
        sizes = " x ".join(f"{size} {axis}" for axis, size in self.iia.sizes.items())
        best = self.best()
        where = ", ".join(
            f"{axis} {entry!r}" if isinstance(entry, str) else f"{axis} {entry}" for axis, entry in best.items()
        )
        scores = self.at(**best) | {"unpatched": self.unpatched, "chance": self.chance}
        width = max(map(len, scores))
        lines = [f"  {name.ljust(width)}  {value:.2f}" for name, value in scores.items()]
        dims = int(self.n_open[self._at(best)])
        lines = [
            f"InterchangeResult({self.method} at {self.activation_name}, {sizes})",
            f"best site: {where}, {dims} dimension{'s' * (dims != 1)} of {self.width}", *lines,
            *(f"  ({note})" for note in self.notes),
        ]  # fmt: skip
        return "\n".join(lines)

    @property
    def width(self) -> int:
        """Size of the activation's last axis."""
        return self.gates.shape[-1] if self.columns is None else self.columns.shape[-2]


_KEPT = ("metric", "layer", "pos")
