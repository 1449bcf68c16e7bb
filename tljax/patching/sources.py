"""Where the values that a sweep writes come from: a clean run, an array, or a function of the activation itself."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.cache.activation_cache import ActivationCache
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.hooked_transformer import HookedTransformer
from tljax.hooks.point import POSITION_AXES, HookPoint, call_hook
from tljax.hooks.points import HookPointSpec
from tljax.inputs import prepare
from tljax.patching.base_run import BaseRun, run_base
from tljax.text.batch import Batch

Values = Callable[[HookPointSpec], jax.Array]
"""Gives the values of a hook point, ``[batch, frame, ...]`` along every position axis."""


@dataclasses.dataclass(frozen=True)
class Source:
    """What a sweep writes.

    Attributes:
        values: gives the values of a point.
        tolerance: differences from the base run up to this share of the largest activation are rounding: a cache was
            computed by other programs than the base run, so what the prompts share is equal only nearly.
        final: final residual stream of the run the values come from, ``[batch, pos, d_model]``, where it is known.
    """

    values: Values
    tolerance: float = 0.0
    final: np.ndarray | None = None


def read_source(model: HookedTransformer, base: BaseRun, source: Any, names: tuple[str, ...]) -> Source:
    """Reads a sweep's source.

    Args:
        model: the model.
        base: the unpatched run, holding the activations that are patched.
        source: an :class:`ActivationCache` or mapping from full names to activations; a prompt (text or token ids) to
            run; a hook (an intervention such as ``Zero()``, or ``function(activation, hook)``), applied to the base
            run's activation; or a floating-point array, which stands for the activation or broadcasts to it, and may
            have a leading axis of layers, ``source[i]`` for the i-th of ``layers``.
        names: points that will be asked for.

    Raises:
        InputError: the source lacks a point, does not match the prompts' shape, or is none of these.
    """
    if isinstance(source, ActivationCache | Mapping):
        return Source(_from_cache(base, source), rounding(model.cfg), _final_of(base, source, model.cfg.n_layers))
    if callable(source):
        return Source(_from_hook(base, source))
    if _is_prompt(source):
        return _from_prompt(model, base, source, names)
    if hasattr(source, "dtype") or isinstance(source, float | int):
        return Source(_from_array(base, jnp.asarray(source), names))
    raise InputError(
        f"The values to patch in came as {type(source).__name__}. Pass a clean ActivationCache, the clean prompt (text "
        "or tokens), an array, or a hook such as tljax.Zero()."
    )


def rounding(cfg: HookedTransformerConfig) -> float:
    """How far, as a share of the largest activation, the same activation may differ between two programs."""
    epsilon = float(jnp.finfo(cfg.jnp_dtype).eps)
    return (32 if epsilon < 1e-5 else 2) * epsilon


def cached(source: Any, name: str) -> jax.Array:
    """An activation of a cache or mapping, with its batch axis."""
    value = jnp.asarray(source[name])
    return value if getattr(source, "has_batch_dim", True) else value[None]


def _is_prompt(source: Any) -> bool:
    if isinstance(source, str | Batch) or (isinstance(source, list | tuple) and source and isinstance(source[0], str)):
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
        if value.shape != shape:
            raise InputError(
                f"{spec.name} has shape {tuple(value.shape)} in the clean cache, {shape} in the corrupted run. Clean "
                "and corrupted prompts must have equally many tokens: compare model.to_str_tokens(clean) and "
                "(corrupted)."
            )
        return in_frame(base, spec, value)

    return values


def _final_of(base: BaseRun, source: Any, n_layers: int) -> np.ndarray | None:
    name = f"blocks.{n_layers - 1}.hook_resid_post"
    if name not in source:
        return None
    final = np.asarray(cached(source, name))
    return final if final.shape == (base.batch, base.length, base.final.shape[-1]) else None


def _from_prompt(model: HookedTransformer, base: BaseRun, source: Any, names: tuple[str, ...]) -> Source:
    prepared = prepare(model.cfg, model._tokenizer, source)
    if prepared.batch_and_pos != (base.batch, base.length):
        raise InputError(
            f"The clean input has {prepared.batch_and_pos[0]} prompt(s) of {prepared.batch_and_pos[1]} tokens, the "
            f"corrupted one {base.batch} of {base.length}. They must have equally many: compare "
            "model.to_str_tokens(clean) and (corrupted)."
        )
    clean = run_base(model, prepared, names)
    return Source(lambda spec: clean.activations[spec.name], final=np.asarray(clean.final)[:, : base.length])


def _from_hook(base: BaseRun, source: Callable[..., Any]) -> Values:
    def values(spec: HookPointSpec) -> jax.Array:
        value = out_of_frame(base, spec)
        return in_frame(base, spec, call_hook(source, value, HookPoint(spec.name, spec.axes)))

    return values


def _from_array(base: BaseRun, array: jax.Array, names: tuple[str, ...]) -> Values:
    """Values of an array that is for every point in ``names``, or has an entry for each of them in their order."""
    n_layers = len(names)

    def values(spec: HookPointSpec) -> jax.Array:
        shape = spec.shape(base.batch, base.length)
        value = array
        if array.ndim == len(shape) + 1 or (array.ndim and array.shape[0] == n_layers and not _fits(array, shape)):
            if array.shape[0] != n_layers:
                raise InputError(
                    f"The array has {array.shape[0]} entries along its first axis, for {n_layers} layers patched: "
                    "array[i] is what is written at layers[i]."
                )
            value = array[names.index(spec.name)]
        if not _fits(value, shape):
            raise InputError(
                f"The array of shape {tuple(array.shape)} does not fit {spec.name}, shape {shape} {spec.axes}: it must "
                "broadcast to it, or have a leading axis of layers."
            )
        value = value.reshape((1,) * (len(shape) - value.ndim) + value.shape)
        return in_frame(base, spec, jnp.broadcast_to(value.astype(base.final.dtype), shape))

    return values


def _fits(array: jax.Array, shape: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(array.shape, shape) == shape
    except ValueError:
        return False


def in_frame(base: BaseRun, spec: HookPointSpec, value: jax.Array) -> jax.Array:
    """Values ``[batch, pos, ...]`` laid into the base run's frame, whose padding stays as it is."""
    whole = base.activations[spec.name]
    return whole.at[without_padding(base, spec)].set(value.astype(whole.dtype))


def out_of_frame(base: BaseRun, spec: HookPointSpec) -> jax.Array:
    """The base run's activation without padding, ``[batch, pos, ...]``."""
    return base.activations[spec.name][without_padding(base, spec)]


def without_padding(base: BaseRun, spec: HookPointSpec) -> tuple[slice, ...]:
    """The index that cuts a framed activation to the prompts' length."""
    return tuple(slice(base.length) if axis in POSITION_AXES else slice(None) for axis in spec.axes)
