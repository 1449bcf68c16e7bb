"""What is kept of each batch: the program that turns a run's activations into rows, and sums over them."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from tljax.errors import HarvestError
from tljax.harvest.moments import histogram_of, merge_moments
from tljax.harvest.points import Point, run_to_points
from tljax.harvest.windows import Windows
from tljax.model.hooked_transformer import HookedTransformer

Arrays = dict[str, np.ndarray]
BESIDE_BYTES = 20
"""Bytes of a token's id, position, document and window, and of its place in the window's context."""
Headers = dict[str, tuple[np.dtype, int]]
"""Dtype and width of each stored array, by name; rows are tokens."""


class Collected(NamedTuple):
    """What a batch gives, on the device.

    Attributes:
        values: ``[token, width]`` of each stored array, in order.
        kept: ``[token]``, which rows to keep.
        finite: ``[point]``, whether all that is kept is finite.
        sums: arrays that :meth:`Collector.merge` adds up, by name.
    """

    values: tuple[jax.Array, ...]
    kept: jax.Array
    finite: jax.Array
    sums: Any


class Collector(Protocol):
    """What a harvest keeps."""

    points: tuple[Point, ...]

    @property
    def headers(self) -> Headers:
        """The arrays that are stored."""
        ...

    def describe(self) -> dict[str, Any]:
        """Returns what determines the result, as JSON values for the index."""
        ...

    def collect(self, model: HookedTransformer, windows: Windows, kept: np.ndarray) -> Collected:
        """Runs windows; ``kept`` ``[token]`` says which tokens may be kept."""
        ...

    def merge(self, total: Arrays, added: Mapping[str, Any]) -> Arrays:
        """Adds a batch's or a shard's sums to a total, which may be empty."""
        ...


def row_bytes(collector: Collector) -> int:
    """Returns the bytes that a token takes on disk."""
    return BESIDE_BYTES + sum(dtype.itemsize * width for dtype, width in collector.headers.values())


class Activations:
    """Keeps activations as they are, and their moments.

    Args:
        points: where.
        dtype: as what they are stored.
        max_norm_ratio: tokens whose norm at any point is over this many times the batch's median are left out.
        covariance: whether to sum products of all pairs of entries.
    """

    def __init__(
        self, points: tuple[Point, ...], dtype: str, max_norm_ratio: float | None = None, covariance: bool = False
    ) -> None:
        self.points, self.dtype = points, dtype
        self.max_norm_ratio, self.covariance = max_norm_ratio, covariance

    @property
    def headers(self) -> Headers:
        return {point.name: (np.dtype(self.dtype), point.width) for point in self.points}

    def describe(self) -> dict[str, Any]:
        shapes = {p.name: {"axes": list(p.axes), "shape": list(p.shape)} for p in self.points}
        return {
            "points": shapes, "dtype": self.dtype, "max_norm_ratio": self.max_norm_ratio, "covariance": self.covariance
        }  # fmt: skip

    def collect(self, model: HookedTransformer, windows: Windows, kept: np.ndarray) -> Collected:
        values = run_to_points(model, self.points, windows)
        collected = collect_rows(values, kept, self.dtype, self.max_norm_ratio, self.covariance)
        sums = {
            f"{point.name}/{name}": value
            for point, own in zip(self.points, collected.sums, strict=True)
            for name, value in own.items()
        }
        return collected._replace(sums=sums)

    def merge(self, total: Arrays, added: Mapping[str, Any]) -> Arrays:
        merged: Arrays = {}
        for point in self.points:
            moments = merge_moments(sums_of(total, point.name), sums_of(added, point.name))
            merged |= {f"{point.name}/{name}": value for name, value in moments.items()}
        return merged


def sums_of(sums: Mapping[str, Any], point: str) -> dict[str, Any]:
    """Returns the sums of one point, by their own names."""
    return {name.removeprefix(f"{point}/"): value for name, value in sums.items() if name.startswith(f"{point}/")}


@functools.partial(jax.jit, static_argnames=("dtype", "max_norm_ratio", "covariance"))
def collect_rows(
    values: tuple[jax.Array, ...], kept: jax.Array, dtype: str, max_norm_ratio: float | None, covariance: bool
) -> Collected:
    """Casts activations ``[window, pos, ...]`` to rows, and sums up what is kept of them, one dict for each point."""
    rows = [value.reshape(len(kept), -1).astype(dtype) for value in values]
    exact = [row.astype(jnp.float32) for row in rows]
    norms = [jnp.sqrt(jnp.sum(row * row, axis=1)) for row in exact]
    finite = jnp.stack([jnp.isfinite(jnp.where(kept[:, None], row, 0)).all() for row in exact])
    if max_norm_ratio is not None:
        small = [norm <= max_norm_ratio * jnp.nanmedian(jnp.where(kept, norm, jnp.nan)) for norm in norms]
        kept = functools.reduce(jnp.logical_and, small, kept)
    sums: list[dict[str, jax.Array]] = []
    count = jnp.sum(kept.astype(jnp.float32))
    for row, norm in zip(exact, norms, strict=True):
        inside = jnp.where(kept[:, None], row, 0)
        mean = jnp.sum(inside, axis=0) / jnp.maximum(count, 1)
        centred = jnp.where(kept[:, None], row - mean[None], 0)
        own = {
            "count": count, "mean": mean, "squares": jnp.sum(centred * centred, axis=0),
            "norm_sum": jnp.sum(jnp.where(kept, norm, 0)), "norms": histogram_of(norm, kept),
        }  # fmt: skip
        if covariance:
            own["products"] = jnp.matmul(centred.T, centred, precision="highest")
        sums.append(own)
    return Collected(tuple(rows), kept, finite, sums)


def refuse_not_finite(point: Point, values: np.ndarray, kept: np.ndarray, windows: Windows, dtype: str) -> HarvestError:
    """Returns the error for activations that are not finite: where the first of them is."""
    token = int(np.flatnonzero(kept & ~np.isfinite(values.astype(np.float32)).all(axis=1))[0])
    window, pos = divmod(token, windows.tokens.shape[1])
    row = values[token].astype(np.float32)
    bad = "NaN" if np.isnan(row).any() else "infinite"
    remedy = (
        "Numbers beyond 65504 are infinite in float16: store dtype='bfloat16' or 'float32'."
        if dtype == "float16" and bad == "infinite"
        else "Look for the first layer where it happens (run_with_cache on that window), or for a damaged checkpoint."
    )
    return HarvestError(
        f"{point.place} is {bad} at position {pos} of window {windows.first + window} (token "
        f"{int(windows.tokens[window, pos])}, document {int(windows.documents[window, pos])}): nothing of this shard "
        f"is written. {remedy}"
    )
