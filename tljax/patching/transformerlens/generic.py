"""``generic_activation_patch``: one patched run for each row of an index, by any setter, on the sweep engine."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import typed
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.hooks.point import POSITION_AXES
from tljax.hooks.points import HookPointSpec
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.assembly import as_result
from tljax.patching.engine.report import join_reports
from tljax.patching.engine.run import Measured, Metrics, measure_sites
from tljax.patching.engine.sites import Sites
from tljax.patching.sources import Source, cached, read_source, without_padding
from tljax.patching.sweep import Setup, prepare_sweep, site_labels
from tljax.patching.transformerlens.setters import PatchSetter, axes_of, custom_sites
from tljax.patching.transformerlens.site_index import (
    SiteIndex,
    data_frame,
    layers_of,
    listed_index,
    site_entries,
    site_layers,
    spanned_index,
)

Reduce = Literal["scalar", "mean", "none"]
MaxBatch = int | Literal["auto"]


def make_df_from_ranges(column_max_ranges: Sequence[int], column_names: Sequence[str]) -> Any:
    """Returns a DataFrame of all combinations of indices below some maxima, the last column varying fastest.

    Args:
        column_max_ranges: one past the last index of each column.
        column_names: names of the columns.

    Returns:
        A pandas DataFrame, which can be ``index_df`` of :func:`generic_activation_patch`.

    Raises:
        InputError: the numbers of ranges and names differ.
        ImportError: pandas is not installed.

    Example:
        >>> make_df_from_ranges((2, 2), ("layer", "pos")).to_numpy().tolist()
        [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    if len(column_max_ranges) != len(column_names):
        raise InputError(f"{len(column_max_ranges)} ranges for {len(column_names)} columns: give one for each.")
    return data_frame(list(itertools.product(*map(range, column_max_ranges))), column_names)


@typed
def generic_activation_patch(
    model: HookedTransformer,
    corrupted_tokens: Any,
    clean_cache: Any,
    patching_metric: Metrics,
    patch_setter: PatchSetter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: Any = None,
    return_index_df: bool = False,
    *,
    reduce: Reduce = "scalar",
    baseline: bool = False,
    max_batch: MaxBatch = "auto",
    progress: bool | None = None,
) -> Any:
    """Patches an activation in one run for each row of an index, and measures the metric.

    Args:
        model: the model.
        corrupted_tokens: the run that is patched: token ids ``[batch, pos]`` or text.
        clean_cache: the cache of the run that values come from (or anything that :func:`~tljax.patching.sweep` takes
            as its source).
        patching_metric: a function of logits ``[batch, pos, d_vocab]``, or several by name.
        patch_setter: one of tljax's setters, or a function ``(corrupted_activation, index, clean_activation)`` that
            returns the patched activation ``[batch, pos, ...]``; ``index`` is a row of the index, as a list.
        activation_name: short name, such as ``"resid_pre"``, ``"z"`` or ``"pattern"``.
        index_axis_names: axes whose combinations are the index, ``"layer"`` among them: ``pos``, ``head``
            (``head_index``), ``query_pos`` (``dest_pos``), ``key_pos`` (``src_pos``), ``neuron``, ``d_model``,
            ``d_head``.
        index_df: the index itself, instead of ``index_axis_names``: a DataFrame with one row for each run and a
            ``layer`` column.
        return_index_df: whether to return the index too, ``(result, index_df)``.
        reduce: ``"scalar"``: the metric returns one number. ``"mean"`` and ``"none"``: it returns one for each prompt
            ``[batch]``, which are averaged or kept.
        baseline: whether to return a :class:`~tljax.patching.PatchingResult`, which holds the unpatched run's metric.
        max_batch, progress: as in :func:`~tljax.patching.sweep`.

    Returns:
        An array with one axis for each of ``index_axis_names``, or flat ``[row]`` with ``index_df``. With
        ``reduce="none"``, ``baseline=True`` or metrics by name, a :class:`~tljax.patching.PatchingResult`, whose axes
        have tljax's names.

    Raises:
        InputError: the index does not fit the setter or the activation, a setter returns no activation, a metric does
            not fit ``reduce``, or what :func:`~tljax.patching.sweep` refuses.
    """
    if reduce not in ("scalar", "mean", "none"):
        raise InputError(f'reduce={reduce!r} is not one of "scalar", "mean" and "none".')
    plain = is_plain(patching_metric, reduce, baseline)
    if return_index_df and not plain:
        raise InputError("return_index_df goes with results that are arrays; a PatchingResult has its .index_df.")
    planned = _plan(model, corrupted_tokens, clean_cache, activation_name, index_axis_names, index_df)
    index, batch = planned.index, planned.setup.base.batch
    _check_metrics(model.cfg, planned.setup, patching_metric, reduce)
    options: dict[str, Any] = {"max_batch": max_batch, "progress": progress}
    measured = _measure(model, planned, patch_setter, clean_cache, patching_metric, options)
    _check_shapes({name: value.shape for name, value in measured.baseline.items()}, reduce, batch)
    labels = site_labels(model, planned.setup, _label_entries(planned))
    kept = "none" if reduce == "none" else "mean"
    result = as_result(measured, index.sizes, index.axes, kept, activation_name, labels, index.listed)
    if not plain:
        return result
    return (result.values, index.table) if return_index_df else result.values


def is_plain(metric: Any, reduce: str, baseline: bool) -> bool:
    """Whether the result is an array rather than a ``PatchingResult``."""
    return not (reduce == "none" or baseline or isinstance(metric, Mapping))


@dataclasses.dataclass(frozen=True)
class _Planned:
    """A sweep's sites: the base run, the index, each site's layer, and where clean values come from."""

    setup: Setup
    index: SiteIndex
    layer: np.ndarray
    read: Source


def _plan(
    model: HookedTransformer,
    corrupted_tokens: Any,
    clean_cache: Any,
    activation_name: str,
    index_axis_names: Sequence[str] | None,
    index_df: Any,
) -> _Planned:
    """Reads the index and runs the base run."""
    n_layers = model.cfg.n_layers
    if (index_axis_names is None) == (index_df is None):
        raise InputError("Give either index_axis_names, such as ('layer', 'pos'), or index_df, a table of sites.")
    if index_axis_names is not None:
        setup = prepare_sweep(model, corrupted_tokens, activation_name)
        index = spanned_index(index_axis_names, setup)
    else:
        index = listed_index(index_df)
        layers = layers_of(index, n_layers)
        numbers = None if layers is None else tuple(np.unique(layers).tolist())
        setup = prepare_sweep(model, corrupted_tokens, activation_name, numbers)
    layer = site_layers(setup, activation_name, index, model.cfg)
    return _Planned(setup, index, layer, read_source(model, setup.base, clean_cache, setup.names))


def _label_entries(planned: _Planned) -> dict[str, np.ndarray]:
    sizes = dict(zip(planned.index.axes, planned.index.sizes, strict=True))
    positions = {axis: np.arange(size) for axis, size in sizes.items() if axis in POSITION_AXES}
    return {"layer": np.unique(planned.layer), **positions}


def _measure(
    model: HookedTransformer,
    planned: _Planned,
    setter: PatchSetter,
    clean_cache: Any,
    metric: Metrics,
    options: Mapping[str, Any],
) -> Measured:
    """Measures the sites, each patched with the values that the setter gives."""
    setup, index, layer, read = planned.setup, planned.index, planned.layer, planned.read
    axes = axes_of(setter, setup.spec)
    if axes is not None:
        name = getattr(setter, "__name__", "The setter")
        chosen = site_entries(index, axes, setup, name)
        values = {number: read.values(setup.spec_at(number))[None] for number in setup.layers}
        sites = Sites(setup.spec, layer, values, np.zeros(len(layer), int), chosen, {}, read.tolerance)
        return measure_sites(model, setup.base, sites, metric, read.final, **options)
    specs = {number: setup.spec_at(number) for number in setup.layers}
    clean = _clean_activations(setup, clean_cache, read)
    groups = custom_sites(setter, setup.base, specs, layer, index.rows, clean, read.tolerance)
    done = [(rows, measure_sites(model, setup.base, sites, metric, read.final, **options)) for rows, sites in groups]
    order = np.argsort(np.concatenate([rows for rows, _ in done]))
    together = {name: np.concatenate([part.values[name] for _, part in done])[order] for name in done[0][1].values}
    return dataclasses.replace(done[0][1], values=together, report=join_reports([part.report for _, part in done]))


def _clean_activations(setup: Setup, clean_cache: Any, read: Source) -> Callable[[HookPointSpec], jax.Array]:
    """Returns the function that gives a user's setter its clean activations; those of a cache may be of any length."""

    def clean(spec: HookPointSpec) -> jax.Array:
        if isinstance(clean_cache, Mapping) and spec.name in clean_cache:
            return cached(clean_cache, spec.name)
        return read.values(spec)[without_padding(setup.base, spec)]

    return clean


def _check_metrics(cfg: HookedTransformerConfig, setup: Setup, metric: Any, reduce: str) -> None:
    """Refuses metrics that do not fit ``reduce`` before the sweep, where tracing shows what they return."""
    batch = setup.base.batch
    logits = jax.ShapeDtypeStruct((batch, setup.base.length, cfg.d_vocab_out), cfg.jnp_dtype)
    shapes = {}
    for name, one in (metric if isinstance(metric, Mapping) else {"metric": metric}).items():
        try:
            shapes[name] = tuple(jax.eval_shape(lambda logits, one=one: jnp.asarray(one(logits)), logits).shape)
        except Exception:
            continue  # the sweep says what is wrong with it, if anything is
    _check_shapes({name: shape for name, shape in shapes.items() if shape in ((), (batch,))}, reduce, batch)


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], reduce: str, batch: int) -> None:
    for name, shape in shapes.items():
        if reduce == "scalar" and shape not in ((), (1,)):
            raise InputError(
                f'{name!r} returns a number for each of the {batch} prompts, and reduce="scalar" takes one number: '
                'average them in the metric, or pass reduce="mean" (or "none", to keep them apart).'
            )
        if reduce != "scalar" and not shape:
            raise InputError(
                f"reduce={reduce!r} takes a metric that returns a number for each prompt [{batch}], and {name!r} "
                "returns one for all: index all prompts, logits[:, -1, token], instead of logits[0, -1, token]."
            )
