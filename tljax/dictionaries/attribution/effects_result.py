"""``FeatureEffects``: the effect of each active feature at each position on a metric, as a sparse table."""

import dataclasses
from typing import Any, Literal, NamedTuple

import numpy as np

from tljax.attribution.convention import Convention
from tljax.attribution.integrated import Completeness
from tljax.attribution.verification import Verification
from tljax.checks import typed, whole
from tljax.errors import InputError, nearest
from tljax.fingerprint import Fingerprint


class FeatureEffect(NamedTuple):
    """One row of :class:`FeatureEffects`.

    Attributes:
        point: the point of the dictionary, such as ``"blocks.2.hook_resid_pre"``.
        prompt: number of the prompt.
        pos: position in the prompt's text.
        feature: number of the feature.
        activation: its activation in the run.
        effect: metric with the feature patched minus metric without.
    """

    point: str
    prompt: int
    pos: int
    feature: int
    activation: float
    effect: float


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FeatureEffects:
    """The effect of each active feature at each position of each prompt on a metric.

    Effects are patched minus baseline: under zero ablation, a feature that the metric needs has a negative effect. Rows
    are sorted by point, prompt, position and feature.

    Attributes:
        points: the points with dictionaries, in firing order.
        point: which of them, ``[row]``.
        prompt: number of the prompt, ``[row]``.
        pos: position in the prompt's text, ``[row]``.
        feature: number of the feature, ``[row]``.
        activation: the feature's activation in the run, ``[row]``.
        patched: what it was patched to, ``[row]``; 0 under zero ablation.
        effect: the effect, ``[row]``.
        error_effect: effect of patching a point's error term at a position, contracted over its width, ``[point, batch,
            pos]``; NaN where a prompt has no such position, and throughout if the error term is dropped.
        baseline: the metric of the run, ``[batch]``.
        ablation: ``"zero"``, or ``"source"`` for the values of another run.
        convention: of an estimate, what it means; ``None`` if effects are exact.
        completeness: of integrated gradients, how well features and error of each point add up.
        verified: exact effects beside the largest estimates, if that was asked for.
        tokens: text of each token, ``[batch][pos]``; empty without a tokenizer.
        model: fingerprint of the model without its dictionaries.
    """

    points: tuple[str, ...]
    point: np.ndarray
    prompt: np.ndarray
    pos: np.ndarray
    feature: np.ndarray
    activation: np.ndarray
    patched: np.ndarray
    effect: np.ndarray
    error_effect: np.ndarray
    baseline: np.ndarray
    ablation: Literal["zero", "source"]
    convention: Convention | None = None
    completeness: Completeness | None = None
    verified: Verification | None = None
    tokens: tuple[tuple[str, ...], ...] = ()
    model: Fingerprint | None = None

    def __len__(self) -> int:
        return len(self.effect)

    def __getitem__(self, row: int) -> FeatureEffect:
        return FeatureEffect(
            self.points[self.point[row]], int(self.prompt[row]), int(self.pos[row]), int(self.feature[row]),
            float(self.activation[row]), float(self.effect[row]),
        )  # fmt: skip

    @typed
    def top(
        self, k: int = 10, by: Literal["size", "highest", "lowest"] = "size", *, point: str | None = None
    ) -> list[FeatureEffect]:
        """Returns the rows with the largest effects.

        Args:
            k: number of rows.
            by: ``"size"``, ``"highest"`` or ``"lowest"``.
            point: a point with a dictionary, to look at alone.
        """
        whole(k, "k", at_least=1)
        ranks = {"size": -np.abs(self.effect), "highest": -self.effect, "lowest": self.effect}
        if by not in ranks:
            raise InputError(f"by={by!r} is not one of {', '.join(map(repr, ranks))}.{nearest(by, ranks)}")
        rank = ranks[by].astype(np.float64)
        if point is not None:
            rank[self.point != self._point(point)] = np.inf
        order = np.argsort(rank, kind="stable")[:k]
        return [self[int(row)] for row in order if rank[row] < np.inf]

    @typed
    def by_feature(self, point: str) -> dict[int, float]:
        """Returns each feature's effect at a point, summed over positions and averaged over prompts, largest first."""
        here = self.point == self._point(point)
        features, rows = np.unique(self.feature[here], return_inverse=True)
        sums = np.bincount(rows.reshape(-1), self.effect[here], len(features)) / len(self.baseline)
        order = np.argsort(-np.abs(sums), kind="stable")
        return {int(features[n]): float(sums[n]) for n in order}

    def to_dict(self) -> dict[str, list[Any]]:
        """Returns the rows as lists by column, ready for JSON or a table: ``pandas.DataFrame(effects.to_dict())``."""
        columns = {name: getattr(self, name).tolist() for name in _COLUMNS}
        return {"point": [self.points[number] for number in self.point], **columns}

    @typed
    def table(self, k: int = 20) -> str:
        """Returns the ``k`` largest effects as a table in text, and below it what they mean."""
        lines = [
            f"{'point':<28} {'prompt':>6} {'pos':>4} {'token':<12} {'feature':>8} {'activation':>10} {'effect':>10}"
        ]
        for row in self.top(k) if len(self) else ():
            token = repr(self.tokens[row.prompt][row.pos]) if self.tokens else ""
            lines.append(
                f"{row.point:<28} {row.prompt:>6} {row.pos:>4} {token:<12} {row.feature:>8} {row.activation:>10.4g} "
                f"{row.effect:>+10.4g}"
            )
        return "\n".join((*lines, self._said()))

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        best = "; ".join(f"{row.point} feature {row.feature} at {row.pos}: {row.effect:+.3g}" for row in self.top(1))
        return (
            f"FeatureEffects({len(self)} active features at {len(self.points)} points; largest {best}; {self._said()})"
        )

    def _said(self) -> str:
        how = "exact; effect: patched - baseline" if self.convention is None else str(self.convention)
        to = "zero" if self.ablation == "zero" else "the source's values"
        more = [str(one) for one in (self.completeness, self.verified) if one is not None]
        return "; ".join((how, f"patched to {to}", f"baseline {float(self.baseline.mean()):.4g}", *more))

    def _point(self, name: str) -> int:
        if name not in self.points:
            raise InputError(f"There is no point {name!r} among {', '.join(self.points)}.{nearest(name, self.points)}")
        return self.points.index(name)


_COLUMNS = ("prompt", "pos", "feature", "activation", "patched", "effect")
