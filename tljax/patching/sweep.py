"""Sweeps: one kind of activation patched at every site of a grid, each measured as if it ran alone.

A sweep computes only what can change its answer. Layers below a patch, positions before it and prefixes that clean and
corrupted prompts share are taken from the base run. The rest of all patched runs goes through the model together,
packed without padding, and only what the metric reads is unembedded.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Unpack

import jax
import numpy as np

from tljax.attribution.integrated import extra_points
from tljax.attribution.options import EstimateOptions, Method, read_estimate
from tljax.checks import is_traced, typed
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError, nearest
from tljax.hooks.names import ActName
from tljax.hooks.point import POSITION_AXES
from tljax.hooks.points import AXES, HookPointSpec, point_table
from tljax.hooks.selectors import AXIS_ALIASES
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.assembly import as_result
from tljax.patching.engine.base_run import BaseRun, run_base
from tljax.patching.engine.run import Metrics, Reduce, measure_sites
from tljax.patching.engine.sites import Sites, grid
from tljax.patching.estimated import estimated_sweeps
from tljax.patching.naming import named_points
from tljax.patching.result import PatchingResult
from tljax.patching.sources import read_source
from tljax.text import positions
from tljax.text.inputs import prepare
from tljax.text.warned import level_of_caller

SITE_AXES = tuple(axis for axis in AXES if axis not in ("batch", "d_vocab"))


class NoEffectWarning(UserWarning):
    """Warning that no site of a sweep changes anything."""


@functools.partial(typed, receiver=read_estimate)
def sweep(
    model: HookedTransformer,
    corrupted: Any,
    source: Any,
    metric: Metrics,
    activation_name: ActName,
    axes: Sequence[str] = ("pos",),
    *,
    layers: Sequence[int] | int | None = None,
    at: Mapping[str, Any] | None = None,
    reduce: Reduce = "mean",
    max_batch: int | Literal["auto"] = "auto",
    progress: bool | None = None,
    method: Method = "exact",
    **options: Unpack[EstimateOptions],
) -> PatchingResult:
    """Patches each site of an activation into a base run, one at a time, and measures the metric.

    With another ``method`` the effects are estimated from gradients, at the same sites: ``values`` is then the
    baseline plus the estimate, ``effect()`` the estimate, and ``convention`` says what it means.

    Args:
        model: the model. If it carries hooks, which may do anything, sites are run one by one.
        corrupted: the base run that is patched: text, a list of texts, or token ids ``[batch, pos]``. (For noising,
            pass the clean prompt here and the corrupted one as ``source``.)
        source: the values written. A clean :class:`~tljax.ActivationCache` (or a dict of activations by full name); the
            clean prompt itself; an array, for every layer or with a leading axis of layers
            (:func:`~tljax.patching.sources.array_at`), or a mapping from layer numbers to arrays; or a hook, which is
            given the base run's activation: ``tljax.Zero()`` ablates, ``tljax.Add(vector)`` steers,
            ``lambda activation, hook: ...`` does anything.
        metric: takes logits ``[batch, pos, d_vocab]`` and returns one number, or one for each prompt ``[batch]``: a
            Python function or a metric such as :class:`~tljax.patching.LogitDiff`; or several by name, in a mapping.
        activation_name: short name, such as ``"resid_pre"``, ``"z"``, ``"mlp_out"``, ``"pattern"``, ``"mlp_post"`` or
            ``"embed"``, or a point's name within its block, ``"ln1.hook_scale"``; a name with a layer in it, such as
            ``"blocks.3.attn.hook_z"``, ``"z3"`` or ``("z", 3)``, means that layer alone.
        axes: the axes, besides the layer, that have a site for each entry: by default ``("pos",)``; ``("head",)``,
            ``("pos", "head")``, ``("head", "query_pos", "key_pos")`` …; ``()`` patches all of a layer at once. Each
            site covers the whole of the other axes.
        layers: the layers to patch, or one; all by default.
        at: the only entries to patch, by axis: ``at={"pos": [-1]}``. For an axis of ``axes`` these are the sites; for
            another axis, the part that each site covers. Positions count within each prompt's text, without padding.
        reduce: ``"mean"`` averages a metric over prompts, ``"none"`` keeps it for each prompt.
        max_batch: most runs computed at once; ``"auto"`` chooses by the free memory.
        progress: whether to show a progress bar; by default one appears when a sweep takes more than a few seconds.
        method: ``"exact"``; ``"attribution"``, the first-order estimate from one backward pass, ``(source - base) ·
            gradient`` at the base run; or ``"ig"``, with the gradient averaged on the way from base to source.
        **options: of the estimate: ``rule``, ``gradient_at``, ``steps``, ``grid``, ``along``, ``verify``; see
            :func:`~tljax.attribution.options.read_estimate`. ``verify=20`` patches the 20 sites with the largest
            estimates exactly.

    Returns:
        The metric at each site, ``["layer", *axes]``, with its baseline.

    Raises:
        InputError: an axis that the activation lacks, prompts of different lengths, a metric that reads a position or
            token that does not exist; of an estimate, a metric or a point without a gradient.
        CacheError: a cache that another model made; ``cache.as_if_from(model)`` is accepted.
        UnknownHookError: an activation that the model does not have.

    Warns:
        NoEffectWarning: no patch changes anything, as when both prompts are the same.
    """
    how = read_estimate(method, **options)
    extra = () if how is None or how.method != "ig" else extra_points(model, how.along)
    setup = prepare_sweep(model, corrupted, activation_name, layers, extra)
    read = read_source(model, setup.base, source, (*setup.names, *extra))
    swept = site_grid(model, setup, lambda spec: read.values(spec)[None], axes, at, tolerance=read.tolerance)
    if how is None:
        measured = measure_sites(
            model, setup.base, swept.sites, metric, read.final, max_batch=max_batch, progress=progress
        )
        result = as_result(measured, swept.sizes, swept.names, reduce, setup.name, swept.labels)
    else:
        kinds = {setup.name: swept}
        (result,) = estimated_sweeps(model, setup.base, kinds, read, metric, how, reduce, max_batch, progress)
    if result.report.skipped == len(swept.sites):
        warnings.warn(
            f"No patch of {activation_name!r} changes anything that the metric reads: the values patched in are those "
            "of the base run there. Are both prompts the same?",
            NoEffectWarning,
            stacklevel=level_of_caller(),
        )
    return result


@dataclasses.dataclass(frozen=True)
class Setup:
    """A sweep's base run, and the points it patches.

    Attributes:
        base: the unpatched run.
        tokens: token ids ``[batch, pos]``.
        name: the activation name that the user gave; the first of ``names`` if it was a tuple.
        layers: the patched layers; ``(0,)`` for a point of the embedding.
        names: full name of the point at each of ``layers``.
        spec: the hook table's row for the first of ``names``.
    """

    base: BaseRun
    tokens: np.ndarray
    name: str
    layers: tuple[int, ...]
    names: tuple[str, ...]
    spec: HookPointSpec

    def spec_at(self, layer: int) -> HookPointSpec:
        """Returns the hook table's row for the point at a layer."""
        return dataclasses.replace(self.spec, name=self.names[self.layers.index(layer)])


def prepare_sweep(
    model: HookedTransformer,
    corrupted: Any,
    activation_name: ActName,
    layers: Sequence[int] | int | None = None,
    extra: Sequence[str] = (),
) -> Setup:
    """Resolves the points to patch and runs the base run, which also keeps the activations named in ``extra``."""
    if isinstance(corrupted, Mapping):
        raise InputError(
            "The prompts to patch come first and the cache that values are taken from second: "
            "sweep(model, corrupted_tokens, clean_cache, metric, ...)."
        )
    cfg = model.cfg
    names, numbers = named_points(cfg, activation_name, layers)
    prepared = prepare(cfg, model._tokenizer, corrupted)
    if is_traced(prepared.value):
        raise InputError("A sweep plans on concrete tokens: call it outside jax.jit, jax.grad and jax.vmap.")
    spec = point_table(cfg)[names[0]]
    _check_alike(cfg, names)
    name, tokens = activation_name if isinstance(activation_name, str) else names[0], np.asarray(prepared.value)
    return Setup(run_base(model, prepared, (*names, *extra)), tokens, name, numbers, names, spec)


def _check_alike(cfg: HookedTransformerConfig, names: Sequence[str]) -> None:
    """Raises InputError if the point has other shapes in some layers, as those of dictionaries may."""
    first, *others = (point_table(cfg)[name] for name in names)
    if unlike := [row for row in others if row.shape() != first.shape() or row.axes != first.axes]:
        raise InputError(
            f"{first.name} has axes {first.axes} of sizes {first.shape()[1:]} and {unlike[0].name} "
            f"{unlike[0].axes} of {unlike[0].shape()[1:]}: sweep layers that are alike, layers=[...], one call each."
        )


@dataclasses.dataclass(frozen=True)
class SiteGrid:
    """A grid of sites, with the axes and labels that its result has.

    Attributes:
        sites: the sites, the last axis varying fastest.
        names: names of the grid's axes.
        sizes: number of entries along each axis.
        labels: for some axes, a text for each entry.
    """

    sites: Sites
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    labels: dict[str, list[str]]


def site_grid(
    model: HookedTransformer,
    setup: Setup,
    values: Callable[[HookPointSpec], jax.Array],
    axes: Sequence[str],
    at: Mapping[str, Any] | None,
    *,
    tolerance: float = 0.0,
    variants: Mapping[str, Sequence[str]] | None = None,
) -> SiteGrid:
    """Makes a site for each combination of a layer, a variant of the values and an entry of each axis.

    Args:
        model, setup: the model and the prepared sweep.
        values: function from a point to the values written there, ``[variant, batch, pos, ...]``.
        axes, at: as in :func:`sweep`.
        tolerance: as in :class:`~tljax.patching.engine.sites.Sites`.
        variants: name and labels of the axis of variants, if there are several.
    """
    chosen, allowed = choose_entries(setup.spec, setup.base, axes, at or {})
    by_prompt = {axis: entries for axis, entries in chosen.items() if entries.ndim == 2}
    chosen = {axis: np.arange(len(entries)) if axis in by_prompt else entries for axis, entries in chosen.items()}
    numbered = {name: np.arange(len(texts)) for name, texts in (variants or {}).items()}
    entries = {"layer": np.asarray(setup.layers), **numbered, **chosen}
    coordinates = grid(entries)
    layer = coordinates.pop("layer")
    variant = np.zeros(len(layer), int)
    for name in numbered:
        variant = coordinates.pop(name)
    tables = {number: values(setup.spec_at(number)) for number in setup.layers}
    labels = site_labels(model, setup, entries | {axis: numbers[:, 0] for axis, numbers in by_prompt.items()})
    coordinates |= {axis: numbers[coordinates[axis]] for axis, numbers in by_prompt.items()}
    sites = Sites(setup.spec, layer, tables, variant, coordinates, allowed, tolerance)
    names = tuple(axis for axis in entries if axis != "layer" or not sites.is_embedding)
    labels |= {name: list(texts) for name, texts in (variants or {}).items()}
    return SiteGrid(sites, names, tuple(len(entries[axis]) for axis in names), labels)


def choose_entries(
    spec: HookPointSpec, base: BaseRun, axes: Sequence[str], at: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the entries of each axis in ``axes``, and a mask of entries for each other axis that is patched in part.

    If prompts are padded, entries of a position axis are ``[entry, batch]`` and masks of one ``[batch, position]``.
    """
    sizes = dict(zip(spec.axes, spec.shape(base.batch, base.length), strict=True))

    def in_text(axis: str) -> bool:
        return axis in POSITION_AXES and base.text is not None

    def named(axis: str) -> str:
        full = AXIS_ALIASES.get(axis, axis)
        full = "query_pos" if full == "pos" and "query_pos" in sizes else full
        if full not in sizes or full not in SITE_AXES:
            known = [known for known in spec.axes if known in SITE_AXES]
            raise InputError(
                f"{spec.name} has axes {spec.axes}; a sweep cannot go along {axis!r}.{nearest(axis, known)} Give "
                f"axes= out of {tuple(known)}, or axes=() to patch all of it at once."
            )
        return full

    entries = {
        named(axis): _entries_in_text(axis, index, base, spec.name)
        if in_text(named(axis))
        else _entries(axis, index, sizes[named(axis)], spec.name)
        for axis, index in at.items()
    }
    full = [named(axis) for axis in ((axes,) if isinstance(axes, str) else axes)]
    if len(set(full)) < len(full):
        raise InputError(f"axes={tuple(axes)} names an axis twice.")
    chosen = {
        axis: entries[axis]
        if axis in entries
        else places_in_text(base, np.arange(base.n_positions))
        if in_text(axis)
        else np.arange(sizes[axis])
        for axis in full
    }
    allowed = {}
    for axis, wanted in entries.items():
        if axis not in chosen:
            every = np.arange(base.padded_length if axis in POSITION_AXES else sizes[axis])
            by_prompt = wanted.ndim == 2
            allowed[axis] = (wanted[..., None] == every).any(axis=0) if by_prompt else np.isin(every, wanted)
    return chosen, allowed


def places_in_text(base: BaseRun, numbers: np.ndarray) -> np.ndarray:
    """Converts positions in each prompt's text to padded ones, ``[entry, batch]``; -1 where a prompt has none."""
    assert base.text is not None
    places, there = positions.find(base.text, numbers)
    return np.where(there, places, -1).T


def _entries_in_text(axis: str, index: Any, base: BaseRun, name: str) -> np.ndarray:
    """Returns what :func:`_entries` does, for positions of padded prompts, ``[entry, batch]``.

    A slice may reach past the end of a shorter prompt, which is not patched there (its entries are -1).
    """
    assert base.text is not None
    if isinstance(index, slice):
        start, count, step = positions.spans(index, positions.lengths(base.text))
        if not count.any():
            raise InputError(f"at={{{axis!r}: {index!r}}} picks nothing: no prompt has such positions.")
        entry = np.arange(count.max())
        return np.where(entry < count[:, None], places_of(base, start[:, None] + entry * step), -1).T
    numbers = _entries(axis, index, base.n_positions, name)
    if np.asarray(index).dtype != bool:
        numbers = np.atleast_1d(np.asarray(index))
    if (wrong := positions.lacking(base.text, numbers)) is not None:
        raise InputError(f"at={{{axis!r}: {index!r}}}: {positions.no_such_position(*wrong)}")
    return places_in_text(base, numbers)


def places_of(base: BaseRun, numbers: np.ndarray) -> np.ndarray:
    """Converts positions ``[batch, entry]`` in each prompt's text to positions of the padded prompts."""
    assert base.text is not None
    return positions.find(base.text, numbers)[0]


def _entries(axis: str, index: Any, size: int, name: str) -> np.ndarray:
    chosen: Any = index
    if not isinstance(index, slice):
        kind = None if isinstance(index, tuple | str) or index is None else np.asarray(index)
        kind = kind.astype(int) if kind is not None and not kind.size else kind
        if kind is None or kind.ndim > 1 or kind.dtype.kind not in "iub" or (kind.dtype == bool and not kind.ndim):
            raise InputError(
                f"at={{{axis!r}: {index!r}}}: give a number, a list of numbers, a slice, or a boolean mask of the "
                f"{size} entries."
            )
        if positions.looks_like_mask(kind, size) and kind.dtype != bool:
            raise InputError(
                f"at={{{axis!r}: {index!r}}} could be a mask of {size} entries, or the numbers 0 and 1: give booleans "
                "for a mask, and each number once otherwise."
            )
        chosen = kind
    try:
        entries = np.atleast_1d(np.arange(size)[chosen])
    except IndexError as error:
        raise InputError(f"at={{{axis!r}: {index!r}}} is out of range: {name} has {size} entries there.") from error
    if entries.size == 0:
        raise InputError(f"at={{{axis!r}: {index!r}}} picks nothing: {name} has {size} entries there.")
    return entries


def site_labels(model: HookedTransformer, setup: Setup, entries: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
    """Returns labels for the entries of some axes: layers, and tokens if there is one prompt and a tokenizer."""
    labels = {"layer": [f"L{number}" for number in entries["layer"]]}
    if model.tokenizer is not None and len(setup.tokens) == 1:
        tokens = model.to_str_tokens(setup.tokens[0])
        for axis in POSITION_AXES:
            if axis in entries:
                labels[axis] = [str(tokens[position]) for position in entries[axis]]
    return labels
