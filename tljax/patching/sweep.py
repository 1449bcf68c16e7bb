"""Activation-patching sweeps: one site at a time, all the sites of a layer in one batch.

Patching a layer leaves the layers below it as they were, so each layer's sites start from the corrupted run's residual
stream there; the sites are rows of one batch, told apart by a mask, so a sweep of any size uses a handful of programs.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.cache.activation_cache import ActivationCache
from tljax.errors import InputError
from tljax.forward import run_forward
from tljax.hooked_transformer import HookedTransformer
from tljax.hooks.dictionary import HookDictionary, HookEntry
from tljax.hooks.interventions import Replace
from tljax.hooks.names import resolve
from tljax.hooks.points import HookPointSpec, point_table
from tljax.inputs import ModelInput, prepare
from tljax.modules.attention import AttentionContext
from tljax.patching.metrics import LogitDiff

SITE_AXES = ("pos", "head", "neuron", "query_pos", "key_pos")


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """The metric after patching each site.

    Attributes:
        values: ``[layer, *axes]``, averaged over prompts.
        axes: axis names of ``values``.
        baseline: the metric of the corrupted run, unpatched.
        activation_name: what was patched.
    """

    values: jax.Array
    axes: tuple[str, ...]
    baseline: float
    activation_name: str

    @property
    def effect(self) -> jax.Array:
        """``values - baseline``: how far each patch moves the metric."""
        return self.values - self.baseline

    def normalized(self, clean: float) -> jax.Array:
        """Effects on the scale where 0 is the corrupted run and 1 the clean run.

        Raises:
            InputError: both runs have the same metric, so there is no scale.
        """
        if clean == self.baseline:
            raise InputError(
                f"The clean and the corrupted run have the same metric ({clean:.4g}): nothing to normalise by."
            )
        return self.effect / (clean - self.baseline)

    def top(self, count: int = 5) -> list[tuple[tuple[int, ...], float]]:
        """The sites whose patch raises the metric most: ``((layer, pos), effect)``, largest first."""
        flat = np.asarray(self.effect).ravel()
        order = np.argsort(-flat)[:count]
        return [(tuple(int(i) for i in np.unravel_index(n, self.values.shape)), float(flat[n])) for n in order]


def sweep(
    model: HookedTransformer,
    corrupted_tokens: Any,
    clean_cache: ActivationCache,
    metric: Callable[[jax.Array], jax.Array],
    activation_name: str,
    axes: Sequence[str] = ("pos",),
    max_batch: int = 256,
) -> SweepResult:
    """Patches each site of an activation from a clean run into a corrupted run, and measures.

    Args:
        model: the model; hooks it carries are not applied.
        corrupted_tokens: ``[batch, pos]`` or text, the run that is patched.
        clean_cache: activations of the clean run, same shape of input, holding ``activation_name`` of every layer.
        metric: takes logits ``[1, pos, d_vocab]`` and returns a number; or a :class:`LogitDiff`, which reads one
            position, so that only this is unembedded.
        activation_name: short name, such as ``"resid_pre"``, ``"z"``, ``"mlp_out"`` or ``"pattern"``.
        axes: the axes, besides the layer, along which sites are told apart: ``("pos",)``, ``("head",)``,
            ``("pos", "head")``, ``("head", "query_pos", "key_pos")`` …; along the others a site is the whole axis.
        max_batch: rows (site × prompt) that run at once.

    Returns:
        The metric for each layer and site, averaged over prompts.

    Raises:
        InputError: an axis the activation lacks, or clean and corrupted runs of different shapes.
    """
    prepared = prepare(model.cfg, model._tokenizer, corrupted_tokens)
    batch, pos = prepared.batch_and_pos
    table = point_table(model.cfg)
    spec = table[resolve((activation_name, 0), table, model.cfg.n_layers)]
    if wrong := [axis for axis in axes if axis not in spec.axes or axis not in SITE_AXES]:
        raise InputError(f"{activation_name!r} has axes {spec.axes}; a sweep cannot go along {wrong}.")
    shape = spec.shape(batch, pos)
    masks, sizes = _site_masks(spec, shape, axes)
    logits, residuals = _base_run(model, prepared)
    rows = []
    for layer in range(model.cfg.n_layers):
        name = resolve((activation_name, layer), table, model.cfg.n_layers)
        clean = _clean_value(clean_cache, name, shape)
        residual = residuals[f"blocks.{layer}.hook_resid_pre"]
        rows.append(_sweep_layer(model, layer, name, clean, residual, prepared.context, masks, metric, max_batch))
    values = jnp.stack(rows).reshape(model.cfg.n_layers, *sizes)
    baseline = float(_measure(metric, logits).mean())
    return SweepResult(values, ("layer", *axes), baseline, activation_name)


def _base_run(model: HookedTransformer, prepared: ModelInput) -> tuple[jax.Array, dict[str, Any]]:
    names = tuple(f"blocks.{layer}.hook_resid_pre" for layer in range(model.cfg.n_layers))
    return run_forward(model.cfg, model.params, prepared.value, prepared.context, hooks=HookDictionary(), names=names)


def _site_masks(spec: HookPointSpec, shape: tuple[int, ...], axes: Sequence[str]) -> tuple[np.ndarray, tuple[int, ...]]:
    """A boolean mask ``[site, 1, ...]`` for each site, broadcasting to the activation, and the grid's shape."""
    numbers = [spec.axes.index(axis) for axis in axes]
    sizes = tuple(shape[number] for number in numbers)
    masks = np.ones((int(np.prod(sizes)), *(shape[n] if n in numbers else 1 for n in range(len(shape)))), bool)
    for site, index in enumerate(itertools.product(*map(range, sizes))):
        for number, chosen in zip(numbers, index, strict=True):
            on = np.arange(shape[number]) == chosen
            masks[site] &= on.reshape([-1 if n == number else 1 for n in range(len(shape))])
    return masks, sizes


def _clean_value(cache: ActivationCache, name: str, shape: tuple[int, ...]) -> jax.Array:
    value = cache[name] if cache.has_batch_dim else cache[name][None]
    if value.shape != shape:
        raise InputError(
            f"{name} has shape {tuple(value.shape)} in the clean cache, {shape} in the corrupted run. Clean and "
            "corrupted prompts must have equally many tokens: compare model.to_str_tokens(clean) and (corrupted)."
        )
    return value


def _sweep_layer(
    model: HookedTransformer,
    layer: int,
    name: str,
    clean: jax.Array,
    residual: jax.Array,
    context: AttentionContext,
    masks: np.ndarray,
    metric: Callable[[jax.Array], jax.Array],
    max_batch: int,
) -> jax.Array:
    """The metric of each site of one layer ``[site]``."""
    batch = residual.shape[0]
    per_run = max(1, min(len(masks), max_batch // batch))
    padded = np.concatenate([masks, np.repeat(masks[-1:], -len(masks) % per_run, axis=0)])

    def tile(array: Any) -> Any:
        return jnp.tile(jnp.asarray(array), (per_run, *(1,) * (array.ndim - 1)))

    tiled = jax.tree.map(tile, context)
    metric = metric.repeated(per_run) if isinstance(metric, LogitDiff) else metric
    values, stream = tile(clean), tile(residual)
    measured = []
    for start in range(0, len(padded), per_run):
        chunk = np.repeat(padded[start : start + per_run, 0], batch, axis=0)
        hooks = HookDictionary((HookEntry(name, Replace(values, mask=chunk)),))
        measured.append(_run_and_measure(model, stream, tiled, hooks, layer, metric).reshape(per_run, batch))
    return jnp.concatenate(measured)[: len(masks)].mean(axis=1)


def _run_and_measure(
    model: HookedTransformer,
    stream: jax.Array,
    context: AttentionContext,
    hooks: HookDictionary,
    layer: int,
    metric: Any,
) -> jax.Array:
    if not isinstance(metric, LogitDiff):
        logits, _ = run_forward(model.cfg, model.params, stream, context, hooks=hooks, start=layer)
        return _measure(metric, logits)
    last, _ = run_forward(model.cfg, model.params, stream, context, hooks=hooks, start=layer, stop=model.cfg.n_layers)
    row = last[:, metric.pos][:, None]
    logits, _ = run_forward(
        model.cfg, model.params, row, AttentionContext(), hooks=HookDictionary(), start=model.cfg.n_layers
    )
    return metric.at_position(logits[:, 0])


def _measure(metric: Callable[[jax.Array], jax.Array], logits: jax.Array) -> jax.Array:
    """The metric of each row ``[row]``."""
    if isinstance(metric, LogitDiff):
        return metric(logits)
    return jnp.stack([jnp.asarray(metric(row[None])).reshape(()) for row in logits])
