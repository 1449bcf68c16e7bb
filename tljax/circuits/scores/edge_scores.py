"""``EdgeScores``: the scores of a residual graph's edges as an array, with the convention they were computed by."""

import dataclasses
import os
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import typed, whole
from tljax.circuits.circuit import Circuit
from tljax.circuits.eap_ig_files import write_eap_ig_json, write_eap_ig_pt
from tljax.circuits.graph import ResidualGraph
from tljax.circuits.scores.convention import EdgeConvention
from tljax.circuits.scores.score_files import as_eap_ig, read_scores_json, read_scores_pt, write_scores
from tljax.circuits.selection import By, ranked, select
from tljax.errors import CheckpointError, InputError
from tljax.fingerprint import Fingerprint
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.statistics import bootstrap_interval
from tljax.safetensors_files import own_errors

EDGE_AXES = ("writer", "reader")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class EdgeScores:
    """Scores of a graph's edges, and statistics of them.

    A pytree whose leaves are the arrays. ``np.asarray(scores)`` is ``values``; ``scores["a0.h1->m3"]`` is one edge's.

    Attributes:
        values: ``[batch, pos, writer, reader]``, without the axes that were summed or averaged; zero where there is no
            edge. Positions count in each prompt's text.
        baseline: metric of the base run, a number or ``[batch]``; ``None`` for methods without a metric.
        source_metric: metric of the source's run, likewise; ``None`` if there is none.
        completeness: by how much scores miss the sum that the path's method has in the limit of many steps, in the
            metric's units, a number or ``[batch]``; ``None`` for methods without such a sum.
        axis_names: names of the axes of ``values``; the last two are ``"writer"`` and ``"reader"``.
        graph: the graph.
        convention: how they were computed, and what they mean.
        fingerprint: which model they belong to; ``None`` if unknown.
        n_prompts: how many prompts they are of.
    """

    values: jax.Array
    baseline: jax.Array | None = None
    source_metric: jax.Array | None = None
    completeness: jax.Array | None = None
    axis_names: tuple[str, ...] = dataclasses.field(default=EDGE_AXES, metadata={"static": True})
    graph: ResidualGraph = dataclasses.field(kw_only=True, metadata={"static": True})
    convention: EdgeConvention = dataclasses.field(kw_only=True, metadata={"static": True})
    fingerprint: Fingerprint | None = dataclasses.field(default=None, kw_only=True, metadata={"static": True})
    n_prompts: int = dataclasses.field(default=1, kw_only=True, metadata={"static": True})

    def __post_init__(self) -> None:
        shape = getattr(self.values, "shape", None)
        if shape is None:  # jax rebuilds pytrees with placeholders
            return
        if len(shape) != len(self.axis_names) or self.axis_names[-2:] != EDGE_AXES or shape[-2:] != self.graph.shape:
            raise InputError(
                f"Scores of shape {tuple(shape)} with axes {self.axis_names} do not fit a graph of "
                f"{self.graph.n_writers} writers and {self.graph.n_readers} readers: the last two axes are writer and "
                "reader."
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each axis, by name."""
        return dict(zip(self.axis_names, self.values.shape, strict=True))

    def __getitem__(self, name: str) -> jax.Array:
        """Returns the score of one edge, by name: a number, or one for each prompt and position.

        Raises:
            InputError: the graph has no such edge; the message has the nearest name.
        """
        if not isinstance(name, str):
            raise InputError(f'scores[{name!r}]: give the name of an edge, such as scores["input->logits"], or index '
                             "scores.values.")  # fmt: skip
        writer, reader = self.graph.edge(name)
        return self.values[..., writer, reader]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype) if copy else np.asarray(self.values, dtype)

    def __jax_array__(self) -> jax.Array:
        return self.values

    def __repr__(self) -> str:
        sizes = ", ".join(f"{axis}: {size}" for axis, size in self.sizes.items())
        missed = "" if self.completeness is None else f", completeness error {self.completeness_error:.2g}"
        return f"EdgeScores({sizes}; {self.graph.n_edges} edges, {self.n_prompts} prompts; {self.convention}{missed})"

    @property
    def completeness_error(self) -> float | None:
        """Mean size of :attr:`completeness`, as a share of the mean difference of source and base metric."""
        if self.completeness is None:
            return None
        missed = float(np.abs(np.asarray(self.completeness)).mean())
        if self.source_metric is None or self.baseline is None:
            return missed
        gap = float(np.abs(np.asarray(self.source_metric) - np.asarray(self.baseline)).mean())
        return missed / gap if gap else missed

    def sum_positions(self) -> "EdgeScores":
        """Returns the scores summed over positions (themselves if they were summed already)."""
        return self._over("pos", jnp.sum)

    def mean(self) -> "EdgeScores":
        """Returns the scores averaged over prompts (themselves if they were averaged already)."""
        averaged = self._over("batch", jnp.mean)
        numbers = {name: getattr(self, name) for name in ("baseline", "source_metric", "completeness")}
        return dataclasses.replace(averaged, **{n: None if v is None else jnp.mean(v) for n, v in numbers.items()})

    def abs(self) -> "EdgeScores":
        """Returns the sizes of the scores, so that ``scores.abs().mean()`` is the mean size over prompts."""
        return dataclasses.replace(self, values=jnp.abs(self.values))

    def node_scores(self) -> jax.Array:
        """Returns each writer's score, the sum over its readers: the effect of all its edges, to first order.

        Returns:
            The axes of ``values`` without ``reader``; for EAP, gradient times change at the writer's own output.
        """
        return self.values.sum(axis=-1)

    @typed
    def top(self, k: int = 10, by: By = "absolute") -> list[tuple[str, float]]:
        """Returns the edges with the largest scores, summed over positions and averaged over prompts.

        Args:
            k: number of edges.
            by: ``"absolute"``; ``"lowers"`` for the edges whose replacement lowers the metric most (a helpful edge, if
                the metric is large on the base run); ``"raises"``.
        """
        values = self._whole()
        order = np.argsort(np.where(self.graph.edges, -ranked(values, by), np.inf), axis=None, kind="stable")
        chosen = order[: min(whole(k, "k", at_least=1), self.graph.n_edges)]
        pairs = zip(*np.unravel_index(chosen, values.shape), strict=True)
        return [(self.graph.edge_name(int(u), int(v)), float(values[u, v])) for u, v in pairs]

    @typed
    def bootstrap_ci(
        self, *, confidence: float = 0.95, n_resamples: int = 1000, seed: int = 0
    ) -> tuple[jax.Array, jax.Array]:
        """Computes a percentile bootstrap interval over prompts of each edge's mean score.

        Args:
            confidence: share of resampled means inside the interval.
            n_resamples: how often the prompts are drawn with replacement; all edges see the same draws.
            seed: seed of the draws.

        Returns:
            Lower and upper ends, the axes of ``values`` without ``batch``.

        Raises:
            InputError: scores were averaged over prompts, there is one prompt, or an argument is out of range.
        """
        samples = np.moveaxis(self._prompts("A bootstrap interval"), 0, -1)
        at_edges = samples[..., self.graph.edges, :]
        ends = bootstrap_interval(at_edges, confidence=confidence, n_resamples=n_resamples, seed=seed, statistic="mean")
        return self._spread(ends[0]), self._spread(ends[1])

    def sign_stability(self) -> jax.Array:
        """Returns for each edge the share of prompts whose score has the sign of the mean score; 1 if all agree.

        Returns:
            The axes of ``values`` without ``batch``; zero where there is no edge.

        Raises:
            InputError: scores were averaged over prompts, or there is one prompt.
        """
        samples = self._prompts("Stability of signs")
        agree = np.sign(samples) == np.sign(samples.mean(axis=0))
        return self._spread(agree.mean(axis=0)[..., self.graph.edges])

    def rank_correlation(self, other: "EdgeScores") -> float:
        """Computes Spearman's rank correlation over edges with other scores of the same graph.

        Both are summed over positions and averaged over prompts first; equal scores share their mean rank.

        Raises:
            InputError: scores of another graph, of another model, or shares of an input (``"information-flow"``)
                against effects on a metric.
        """
        self.check_comparable(other)
        ordered = [ranks(scores._whole()[self.graph.edges]) for scores in (self, other)]
        centred = [one - one.mean() for one in ordered]
        sizes = np.sqrt([float((one**2).sum()) for one in centred])
        if not sizes.all():
            raise InputError("A rank correlation needs scores that differ from edge to edge; one side's are all equal.")
        return float((centred[0] * centred[1]).sum() / sizes.prod())

    @typed
    def circuit(
        self,
        *,
        top: int | None = None,
        fraction: float | None = None,
        threshold: float | None = None,
        by: By = "absolute",
        greedy: bool = False,
        prune: bool = True,
    ) -> Circuit:
        """Returns the circuit of the best edges, by exactly one of three sizes.

        Scores are summed over positions and averaged over prompts first.

        Args:
            top: how many edges.
            fraction: which share of all edges, in (0, 1]; rounded down to a whole number of edges.
            threshold: the least score.
            by: what is preferred: ``"absolute"``, large scores; ``"lowers"``, edges whose replacement lowers the metric
                (what EAP-IG calls signed); ``"raises"``.
            greedy: whether edges are found from the logits up, each leading to a part of the circuit.
            prune: whether to remove edges on no way from the token embedding to the logits.

        Raises:
            InputError: none or several of the sizes, one out of range, or scores that are NaN.
        """
        sizes = {"top": top, "fraction": fraction, "threshold": threshold}
        mask = select(self._whole(), self.graph, **sizes, by=by, greedy=greedy, prune=prune)
        return Circuit(mask, self.graph, name=self.convention.method)

    @typed
    def to_json(
        self,
        path: str | os.PathLike[str],
        *,
        layout: Literal["tljax", "eap-ig"] = "tljax",
        circuit: Circuit | None = None,
    ) -> None:
        """Writes the scores as JSON.

        Args:
            path: the file, replaced atomically.
            layout: ``"tljax"``, which keeps all that there is; or ``"eap-ig"``, for a file that EAP-IG and the MIB
                circuit track read: scores summed over positions, averaged over prompts, and negated, because theirs are
                of a loss. (EAP-IG's own numbers are divided by the number of prompts once more.)
            circuit: in EAP-IG's layout, the circuit to write with them; empty by default.

        Raises:
            InputError: scores that EAP-IG's layout has no place for, such as those of grouped key and value heads.
        """
        if layout == "eap-ig":
            write_eap_ig_json(path, as_eap_ig(self.graph, self._whole(), circuit))
            return
        if circuit is not None:
            raise InputError(
                'circuit= belongs to layout="eap-ig"; write it to a file of its own: circuit.to_json(path).'
            )
        write_scores(path, self)

    @classmethod
    @typed
    def from_json(cls, path: str | os.PathLike[str], model: HookedTransformer | None = None) -> "EdgeScores":
        """Reads scores that :meth:`to_json` or EAP-IG wrote.

        EAP-IG's are negated, so that they are effects on the metric; its files do not say how they were computed.

        Args:
            path: the file.
            model: the model that they must belong to. EAP-IG's scores of a grouped-query model belong to
                ``model.set_ungroup_grouped_query_attention(True)``.

        Raises:
            CheckpointError: the file is missing, damaged, or belongs to another model.
            InputError: its graph is not the model's.
        """
        return cls._of_file(path, read_scores_json(path, model))

    @typed
    def to_pt(self, path: str | os.PathLike[str], *, circuit: Circuit | None = None) -> None:
        """Writes the scores as EAP-IG's ``.pt``, as :meth:`to_json` does in its layout; this needs torch.

        Raises:
            UnsupportedModelError: torch is not installed.
            InputError: scores that the layout has no place for.
        """
        write_eap_ig_pt(path, as_eap_ig(self.graph, self._whole(), circuit))

    @classmethod
    @typed
    def from_pt(cls, path: str | os.PathLike[str], model: HookedTransformer | None = None) -> "EdgeScores":
        """Reads scores from EAP-IG's ``.pt``, as :meth:`from_json`; this needs torch, and runs no code of the file.

        Raises:
            UnsupportedModelError: torch is not installed.
            CheckpointError: the file is missing, damaged or something else.
            InputError: its graph is not the model's.
        """
        return cls._of_file(path, read_scores_pt(path, model))

    @classmethod
    def _of_file(cls, path: str | os.PathLike[str], fields: dict[str, Any]) -> "EdgeScores":
        with own_errors(path, "Write it anew with to_json.", CheckpointError):
            fields["convention"] = EdgeConvention(**fields["convention"])
            return cls(**fields)

    def check_comparable(self, other: "EdgeScores") -> None:
        """Checks that other scores are of the same graph and model, and mean the same.

        Raises:
            InputError: they are not; the message says what differs.
        """
        if self.graph != other.graph:
            fields = [
                f"{field.name}={getattr(other.graph, field.name)} (here: {getattr(self.graph, field.name)})"
                for field in dataclasses.fields(self.graph)
                if getattr(self.graph, field.name) != getattr(other.graph, field.name)
            ]
            raise InputError(
                f"The scores are of different graphs: {', '.join(fields)}. ResidualGraph.group sums ungrouped key and "
                "value heads; other graphs have no edges in common."
            )
        if (self.convention.sign, self.convention.delta) != (other.convention.sign, other.convention.delta):
            raise InputError(
                f"These scores mean different things: {self.convention}; and {other.convention}. Compare scores of one "
                "ablation, and effects with effects."
            )
        if self.fingerprint is None or other.fingerprint is None:
            return
        if found := self.fingerprint.differences(other.fingerprint):
            raise InputError(f"The scores are of different models: {', '.join(found)}.")

    def _whole(self) -> np.ndarray:
        """Returns scores summed over positions and averaged over prompts, ``[writer, reader]``."""
        values = np.asarray(self.sum_positions().mean().values)
        if np.isnan(values[self.graph.edges]).any():
            raise InputError("Some scores are NaN, so they have no order: see which by np.isnan(scores.values).")
        return values

    def _over(self, axis: str, reduce: Any) -> "EdgeScores":
        if axis not in self.axis_names:
            return self
        number = self.axis_names.index(axis)
        names = tuple(name for name in self.axis_names if name != axis)
        return dataclasses.replace(self, values=reduce(self.values, axis=number), axis_names=names)

    def _prompts(self, what: str) -> np.ndarray:
        """Returns scores of each prompt, summed over nothing, float64 ``[batch, ...]``."""
        if "batch" not in self.axis_names:
            raise InputError(f'{what} needs the score of each prompt: edge_scores(..., reduce="none").')
        samples = np.asarray(self.values, np.float64)
        if len(samples) < 2:
            raise InputError(f"{what} needs at least two prompts; these scores are of one.")
        return samples

    def _spread(self, at_edges: np.ndarray) -> jax.Array:
        """Returns numbers of edges ``[..., edge]`` as ``[..., writer, reader]``, zero elsewhere."""
        values = np.zeros((*at_edges.shape[:-1], *self.graph.shape), np.float32)
        values[..., self.graph.edges] = at_edges
        return jnp.asarray(values)


def ranks(values: np.ndarray) -> np.ndarray:
    """Returns ranks of values, the mean rank for equal ones."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse.ravel()]
