"""Where the values that a sweep writes come from: a clean run, an array, or a function of the activation itself."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.cache.activation_cache import ActivationCache
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.hooks.point import POSITION_AXES, HookPoint, call_hook
from tljax.hooks.points import EXIT, HookPointSpec, layer_of
from tljax.hooks.splices import value_after
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.engine.base_run import BaseRun, run_base
from tljax.patching.engine.edits import expand
from tljax.processes import as_numpy
from tljax.text import positions
from tljax.text.batch import Batch
from tljax.text.inputs import prepare, texts_in

Values = Callable[[HookPointSpec], jax.Array]
"""Function from a hook point to its values ``[batch, padded_pos, ...]``, padded along every position axis."""


@dataclasses.dataclass(frozen=True)
class Source:
    """The values that a sweep writes.

    Attributes:
        values: function from a point to its values.
        tolerance: differences from the base run up to this share of the largest activation count as rounding. (Other
            programs may have computed a cache, so even a prefix that the prompts share is only nearly equal.)
        final: final residual stream of the run the values come from, ``[batch, pos, d_model]``; ``None`` if unknown.
        run: the run itself, if the source is a prompt.
        everywhere: whether there are values for any point, and not for the patched one alone.
    """

    values: Values
    tolerance: float = 0.0
    final: np.ndarray | None = None
    run: BaseRun | None = None
    everywhere: bool = True


@dataclasses.dataclass(frozen=True)
class FromReference:
    """A hook whose values come from a reference set.

    Attributes:
        reference: the reference set's activations by full name.
        hook: function that returns the values.
    """

    reference: Mapping[str, jax.Array]
    hook: Callable[[jax.Array, HookPoint], jax.Array]

    def __call__(self, activation: jax.Array, hook: HookPoint) -> jax.Array:
        return self.hook(activation, hook)


def read_source(model: HookedTransformer, base: BaseRun, source: Any, names: tuple[str, ...]) -> Source:
    """Converts what was passed as a sweep's source.

    Args:
        model: the model.
        base: the unpatched run, holding the activations that are patched.
        source: an :class:`ActivationCache` or mapping from full names to activations; a prompt (text or token ids) to
            run; a hook (an intervention such as ``Zero()``, or ``function(activation, hook)``), applied to the base
            run's activation; or a floating-point array, which stands for the activation or broadcasts to it, and may
            have a leading axis of layers; or a mapping from layer numbers to such arrays (:func:`array_at`).
        names: full names of the patched points, in the order of their layers.

    Raises:
        InputError: the source lacks a point, does not match the prompts' shape, or is none of these.
        CacheError: a cache that another model made.
    """
    made_of = source.reference if isinstance(source, FromReference) else source
    if isinstance(made_of, ActivationCache):
        made_of.check_model(model, "The cache to patch from")
    if is_by_layer(source):
        return Source(_from_arrays(base, source, names, model.cfg.n_layers), everywhere=False)
    if isinstance(source, ActivationCache | Mapping):
        return Source(_from_cache(base, source), rounding(model.cfg), _final_of(base, source, model.cfg))
    if callable(source):
        return Source(_from_hook(base, source))
    if _is_prompt(source):
        return _from_prompt(model, base, source, names)
    if hasattr(source, "dtype") or isinstance(source, float | int):
        return Source(_from_arrays(base, jnp.asarray(source), names, model.cfg.n_layers), everywhere=False)
    raise InputError(
        f"The values to patch in came as {type(source).__name__}. Pass a clean ActivationCache, the clean prompt (text "
        "or tokens), an array, or a hook such as tljax.Zero()."
    )


def rounding(cfg: HookedTransformerConfig) -> float:
    """Returns how far two programs' results for one activation may differ, as a share of the largest activation."""
    epsilon = float(jnp.finfo(cfg.jnp_dtype).eps)
    return (32 if epsilon < 1e-5 else 2) * epsilon


def cached(source: Any, name: str) -> jax.Array:
    """Returns an activation of a cache or mapping, with a batch axis."""
    value = jnp.asarray(source[name])
    return value if getattr(source, "has_batch_dim", True) else value[None]


def _is_prompt(source: Any) -> bool:
    if isinstance(source, Batch) or texts_in(source) is not None:
        return True
    kind = np.asarray(source).dtype if isinstance(source, list | tuple) else getattr(source, "dtype", None)
    return kind is not None and np.issubdtype(kind, np.integer) and np.ndim(source) > 0


def _from_cache(base: BaseRun, source: Any) -> Values:
    def values(spec: HookPointSpec) -> jax.Array:
        if spec.name not in source:
            raise InputError(
                f"The clean cache does not hold {spec.name}. Record it: model.run_with_cache(clean) keeps all but "
                f"optional points; or name it for every layer, names_filter=[{spec.name!r}, ...]."
            )
        value = cached(source, spec.name)
        shape = spec.shape(base.batch, base.length)
        text = getattr(source, "token_mask", None)
        if value.shape != shape:
            raise InputError(
                f"{spec.name} has shape {tuple(value.shape)} in the clean cache, {shape} in the corrupted run. Clean "
                "and corrupted prompts must have equally many tokens: compare model.to_str_tokens(clean) and "
                "(corrupted)."
            )
        return into_padding(base, spec, lined_up(base, value, spec.axes, text))

    return values


def lined_up(base: BaseRun, value: Any, axes: Sequence[str], text: Any) -> Any:
    """Moves values of prompts padded like ``text`` to where the base run's padding has the same tokens.

    Args:
        base: the base run.
        value: ``[batch, pos, ...]``.
        axes: names of its axes.
        text: ``[batch, pos]`` (``[pos]`` for one prompt), ``False`` at padding; if ``None`` (unknown), the values are
            returned as they are.

    Raises:
        InputError: a prompt has another length than the base run's.
    """
    if text is None or base.text is None:
        return value
    text = np.atleast_2d(np.asarray(text))
    if text.shape != base.text.shape or (text == base.text).all():
        return value
    here, there = base.text.sum(axis=1), text.sum(axis=1)
    if (different := np.flatnonzero(here != there)).size:
        row = int(different[0])
        raise InputError(
            f"Prompt {row} has {int(there[row])} tokens in the clean run, {int(here[row])} in the corrupted one. They "
            "must have equally many: compare model.to_str_tokens(clean) and (corrupted)."
        )
    places, _ = positions.find(text, np.maximum(positions.ranks(base.text), 0))
    for number, axis in enumerate(axes):
        if axis in POSITION_AXES:
            value = jnp.take_along_axis(value, expand(places, (0, number), value.ndim), axis=number)
    return value


def _final_of(base: BaseRun, source: Any, cfg: HookedTransformerConfig) -> np.ndarray | None:
    name = f"blocks.{cfg.n_layers - 1}.{EXIT}"
    name = value_after(name, cfg.splices)
    if name not in source:
        return None
    final = as_numpy(cached(source, name))
    if final.shape != (base.batch, base.length, base.final.shape[-1]):
        return None
    return as_numpy(lined_up(base, final, ("batch", "pos", "d_model"), getattr(source, "token_mask", None)))


def _from_prompt(model: HookedTransformer, base: BaseRun, source: Any, names: tuple[str, ...]) -> Source:
    prepared = prepare(model.cfg, model._tokenizer, source)
    if prepared.batch_and_pos != (base.batch, base.length):
        raise InputError(
            f"The clean input has {prepared.batch_and_pos[0]} prompt(s) of {prepared.batch_and_pos[1]} tokens, the "
            f"corrupted one {base.batch} of {base.length}. They must have equally many: compare "
            "model.to_str_tokens(clean) and (corrupted)."
        )
    clean = run_base(model, prepared, names)
    final = as_numpy(clean.final)[:, : base.length]
    if clean.text is None or base.text is None or (clean.text == base.text).all():
        return Source(lambda spec: clean.activations[spec.name], final=final, run=clean)

    def values(spec: HookPointSpec) -> jax.Array:
        return into_padding(base, spec, lined_up(base, out_of_padding(clean, spec), spec.axes, clean.text))

    return Source(values, final=as_numpy(lined_up(base, final, ("batch", "pos", "d_model"), clean.text)), run=clean)


def _from_hook(base: BaseRun, source: Callable[..., Any]) -> Values:
    def values(spec: HookPointSpec) -> jax.Array:
        value = out_of_padding(base, spec)
        return into_padding(base, spec, call_hook(source, value, HookPoint(spec.name, spec.axes, text=base.text)))

    return values


def is_by_layer(source: Any) -> bool:
    """Whether ``source`` is a mapping from layer numbers."""
    numbers = isinstance(source, Mapping) and not isinstance(source, ActivationCache) and len(source)
    return bool(numbers) and all(isinstance(key, int | np.integer) and not isinstance(key, bool) for key in source)


def array_at(
    source: Any, spec: HookPointSpec, shape: tuple[int, ...], names: Sequence[str], n_layers: int
) -> jax.Array:
    """Picks a point's values from an array or a mapping by layer, by the rule that sweeps and steering share.

    The leading axis of an array counts layers if it has one entry for each patched layer (entry ``i`` for the ``i``-th)
    or for each layer of the model (entry ``i`` for layer ``i``), and the entries broadcast to the activation. If the
    array as a whole broadcasts too, it is ambiguous, unless it has one entry or its entries have fewer axes than one
    token's activation, as in ``[head, d_head]``: then it has no axis of layers.

    Args:
        source: an array, or a mapping from layer numbers to arrays.
        spec: the point.
        shape: shape of its activation, ``[batch, pos, ...]``.
        names: full names of the points to patch, in order.
        n_layers: number of layers of the model.

    Returns:
        The values for the point, not yet checked to fit it.

    Raises:
        InputError: there are no values for the layer, or the array is ambiguous.
    """
    layer = layer_of(spec.name)
    if isinstance(source, Mapping):
        given = {int(number) % n_layers: value for number, value in source.items() if -n_layers <= number < n_layers}
        if len(given) < len(source) or layer not in given:
            raise InputError(
                f"The values are given for layers {list(source)}, and {spec.name} is patched: give one for each layer "
                f"that is, of 0 to {n_layers - 1}."
            )
        value = jnp.asarray(given[layer])
    else:
        array = value = jnp.asarray(source)
        counts = [count for count in (len(names), n_layers) if array.ndim and count == array.shape[0]]
        if layer is not None and counts and _fits(array[0], shape):
            per_token = len(set(spec.axes) - {"batch", *POSITION_AXES})
            if _fits(array, shape) and (array.ndim - 1 < per_token or array.shape[0] == 1):
                return value
            if _fits(array, shape):
                raise InputError(
                    f"The array of shape {tuple(array.shape)} could be one value for each layer, or broadcast to "
                    f"{spec.name}, shape {shape} {spec.axes}. For layers give a mapping, dict(enumerate(array)); "
                    "otherwise every axis of the activation, such as array[None]."
                )
            value = array[names.index(spec.name) if counts[0] == len(names) else layer]
    return value


def _from_arrays(base: BaseRun, source: Any, names: Sequence[str], n_layers: int) -> Values:
    def values(spec: HookPointSpec) -> jax.Array:
        shape = spec.shape(base.batch, base.length)
        value = array_at(source, spec, shape, names, n_layers)
        if not _fits(value, shape):
            raise InputError(
                f"The array of shape {tuple(value.shape)} does not fit {spec.name}, shape {shape} {spec.axes}: it must "
                f"broadcast to it, or have a leading axis of {len(names)} layers, array[i] for layers[i]."
            )
        value = value.reshape((1,) * (len(shape) - value.ndim) + value.shape)
        return into_padding(base, spec, jnp.broadcast_to(value.astype(base.final.dtype), shape))

    return values


def _fits(array: jax.Array, shape: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(array.shape, shape) == shape
    except ValueError:
        return False


def into_padding(base: BaseRun, spec: HookPointSpec, value: jax.Array) -> jax.Array:
    """Writes values ``[batch, pos, ...]`` into the base run's padded activation, whose padding stays as it is."""
    whole = base.activations[spec.name]
    return whole.at[without_padding(base, spec)].set(value.astype(whole.dtype))


def out_of_padding(base: BaseRun, spec: HookPointSpec) -> jax.Array:
    """Returns the base run's activation without padding, ``[batch, pos, ...]``."""
    return base.activations[spec.name][without_padding(base, spec)]


def without_padding(base: BaseRun, spec: HookPointSpec) -> tuple[slice, ...]:
    """Returns the index that cuts a padded activation to the prompts' length."""
    return tuple(slice(base.length) if axis in POSITION_AXES else slice(None) for axis in spec.axes)
