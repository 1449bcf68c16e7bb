"""``PatchingResult``: a sweep's metrics as an array with named axes, with statistics over prompts."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from tljax.attribution.convention import Convention
from tljax.attribution.integrated import Completeness
from tljax.attribution.verification import Verification
from tljax.checks import typed, whole
from tljax.errors import InputError, nearest
from tljax.patching import tables
from tljax.patching.picture import picture_of
from tljax.patching.result_entries import check_scale, entry_number
from tljax.patching.statistics import bootstrap_interval, sign_flip_pvalue
from tljax.viz.drawing import Drawable, Picture
from tljax.viz.heatmap import HeatmapOptions, heatmap

_RUN_AXES = ("metric", "batch")
"""The axes that are not axes of sites; ``baseline`` and ``clean`` have no others."""
_LEAVES = ("values", "baseline", "clean", "change")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PatchingResult(Drawable):
    """The metric after patching each site, and statistics of it.

    It can be used as the array ``values``: ``np.asarray(result)``, ``jnp.mean(result)``, ``result[3]`` and
    ``result.shape`` refer to it. ``result["kl"]`` is the result for one of several metrics. As a pytree its leaves are
    ``values``, ``baseline``, ``clean`` and ``change``; jax transformations drop ``report``, ``completeness`` and
    ``verified``.

    **Signs.** An effect is patched minus baseline, the baseline being the base run as it is. Denoising puts clean
    activations into a corrupted run: with a metric that is larger on the clean run, a positive effect restores. Noising
    puts corrupted activations into a clean run: there a negative effect breaks, and the site was needed.

    Attributes:
        values: the metric, one axis for each of ``axis_names``.
        axis_names: such as ``("layer", "pos")``. ``"metric"`` comes first if metrics were given by name,
            ``"patch_type"`` before the layer if kinds of activation are compared, ``"batch"`` last if the metric was
            kept for each prompt. ``"row"`` is the axis of sites that were listed in a table.
        baseline: the metric of the unpatched base run, with only the ``metric`` and ``batch`` axes of ``values``.
        clean: the metric of the run that the patched-in values come from, shaped like ``baseline``.
        metric_names: one name for each metric.
        activation_name: what was patched.
        labels: for some axes, a text for each entry: tokens along ``pos``, kinds of activation along ``patch_type``.
            Labels of axes that ``values`` lacks are dropped.
        rows: the listed sites, a pandas DataFrame with one row for each entry of the ``"row"`` axis.
        report: the sweep's :class:`~tljax.patching.SweepReport`: what was skipped and what was spent.
        change: of an estimated sweep, the estimates themselves, shaped like ``values``, which are ``baseline + change``
            rounded; :meth:`effect` returns them. ``None`` if the sweep was exact.
        convention: of an estimated sweep, where the gradient was taken, of what, and with which sign.
        completeness: of integrated gradients, how well they add up.
        verified: what exact patching says of the estimates, if that was asked for.

    Raises:
        InputError: names or arrays that do not fit ``values``.

    Example:
        >>> values = jnp.asarray([[0.0, 0.5], [2.0, 0.0]])
        >>> result = PatchingResult(values, ("layer", "pos"), baseline=jnp.asarray(0.0), clean=jnp.asarray(4.0))
        >>> result.normalized().tolist()
        [[0.0, 0.125], [0.5, 0.0]]
        >>> result.top(1)
        [((1, 0), 2.0)]
    """

    values: jax.Array
    axis_names: tuple[str, ...]
    baseline: jax.Array | None = None
    clean: jax.Array | None = None
    metric_names: tuple[str, ...] = ("metric",)
    activation_name: str = ""
    labels: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    rows: Any = None
    report: Any = None
    change: jax.Array | None = None
    convention: Convention | None = None
    completeness: Completeness | None = None
    verified: Verification | None = None

    def __post_init__(self) -> None:
        labels = {axis: tuple(texts) for axis, texts in self.labels.items() if axis in self.axis_names}
        object.__setattr__(self, "labels", labels)
        shape = self.values.shape
        if len(self.axis_names) != len(shape):
            raise InputError(f"values has shape {shape}, which needs {len(shape)} axis names; got {self.axis_names}.")
        for axis, texts in labels.items():
            if len(texts) != self.sizes[axis]:
                raise InputError(f"{len(texts)} labels for axis {axis!r}, which has {self.sizes[axis]} entries.")
        if len(self.metric_names) != self.sizes.get("metric", 1):
            raise InputError(f"{len(self.metric_names)} metric names for values with axes {self.sizes}.")
        if self.change is not None and self.change.shape != shape:
            raise InputError(f"change has shape {self.change.shape}, not that of values, {shape}.")
        for name in ("baseline", "clean"):
            array = getattr(self, name)
            if array is not None and array.shape != self._run_shape:
                raise InputError(f"{name} has shape {array.shape}, not {self._run_shape}: axes {self._run_axes} alone.")

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each axis, by name."""
        return dict(zip(self.axis_names, self.values.shape, strict=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of ``values``."""
        return self.values.shape

    @property
    def has_metric_axis(self) -> bool:
        """Whether several metrics were asked for by name, so that ``values`` has a leading ``metric`` axis."""
        return "metric" in self.axis_names

    @property
    def reduced(self) -> bool:
        """Whether the metric was averaged over prompts, so that there is no ``batch`` axis."""
        return "batch" not in self.axis_names

    @property
    def patch_type_names(self) -> tuple[str, ...] | None:
        """Names along the ``patch_type`` axis; ``None`` if there is none."""
        return tuple(self.labels["patch_type"]) if "patch_type" in self.labels else None

    @property
    def site_axes(self) -> tuple[str, ...]:
        """The axes that tell sites apart: neither ``metric`` nor ``batch``."""
        return tuple(axis for axis in self.axis_names if axis not in _RUN_AXES)

    @property
    def index_df(self) -> Any:
        """The sites as a pandas DataFrame, one row a site in the order of ``values``, one column an axis."""
        return tables.site_frame(self)

    def __getitem__(self, index: Any) -> Any:
        """Returns the result for the metric of this name; any other index is applied to ``values``."""
        if not isinstance(index, str):
            return self.values[index]
        if not self.has_metric_axis and index in self.metric_names:
            return self
        if index not in self.metric_names:
            known = ", ".join(map(repr, self.metric_names))
            raise InputError(f"No metric {index!r} in this result; it has {known}.{nearest(index, self.metric_names)}")
        return self.select(metric=index)

    def select(self, **where: int | str) -> "PatchingResult":
        """Returns the part of the result at one entry of each named axis; those axes are dropped.

        Args:
            **where: axis name → number of the entry, or its label: ``select(layer=3)``, ``select(patch_type="q")``.

        Raises:
            InputError: an axis or an entry that the result does not have.
        """
        chosen = {axis: entry_number(self, axis, entry) for axis, entry in where.items()}

        def at(array: jax.Array | None, axes: Sequence[str]) -> jax.Array | None:
            return None if array is None else array[tuple(chosen.get(axis, slice(None)) for axis in axes)]

        values = at(self.values, self.axis_names)
        assert values is not None
        return PatchingResult(
            values, tuple(axis for axis in self.axis_names if axis not in chosen),
            baseline=at(self.baseline, self._run_axes), clean=at(self.clean, self._run_axes),
            metric_names=(self.metric_names[chosen["metric"]],) if "metric" in chosen else self.metric_names,
            activation_name=self.activation_name,
            labels={axis: texts for axis, texts in self.labels.items() if axis not in chosen},
            rows=None if "row" in chosen else self.rows, report=self.report,
            change=at(self.change, self.axis_names), convention=self.convention, completeness=self.completeness,
            verified=self.verified,
        )  # fmt: skip

    def mean(self) -> jax.Array:
        """Returns the metric averaged over prompts (``values`` itself if it was averaged already)."""
        return self.values if self.reduced else self.values.mean(axis=-1)

    def stderr(self) -> jax.Array:
        """Returns the standard error of :meth:`mean`: the prompts' standard deviation (``ddof=1``) over ``sqrt(n)``.

        Raises:
            InputError: the metric was averaged over prompts, or there is only one prompt.
        """
        prompts = self._prompts("A standard error")
        if prompts < 2:
            raise InputError("A standard error needs at least two prompts; this sweep ran one.")
        return self.values.std(axis=-1, ddof=1) / prompts**0.5

    def effect(self) -> jax.Array:
        """Returns patched minus baseline, shaped like ``values``: how far each patch moves the metric.

        Of an estimated sweep, what it estimates: see ``convention``.

        Raises:
            InputError: the result has no baseline.
        """
        return self.values - self._spread(self._baseline()) if self.change is None else self.change

    def normalized(self, clean_baseline: Any = None) -> jax.Array:
        """Returns effects on the scale where 0 is the base run and 1 the run that the patched-in values come from.

        Denoising: 0 is as corrupted, 1 fully restored. Noising: 0 is as clean, 1 as broken as the corrupted run.

        Args:
            clean_baseline: metric of the run that the values come from, shaped like ``baseline``; by default ``clean``.

        Raises:
            InputError: no baseline, no clean metric, or one that equals the baseline, so that there is no scale.
        """
        baseline = self._baseline()
        given = self.clean if clean_baseline is None else clean_baseline
        if given is None:
            raise InputError("The clean run's metric is not known here: give it, normalized(metric(clean_logits)).")
        clean = jnp.asarray(given, baseline.dtype)
        if clean.shape != baseline.shape:
            raise InputError(
                f"The clean run's metric has shape {clean.shape}, the baseline {baseline.shape} (axes "
                f"{self._run_axes}). Measure both runs on the same prompts, with the same metric."
            )
        check_scale(clean, baseline, self._run_axes)
        return self.effect() / self._spread(clean - baseline)

    @typed
    def bootstrap_ci(
        self,
        *,
        confidence: float = 0.95,
        n_resamples: int = 1000,
        seed: int = 0,
        statistic: str = "mean",
        of_effect: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """Computes a percentile bootstrap interval over prompts for each site.

        Args:
            confidence: share of resampled statistics inside the interval.
            n_resamples: how often the prompts are drawn with replacement; all sites see the same draws.
            seed: seed of the draws.
            statistic: ``"mean"`` or ``"median"`` of the prompts.
            of_effect: whether the interval is of :meth:`effect` instead of ``values``.

        Returns:
            Lower and upper ends, shaped like :meth:`mean`.

        Raises:
            InputError: the metric was averaged over prompts, or an argument is out of range.
        """
        if self._prompts("A bootstrap interval") < 2:
            raise InputError("A bootstrap interval needs at least two prompts; this sweep ran one.")
        samples = np.asarray(self.effect() if of_effect else self.values, np.float64)
        low, high = bootstrap_interval(
            samples, confidence=confidence, n_resamples=n_resamples, seed=seed, statistic=statistic
        )
        return jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32)

    @typed
    def permutation_pvalue(
        self, *, n_permutations: int = 1000, seed: int = 0, alternative: str = "two-sided"
    ) -> jax.Array:
        """Tests for each site whether its mean effect over prompts is zero, by flipping the signs of prompts' effects.

        With up to 12 prompts, all ``2 ** prompts`` sign patterns are tried and the p-value is exact: ``n_permutations``
        and ``seed`` are unused, and the smallest possible p-value is ``2 / 2 ** prompts`` (half that if one-sided).

        Args:
            n_permutations: number of random sign patterns drawn if there are more prompts.
            seed: seed of the random patterns.
            alternative: ``"two-sided"``, ``"greater"`` (the patch raises the metric) or ``"less"``.

        Returns:
            p-values shaped like :meth:`mean`; not corrected for the number of sites.

        Raises:
            InputError: the metric was averaged over prompts, no baseline, or an argument is out of range.
        """
        self._prompts("A permutation test")
        effects = np.asarray(self.effect(), np.float64)
        pvalues = sign_flip_pvalue(effects, n_permutations=n_permutations, seed=seed, alternative=alternative)
        return jnp.asarray(pvalues, jnp.float32)

    @typed
    def top(
        self, k: int = 5, by: Literal["highest", "lowest", "size"] = "highest"
    ) -> list[tuple[tuple[int, ...], float]]:
        """Returns the sites whose patches raise the metric most, as ``((layer, pos), effect)``, highest first.

        Effects are averaged over prompts. Sites without a value (NaN) are left out.

        Args:
            k: number of sites.
            by: ``"lowest"`` for the sites that lower it most (as in ablations), ``"size"`` for the largest changes.

        Raises:
            InputError: no baseline, or several metrics: take ``result["name"].top()``.
        """
        effect = self.site_effect()
        if by not in (ranks := {"highest": -effect, "lowest": effect, "size": -np.abs(effect)}):
            raise InputError(f"by={by!r} is not one of {', '.join(map(repr, ranks))}.")
        order = np.argsort(ranks[by].ravel())[: whole(k, "k", at_least=1)]
        found = [(np.unravel_index(n, effect.shape), float(effect.flat[n])) for n in order]
        return [(tuple(int(i) for i in site), value) for site, value in found if not np.isnan(value)]

    def to_dataframe(self) -> Any:
        """Returns a pandas DataFrame with one row for each metric, site and prompt.

        Columns: ``metric``, the axes (or the columns of ``rows``), ``patch_type_name`` if there are patch types,
        ``example`` (the prompt's number) if the metric was kept for each prompt, and ``value``.

        Raises:
            ImportError: pandas is not installed.
        """
        return tables.value_frame(self)

    def picture(self, of: str | None = None, facet: str | None = None) -> Picture:
        """Returns the picture that :meth:`plot` draws."""
        return picture_of(self, of, facet)

    @functools.partial(typed, receiver=heatmap)
    def plot(self, **options: Unpack[HeatmapOptions]) -> Any:
        """Draws a heat map; the options are those of :func:`tljax.viz.heatmap`."""
        return heatmap(self, **options)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype) if copy else np.asarray(self.values, dtype)

    def __jax_array__(self) -> jax.Array:
        return self.values

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[jax.Array]:
        return iter(self.values)

    def __repr__(self) -> str:
        return tables.describe(self)

    def site_effect(self) -> np.ndarray:
        """Returns effects averaged over prompts, ``[*site_axes]``, for a result with one metric."""
        if self.has_metric_axis:
            raise InputError(f"Effects on several metrics do not compare: choose one of {self.metric_names} by name.")
        effect = np.asarray(self.effect(), np.float32)
        return effect if self.reduced else effect.mean(axis=-1)

    @property
    def _run_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis in self.axis_names if axis in _RUN_AXES)

    @property
    def _run_shape(self) -> tuple[int, ...]:
        return tuple(size for axis, size in self.sizes.items() if axis in _RUN_AXES)

    def _baseline(self) -> jax.Array:
        if self.baseline is None:
            raise InputError("This result has no baseline to compare with: run the sweep with baseline=True.")
        return self.baseline

    def _spread(self, array: jax.Array) -> jax.Array:
        """Broadcasts an array that has only the ``metric`` and ``batch`` axes to the shape of ``values``."""
        shape = tuple(size if axis in _RUN_AXES else 1 for axis, size in self.sizes.items())
        return jnp.broadcast_to(array.astype(self.values.dtype).reshape(shape), self.shape)

    def _prompts(self, what: str) -> int:
        if self.reduced:
            raise InputError(
                f'{what} needs the metric of each prompt, but prompts were averaged: run the sweep with reduce="none".'
            )
        return self.sizes["batch"]

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        key = jax.tree_util.GetAttrKey
        labels = tuple(sorted(self.labels.items()))
        rows = None if self.rows is None else tables.Same(self.rows)
        leaves = tuple((key(name), getattr(self, name)) for name in _LEAVES)
        return leaves, (self.axis_names, self.metric_names, self.activation_name, labels, rows, self.convention)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], leaves: Sequence[Any]) -> "PatchingResult":
        axis_names, metric_names, activation_name, labels, rows, convention = static
        result = object.__new__(cls)  # leaves may be anything while jax transforms, so nothing is checked
        fields = {
            **dict(zip(_LEAVES, leaves, strict=True)),
            "axis_names": axis_names, "metric_names": metric_names, "activation_name": activation_name,
            "labels": dict(labels), "rows": None if rows is None else rows.value, "report": None,
            "convention": convention, "completeness": None, "verified": None,
        }  # fmt: skip
        for name, value in fields.items():
            object.__setattr__(result, name, value)
        return result
