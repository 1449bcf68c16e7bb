"""Statistics of activations that add up: mean, squares about it, norms; over batches, then over shards.

Batches give float32 sums about their own mean, and these are merged in float64 by the formula of Chan, Golub and
LeVeque (1979), so that a mean far from zero costs no precision. Norms are counted in 64 bins an octave: a quantile is
right to half a bin, 0.6 %.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tljax.errors import HarvestError, InputError

_LOWEST, _HIGHEST, _PER_OCTAVE = -32, 64, 64
_BINS = (_HIGHEST - _LOWEST) * _PER_OCTAVE


def histogram_of(norms: jax.Array, kept: jax.Array) -> jax.Array:
    """Counts kept norms ``[token]`` by bins of their logarithm, ``[bin]`` int32."""
    octaves = jnp.log2(jnp.maximum(norms, jnp.float32(2.0**_LOWEST))) - _LOWEST
    index = jnp.clip(jnp.floor(octaves * _PER_OCTAVE), 0, _BINS - 1).astype(jnp.int32)
    return jnp.zeros(_BINS, jnp.int32).at[index].add(kept.astype(jnp.int32))


def merge_moments(total: Mapping[str, np.ndarray], added: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the moments of both, in float64; ``total`` may be empty."""
    here: dict[str, np.ndarray] = {
        name: np.asarray(value, np.int64 if name == "norms" else np.float64) for name, value in added.items()
    }
    if not total:
        return here
    n, m = float(total["count"]), float(here["count"])
    if not m:
        return dict(total)
    delta = here["mean"] - total["mean"]
    share = n * m / (n + m)
    merged = {name: total[name] + here[name] for name in total}
    merged["mean"] = total["mean"] + delta * (m / (n + m))
    merged["squares"] = merged["squares"] + delta * delta * share
    if "products" in merged:
        merged["products"] = merged["products"] + np.outer(delta, delta) * share
    return merged


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of a point's stored activations, ``d`` wide.

    Attributes:
        n_tokens: how many.
        mean: float64 ``[d]``.
        variance: of each entry, about the mean (divided by ``n_tokens``), float64 ``[d]``.
        mean_norm: mean of the tokens' norms.
        norm_counts: tokens by bins of their norm, int64.
        products: ``[d, d]`` sums of products about the mean, or ``None`` if they were not asked for.
    """

    n_tokens: int
    mean: np.ndarray
    variance: np.ndarray
    mean_norm: float
    norm_counts: np.ndarray = dataclasses.field(repr=False)
    products: np.ndarray | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def of(cls, sums: Mapping[str, np.ndarray]) -> "Statistics":
        """Returns the statistics that merged sums hold."""
        count = max(float(sums["count"]), 1.0)
        return cls(
            int(sums["count"]), sums["mean"], sums["squares"] / count, float(sums["norm_sum"]) / count,
            sums["norms"], sums.get("products"),
        )  # fmt: skip

    @property
    def mean_squared_norm(self) -> float:
        """Mean of the tokens' squared norms."""
        return float(self.variance.sum() + (self.mean**2).sum())

    @property
    def covariance(self) -> np.ndarray:
        """Covariance of the entries, divided by ``n_tokens``, float64 ``[d, d]``.

        Raises:
            HarvestError: it was not harvested.
        """
        if self.products is None:
            raise HarvestError(
                "This store has no covariance: harvest(..., covariance=True) sums it up, or compute it from the rows."
            )
        return self.products / max(self.n_tokens, 1)

    def norm_quantiles(self, shares: Sequence[float] = (0.01, 0.1, 0.5, 0.9, 0.99)) -> np.ndarray:
        """Returns quantiles of the tokens' norms, right to 0.6 %.

        Raises:
            InputError: a share is not between 0 and 1.
        """
        wanted = np.asarray(shares, np.float64)
        if not ((wanted >= 0) & (wanted <= 1)).all():
            raise InputError(f"shares={list(shares)} must lie between 0 and 1, such as 0.5 for the median.")
        below = np.cumsum(self.norm_counts)
        index = np.searchsorted(below, np.maximum(np.ceil(wanted * below[-1]), 1))
        return 2.0 ** (_LOWEST + (index + 0.5) / _PER_OCTAVE)
