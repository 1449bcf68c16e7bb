"""Ablation sweeps: knock out every site in turn and measure the effect."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from tljax.attribution.options import EstimateOptions, Method, read_estimate
from tljax.cache.activation_cache import ActivationCache
from tljax.checks import typed
from tljax.errors import InputError
from tljax.hooks.interventions import Zero
from tljax.hooks.names import ActName
from tljax.hooks.point import HookPoint
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.engine.edits import expand
from tljax.patching.engine.run import Metrics, Reduce
from tljax.patching.naming import named_points
from tljax.patching.result import PatchingResult
from tljax.patching.sources import FromReference
from tljax.patching.sweep import sweep


@functools.partial(typed, receiver=read_estimate)
def ablation_sweep(
    model: HookedTransformer,
    prompt: Any,
    metric: Metrics,
    activation_name: ActName = "z",
    axes: Sequence[str] = ("head",),
    *,
    kind: Literal["zero", "mean", "resample"] = "zero",
    reference: Any = None,
    over: str | Sequence[str] = ("batch", "pos"),
    seed: int = 0,
    layers: Sequence[int] | int | None = None,
    at: Mapping[str, Any] | None = None,
    reduce: Reduce = "mean",
    max_batch: int | Literal["auto"] = "auto",
    progress: bool | None = None,
    method: Method = "exact",
    **options: Unpack[EstimateOptions],
) -> PatchingResult:
    """Replaces each site's activation by zero, a mean or another prompt's activation, and measures the metric.

    A negative effect means that the metric was higher with the site in place, so the site was needed.

    Args:
        model, metric, activation_name, layers, at, reduce, max_batch, progress, method, **options: as in
            :func:`~tljax.patching.sweep`.
        prompt: the run that is ablated: text, a list of texts, or token ids ``[batch, pos]``.
        axes: as in :func:`~tljax.patching.sweep`; by default ``("head",)``.
        kind: ``"zero"``; ``"mean"``, the average over a reference set; ``"resample"``, the activation at the same
            position of a prompt drawn from the reference set, with a draw for each prompt that is ablated.
        reference: the reference set for ``"mean"`` and ``"resample"``: a cache, or prompts to run. Its prompts must be
            as long as ``prompt``, except for a mean over positions, which takes any length and leaves out padding.
        over: the axes that ``"mean"`` averages over: ``"batch"``, or ``("batch", "pos")``.
        seed: seed of the draw.

    Raises:
        InputError: an unknown ``kind``, or a reference that is missing or does not fit.
        CacheError: a reference cache that another model made.
    """
    if kind not in ("zero", "mean", "resample"):
        raise InputError(f'kind={kind!r} is not one of "zero", "mean" and "resample".')
    if (reference is None) != (kind == "zero"):
        need = "takes no reference=" if kind == "zero" else "needs reference=: a cache, or prompts to run"
        raise InputError(f"{kind.capitalize()} ablation {need}.")
    if kind == "zero":
        source: Any = Zero()
    else:
        cache, token_mask = _run_reference(model, reference, activation_name, layers)
        source = mean_source(cache, over, token_mask) if kind == "mean" else resample_source(cache, seed)
    return sweep(
        model, prompt, source, metric, activation_name, axes,
        layers=layers, at=at, reduce=reduce, max_batch=max_batch, progress=progress, method=method, **options,
    )  # fmt: skip


def _run_reference(
    model: HookedTransformer, reference: Any, activation_name: ActName, layers: Sequence[int] | int | None
) -> tuple[Mapping[str, jax.Array], Any]:
    """Returns the reference set's activations and its token mask (``None`` if nothing is padded or it is unknown)."""
    if isinstance(reference, ActivationCache | Mapping):
        return reference, reference.token_mask if isinstance(reference, ActivationCache) else None
    names = list(named_points(model.cfg, activation_name, layers)[0])
    cache = model.run_with_cache(reference, return_type=None, names_filter=names)[1]
    return cache, cache.token_mask


def mean_source(
    cache: Mapping[str, jax.Array], over: str | Sequence[str] = ("batch", "pos"), attention_mask: Any = None
) -> FromReference:
    """Returns a source for a sweep: the mean of a reference set's activations.

    Args:
        cache: activations by full name, ``[prompt, pos, ...]``.
        over: ``"batch"`` for a mean at each position, ``("batch", "pos")`` for one mean over all positions.
        attention_mask: ``[prompt, pos]``, ``False`` at tokens to leave out, such as padding.

    Raises:
        InputError: ``over`` is neither; or, in the sweep, the cache lacks the activation or its shape does not fit.
    """
    over = (over,) if isinstance(over, str) else tuple(over)
    if set(over) not in ({"batch"}, {"batch", "pos"}):
        raise InputError(f'over={over}: a mean is over "batch", or over ("batch", "pos").')

    def mean(activation: jax.Array, hook: HookPoint) -> jax.Array:
        if "pos" in over and "pos" not in hook.axes:
            raise InputError(f'{hook.name} has axes {hook.axes}: average attention over="batch" alone.')
        reference = _reference(cache, activation, hook, same_length="pos" not in over)
        counted = None
        if attention_mask is not None:
            position = hook.axes.index("pos" if "pos" in hook.axes else "query_pos")
            counted = jnp.asarray(expand(np.asarray(attention_mask, bool), (0, position), reference.ndim))
        axes = tuple(hook.axes.index(axis) for axis in over)
        average = reference.mean(axis=axes, keepdims=True, where=counted)
        return jnp.broadcast_to(average, activation.shape).astype(activation.dtype)

    return FromReference(cache, mean)


@typed
def resample_source(cache: Mapping[str, jax.Array], seed: int = 0) -> FromReference:
    """Returns a source for a sweep: activations of prompts drawn from a reference set, the same prompts at every site.

    Args:
        cache: activations by full name, ``[prompt, pos, ...]``, of prompts as long as the sweep's.
        seed: seed of the draw, which is without replacement if there are enough prompts.
    """

    def resample(activation: jax.Array, hook: HookPoint) -> jax.Array:
        reference = _reference(cache, activation, hook, same_length=True)
        many, wanted = reference.shape[0], activation.shape[0]
        drawn = np.random.default_rng(seed).choice(many, wanted, replace=many < wanted)
        return reference[jnp.asarray(drawn)]

    return FromReference(cache, resample)


def _reference(cache: Mapping[str, jax.Array], activation: jax.Array, hook: HookPoint, same_length: bool) -> jax.Array:
    if hook.name not in cache:
        raise InputError(f"The reference does not hold {hook.name}: record it with names_filter={hook.name!r}.")
    reference = jnp.asarray(cache[hook.name])
    first = 1 if same_length or "pos" not in hook.axes else 2
    if reference.ndim != activation.ndim or reference.shape[first:] != activation.shape[first:]:
        kind = "prompts of the same length" if same_length else "activations of the same model"
        raise InputError(
            f"The reference has shape {tuple(reference.shape)} at {hook.name}, the run {tuple(activation.shape)}: give "
            f"{kind}, with a batch axis."
        )
    return reference
