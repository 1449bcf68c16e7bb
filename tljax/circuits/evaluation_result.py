"""``CircuitResult``: metrics of circuits beside those of the whole model and of the empty circuit."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import is_traced, typed
from tljax.errors import InputError
from tljax.patching.statistics import resampling_weights
from tljax.viz.drawing import new_figure, plain, save_figure

Measured = Literal["faithfulness", "completeness", "minimality"]
Summary = Literal["faithfulness", "cpr", "cmd", "average"]
_LEAVES = ("values", "full", "empty", "n_edges", "circuit")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CircuitResult:
    """The metric of circuits, and how much of the behaviour they carry.

    Faithfulness is ``(m(C) - m(none)) / (m(all) - m(none))``: 0 for the empty circuit, where all edges carry the
    replacement, and 1 for the whole model. Metrics are averaged over prompts first, and then the ratio is taken. A
    pytree whose leaves are the arrays.

    Attributes:
        values: the metric of each circuit, ``[*axis_names]``, or ``[*axis_names, batch]`` if it is kept by prompt.
        full, empty: the metric of the model and of the empty circuit, ``[]`` or ``[batch]``.
        n_edges: number of edges of each circuit, ``[*axis_names]``.
        axis_names: axes along which circuits differ; ``"fraction"`` is that of a curve.
        total_edges: number of edges of the graph.
        measured: ``"faithfulness"``; ``"completeness"``, where ``values`` are of the circuits' complements; or
            ``"minimality"``, where they are of a circuit without one of its edges.
        fractions: along the ``"fraction"`` axis, the share of edges that was asked for, before pruning.
        labels: for some axes, a text for each entry.
        circuit: for minimality, the metric of the circuit with all its edges, ``[]`` or ``[batch]``.
        ablation: what absent edges carried.
    """

    values: jax.Array
    full: jax.Array
    empty: jax.Array
    n_edges: Any
    axis_names: tuple[str, ...]
    total_edges: int
    measured: Measured = "faithfulness"
    fractions: tuple[float, ...] | None = None
    labels: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    circuit: jax.Array | None = None
    ablation: str = "patching"

    @property
    def by_prompt(self) -> bool:
        """Whether the metric is kept for each prompt, along the last axis of ``values``."""
        return self.full.ndim > 0

    def faithfulness(self) -> jax.Array:
        """Returns the share of the behaviour that each circuit carries, ``[*axis_names]``.

        For completeness this is the share that is left without the circuit, which is low if nothing is missing; for
        minimality the share that is left without the edge (see :meth:`drop`).
        """
        return _share(*(one.mean(axis=-1) if self.by_prompt else one for one in (self.values, self.full, self.empty)))

    def drop(self) -> jax.Array:
        """Returns by how much faithfulness falls without each edge, ``[edge]``.

        Raises:
            InputError: this is no result of :func:`~tljax.circuits.minimality`.
        """
        if self.circuit is None:
            raise InputError("drop() compares a circuit with and without an edge: it belongs to minimality(...).")
        parts = (self.circuit, self.full, self.empty)
        return _share(*(one.mean(axis=-1) if self.by_prompt else one for one in parts)) - self.faithfulness()

    def per_prompt(self) -> jax.Array:
        """Returns each prompt's own share, ``[*axis_names, batch]``; NaN or infinite where a prompt has no gap."""
        self._need_prompts("A share for each prompt")
        return _share(self.values, self.full, self.empty)

    def cpr(self, from_zero: bool = False) -> jax.Array:
        """Returns the area under the curve of faithfulness, as the MIB circuit track defines CPR; higher is better.

        Trapezoids over the fractions as asked for, from the first to the last: .999 at most for the usual fractions and
        a circuit that is never better than the model.

        Args:
            from_zero: whether to add a point at 0, where faithfulness is 0.

        Raises:
            InputError: this is no curve.
        """
        return jnp.asarray(self._area(np.asarray(self.faithfulness(), np.float64), "cpr", from_zero), jnp.float32)

    def cmd(self, from_zero: bool = False) -> jax.Array:
        """Returns the area between the curve and 1, MIB's CMD; lower is better.

        Args:
            from_zero: whether to add a point at 0, where the distance is 1.

        Raises:
            InputError: this is no curve.
        """
        return jnp.asarray(self._area(np.asarray(self.faithfulness(), np.float64), "cmd", from_zero), jnp.float32)

    def average(self) -> jax.Array:
        """Returns the mean of faithfulness over the fractions of a curve.

        Raises:
            InputError: this is no curve.
        """
        self._curve()
        return self.faithfulness().mean(axis=-1)

    @typed
    def bootstrap_ci(
        self,
        *,
        of: Summary = "faithfulness",
        confidence: float = 0.95,
        n_resamples: int = 1000,
        seed: int = 0,
        clusters: Any = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Computes a percentile bootstrap interval over prompts; metrics of one resample share its draws.

        Args:
            of: what the interval is of.
            confidence: share of resampled values inside the interval.
            n_resamples: how often prompts are drawn with replacement.
            seed: seed of the draws.
            clusters: a number for each prompt, such as its template's: then whole clusters are drawn.

        Returns:
            Lower and upper ends, shaped as the value itself.

        Raises:
            InputError: the metric was averaged over prompts, fewer than two prompts or clusters, or an argument out of
                range.
        """
        self._need_prompts("A bootstrap interval")
        if not 0 < confidence < 1:
            raise InputError(f"confidence is a share between 0 and 1, such as 0.95; got {confidence}.")
        values, full, empty = (np.asarray(one, np.float64) for one in (self.values, self.full, self.empty))
        weights = resampling_weights(values.shape[-1], n_resamples=n_resamples, seed=seed, clusters=clusters)
        means = np.moveaxis(values @ weights.T, -1, 0)
        ends = (weights @ one for one in (full, empty))
        full, empty = (end.reshape(-1, *(1,) * (means.ndim - 1)) for end in ends)
        shares = _share(means, full, empty)
        if of == "average":
            self._curve()
            shares = shares.mean(axis=-1)
        elif of != "faithfulness":
            shares = self._area(shares, of, from_zero=False)
        tails = (1 - confidence) / 2, (1 + confidence) / 2
        low, high = np.quantile(shares, tails, axis=0)
        return jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32)

    @typed
    def plot(self, *, title: str | None = None, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws the curve of faithfulness against the share of edges, with intervals where prompts are kept.

        Args:
            title: of the figure.
            path: where to save the picture (its ending chooses the format).

        Returns:
            The matplotlib figure.

        Raises:
            InputError: this is no curve, or has more than one axis besides it.
        """
        fractions = self._curve()
        shares = np.asarray(self.faithfulness())
        if shares.ndim > 2:
            raise InputError(
                f"A figure has one line for each entry of an axis; this result has axes {self.axis_names}."
            )
        names = self.labels.get(self.axis_names[0], range(len(shares))) if shares.ndim == 2 else ("",)
        lines = shares.reshape(-1, len(fractions))
        figure = new_figure(6.0, 4.0)
        axes = figure.subplots()
        bands = self.bootstrap_ci() if self.by_prompt and self.full.shape[0] > 1 else None
        for number, (line, name) in enumerate(zip(lines, names, strict=True)):
            (drawn,) = axes.plot(fractions, line, marker="o", markersize=3.5, label=plain(str(name)))
            if bands is not None:
                low, high = (np.asarray(end).reshape(-1, len(fractions))[number] for end in bands)
                axes.fill_between(fractions, low, high, alpha=0.15, color=drawn.get_color(), linewidth=0)
        for level in (0.0, 1.0):
            axes.axhline(level, color="0.6", linewidth=0.8, linestyle="--")
        axes.set(xscale="log", xlabel="share of edges", ylabel=self.measured, title=plain(title or "", 80))
        if shares.ndim == 2:
            axes.legend(fontsize=8)
        save_figure(figure, path)
        return figure

    def _area(self, shares: np.ndarray, of: Summary, from_zero: bool) -> np.ndarray:
        """Computes trapezoids over the last axis."""
        fractions = np.asarray(self._curve())
        heights = shares if of == "cpr" else np.abs(1 - shares)
        if from_zero:
            fractions = np.concatenate([[0.0], fractions])
            start = np.full((*heights.shape[:-1], 1), 0.0 if of == "cpr" else 1.0)
            heights = np.concatenate([start, heights], axis=-1)
        return ((heights[..., 1:] + heights[..., :-1]) / 2 * np.diff(fractions)).sum(axis=-1)

    def _curve(self) -> tuple[float, ...]:
        if self.fractions is None:
            raise InputError("This belongs to a curve over the size of the circuit: use faithfulness_curve(...).")
        return self.fractions

    def _need_prompts(self, what: str) -> None:
        if not self.by_prompt:
            raise InputError(f"{what} needs the metric of each prompt, and this metric returns one number for all.")

    def __repr__(self) -> str:
        sizes = dict(zip(self.axis_names, np.shape(self.values), strict=False))
        axes = " × ".join(f"{axis} {size}" for axis, size in sizes.items()) or "one circuit"
        if is_traced(*jax.tree.leaves(self)) or not all(map(_is_array, jax.tree.leaves(self))):
            return f"CircuitResult({self.measured}: {axes}; traced)"
        ends = [float(np.mean(np.asarray(one, np.float64))) for one in (self.full, self.empty)]
        parts = [
            f"{self.measured}: {axes}",
            f"{self.ablation}",
            f"metric of all edges {ends[0]:.4g}, of none {ends[1]:.4g}",
        ]
        shares = np.asarray(self.faithfulness(), np.float64)
        if not sizes:
            parts.append(f"{float(self.n_edges):g} of {self.total_edges} edges carry {float(shares):.4g}")
        elif self.fractions is not None and shares.ndim == 1:
            parts.append(f"CPR {float(self.cpr()):.4g}, CMD {float(self.cmd()):.4g}")
        elif shares.size:
            parts.append(f"{shares.min():.4g} to {shares.max():.4g}")
        return f"CircuitResult({'; '.join(parts)})"

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        key = jax.tree_util.GetAttrKey
        labels = tuple((axis, tuple(texts)) for axis, texts in sorted(self.labels.items()))
        static = (self.axis_names, self.total_edges, self.measured, self.fractions, labels, self.ablation)
        return tuple((key(name), getattr(self, name)) for name in _LEAVES), static

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], leaves: Sequence[Any]) -> "CircuitResult":
        names = ("axis_names", "total_edges", "measured", "fractions", "labels", "ablation")
        given: dict[str, Any] = dict(zip((*names, *_LEAVES), (*static, *leaves), strict=True))
        given["labels"] = dict(given["labels"])
        return cls(**given)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int)


def _share(value: Any, full: Any, empty: Any) -> Any:
    return (value - empty) / (full - empty)
