"""Interventions: changes to an activation that are data.

Each is a small frozen pytree that addresses its hook point by axis name: ``Replace(value, pos=3, head=7)``. Positions,
heads, values, scales and masks are array leaves, so changing any of them (or moving the intervention to another layer)
reuses the compiled program; they go through ``jax.jit``, ``jax.grad`` and ``jax.vmap``.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tljax.errors import InterventionError
from tljax.hooks.intervention import Intervention, number_leaf
from tljax.hooks.point import HookPoint
from tljax.hooks.subspaces import RANK_TOLERANCE, unit_rows, well_conditioned
from tljax.numerics import widened
from tljax.text import positions


class _WithValue(Intervention):
    """An intervention with one operand."""

    arrays = ("value",)
    value: Any

    def __init__(self, value: Any, *, mask: Any = None, **at: Any) -> None:
        super().__init__(mask, **at)
        self._set("value", number_leaf(value, type(self).__name__))


class Replace(_WithValue):
    """Puts ``value`` in place of the selected entries (activation patching).

    Args:
        value: an array shaped like the activation, like the selected part of it, or broadcasting to either.
        mask, **at: see :class:`Intervention`.

    >>> import jax.numpy as jnp
    >>> z = jnp.zeros((1, 2, 2, 3))
    >>> point = HookPoint("attn.hook_z", ("batch", "pos", "head", "d_head"))
    >>> Replace(jnp.arange(3.0), pos=-1, head=0)(z, point)[0, :, 0]
    Array([[0., 0., 0.], [0., 1., 2.]], dtype=float32)
    """

    def transform(self, value: jax.Array, hook: HookPoint) -> jax.Array:
        return jnp.broadcast_to(self.aligned(self.value, value, hook), value.shape)


class Add(_WithValue):
    """Adds ``value`` to the selected entries (steering; ``jax.grad`` with respect to it is the gradient there)."""

    def transform(self, value: jax.Array, hook: HookPoint) -> jax.Array:
        return value + self.aligned(self.value, value, hook)


class Scale(Intervention):
    """Multiplies the selected entries by ``factor``."""

    arrays = ("factor",)
    factor: Any

    def __init__(self, factor: Any, *, mask: Any = None, **at: Any) -> None:
        super().__init__(mask, **at)
        self._set("factor", number_leaf(factor, type(self).__name__))

    def transform(self, value: jax.Array, hook: HookPoint) -> jax.Array:
        return value * self.aligned(self.factor, value, hook)


class Zero(Intervention):
    """Sets the selected entries to zero (zero ablation)."""

    def __init__(self, *, mask: Any = None, **at: Any) -> None:
        super().__init__(mask, **at)

    def transform(self, value: jax.Array, hook: HookPoint) -> jax.Array:
        return jnp.zeros_like(value)


class Mean(Intervention):
    """Replaces the selected entries by a mean (mean ablation).

    Args:
        reference: activations to average, shaped like this hook point with any batch size; ``None`` averages the
            activation itself.
        over: axis names to average over. Padding is left out of the mean of the activation itself.
        mask, **at: see :class:`Intervention`.
    """

    arrays = optional = ("reference",)
    settings = ("over",)
    reference: Any
    over: tuple[str, ...]

    def __init__(
        self, reference: Any = None, *, over: str | Sequence[str] = "batch", mask: Any = None, **at: Any
    ) -> None:
        super().__init__(mask, **at)
        self._set("reference", None if reference is None else number_leaf(reference, type(self).__name__))
        self._set("over", (over,) if isinstance(over, str) else tuple(over))
        if not self.over:
            raise InterventionError("Mean(over=()) averages over nothing: name an axis, such as over='batch'.")

    @property
    def counts_positions(self) -> bool:
        return self.reference is None or super().counts_positions

    def transform(self, value: jax.Array, hook: HookPoint) -> jax.Array:
        source = value if self.reference is None else jnp.asarray(self.reference).astype(value.dtype)
        if missing := [axis for axis in self.over if axis not in hook.axes]:
            raise InterventionError(
                f"Mean(over={missing[0]!r}) cannot apply at {hook.name}, which has axes {hook.axes}."
            )
        if source.ndim != value.ndim:
            raise InterventionError(
                f"Mean's reference of shape {tuple(source.shape)} does not fit {hook.name}: it needs the axes "
                f"{hook.axes} (any batch size)."
            )
        if self.reference is None and hook.text is not None and hook.window is None:
            mean = positions.mean_of_text(value, hook.axes, self.over, hook.text)
        else:
            mean = source.mean(axis=tuple(hook.axes.index(axis) for axis in self.over), keepdims=True)
        return jnp.broadcast_to(self.aligned(mean, value, hook), value.shape)


class _Subspace(Intervention):
    """Splits the last axis into a subspace and its complement.

    The lengths of the directions do not matter, and a direction of zeros adds nothing. Nearly parallel directions keep
    their full span: unless traced, they are replaced by an orthonormal basis of it, computed in double precision, where
    single precision would lose one of them.
    """

    arrays = apart = ("directions",)
    directions: Any

    def __init__(self, directions: Any, *, mask: Any = None, **at: Any) -> None:
        super().__init__(mask, **at)
        self._set("directions", well_conditioned(number_leaf(directions, type(self).__name__)))

    def component(self, value: jax.Array, hook: HookPoint) -> jax.Array:
        wide = widened(value.dtype)
        directions = jnp.atleast_2d(jnp.asarray(self.directions)).astype(wide)
        if directions.ndim != 2 or directions.shape[1] != value.shape[-1]:
            raise InterventionError(
                f"{type(self).__name__} needs directions of shape [{value.shape[-1]}] or [k, {value.shape[-1]}] at "
                f"{hook.name}, got {tuple(directions.shape)}."
            )
        with jax.default_matmul_precision("highest"):
            rows = unit_rows(directions)
            tolerance = RANK_TOLERANCE * len(rows) * float(jnp.finfo(wide).eps)
            return (value.astype(wide) @ jnp.linalg.pinv(rows, tolerance) @ rows).astype(value.dtype)


class Project(_Subspace):
    """Keeps only the component in the span of ``directions`` (``[d]`` or ``[k, d]``, need not be orthonormal)."""

    def transform(self, value: jax.Array, hook: HookPoint) -> jax.Array:
        return self.component(value, hook)


class ProjectOut(_Subspace):
    """Removes the component in the span of ``directions`` (directional ablation)."""

    def transform(self, value: jax.Array, hook: HookPoint) -> jax.Array:
        return value - self.component(value, hook)


class Noise(Intervention):
    """Adds Gaussian noise of standard deviation ``scale``; the same ``seed`` gives the same noise.

    A seed is a whole number below ``2**32``. It is kept as its upper and lower 16 bits, two float32 numbers, which hold
    it exactly and let ``jax.grad`` take the intervention as an argument.
    """

    arrays = ("scale", "seed")
    apart = ("seed",)
    scale: Any
    seed: Any

    def __init__(self, scale: Any, seed: Any = 0, *, mask: Any = None, **at: Any) -> None:
        super().__init__(mask, **at)
        self._set("scale", number_leaf(scale, type(self).__name__))
        self._set("seed", _halves(seed))

    def _shown(self, name: str) -> Any:
        known = name == "seed" and isinstance(self.seed, np.ndarray)
        return int(_from_halves(self.seed)) if known else getattr(self, name)

    def transform(self, value: jax.Array, hook: HookPoint) -> jax.Array:
        key = jax.random.key(_from_halves(self.seed))
        noise = hook.part(jax.random.normal(key, hook.whole(value.shape), jnp.float32).astype(value.dtype), value.shape)
        return value + self.aligned(self.scale, value, hook) * noise


def _halves(seed: Any) -> Any:
    """Returns a seed's upper and lower 16 bits as float32, ``[2]``."""
    array = seed if isinstance(seed, jax.Array) else np.asarray(seed)
    whole = array.ndim == 0 and (jnp.issubdtype(array.dtype, jnp.integer))
    if not whole or not (isinstance(array, Tracer) or 0 <= int(array) < 2**32):
        raise InterventionError(f"Noise(seed={seed!r}): a seed is a whole number from 0 to {2**32 - 1}.")
    xp = jnp if isinstance(array, Tracer) else np
    bits = array.astype(xp.uint32) if isinstance(array, Tracer) else np.uint32(array)
    return xp.stack([bits >> np.uint32(16), bits & np.uint32(0xFFFF)]).astype(np.float32)


def _from_halves(seed: Any) -> jax.Array:
    """Returns the seed from its two halves, or from the single float of an older file."""
    whole = jnp.asarray(seed).astype(jnp.uint32)
    return whole if whole.ndim == 0 else (whole[0] << np.uint32(16)) | whole[1]


class Chain(Intervention):
    """Applies several interventions in order, as one."""

    arrays = ("parts",)
    parts: tuple[Intervention, ...]

    def __init__(self, *parts: Intervention) -> None:
        super().__init__()
        if wrong := [part for part in parts if not isinstance(part, Intervention)]:
            raise InterventionError(f"Chain takes interventions, got {type(wrong[0]).__name__}.")
        self._set("parts", tuple(parts))

    @property
    def counts_positions(self) -> bool:
        return super().counts_positions or any(part.counts_positions for part in self.parts)

    def check_axes(self, name: str, axes: tuple[str, ...]) -> None:
        for part in self.parts:
            part.check_axes(name, axes)

    def check_shape(self, hook: HookPoint, shape: Sequence[int]) -> None:
        for part in self.parts:
            part.check_shape(hook, shape)

    def transform(self, value: jax.Array, hook: HookPoint) -> jax.Array:
        for part in self.parts:
            value = part(value, hook)
        return value
