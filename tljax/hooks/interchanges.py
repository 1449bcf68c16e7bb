"""Interchange interventions: a subspace of an activation takes its value from another run.

All of them compute ``h' = h_b + strength * F diag(g) F^T (h_s - h_b)`` at the selected entries, where ``h_b`` is the
run's own activation, ``h_s`` the source's, ``F`` a matrix of orthonormal columns ``[d, k]`` over the activation's last
axis and ``g`` a gate between 0 and 1 for each column. They differ in where ``g`` comes from.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tljax.errors import InterventionError
from tljax.hooks.intervention import Intervention, number_leaf
from tljax.hooks.point import HookPoint
from tljax.numerics import widened

_LEFT_OVER = 1e-4
"""Largest entry of ``F^T F - I`` that counts as rounding; larger for dtypes of 16 bits."""


def orthonormal(basis: Any, owner: str, name: str = "basis") -> Any:
    """Returns a matrix of orthonormal columns as a float leaf.

    Raises:
        InterventionError: it has other than two axes, more columns than rows, or columns that are not orthonormal; the
            columns of traced matrices are not checked.
    """
    leaf = number_leaf(basis, owner)
    if leaf.ndim != 2:
        raise InterventionError(
            f"{owner} needs a {name} [d, k], one column for each dimension of the subspace; got shape "
            f"{tuple(leaf.shape)}." + (" For one direction pass direction[:, None]." if leaf.ndim == 1 else "")
        )
    d, k = leaf.shape
    if k > d:
        hint = f" Did you mean its transpose, [{k}, {d}]?" if k > d else ""
        raise InterventionError(f"A {name} of rank {k} does not fit into {d} dimensions.{hint}")
    if not isinstance(leaf, Tracer):
        columns = np.asarray(leaf, np.float64)
        error = np.abs(columns.T @ columns - np.eye(k)).max(initial=0.0)
        if not error <= (_LEFT_OVER if leaf.dtype.itemsize > 2 else 300 * _LEFT_OVER):
            raise InterventionError(
                f"The {name} of {owner} has columns that are not orthonormal: B^T B differs from the identity by up to "
                f"{error:.2g}. Make them so first: {name} = jnp.linalg.qr({name})[0]."
            )
    return leaf


def boundary_gate(boundary: Any, size: int, temperature: Any = 0.0) -> jax.Array:
    """Computes Boundless DAS's gate: coordinate ``i`` is open where ``boundary * size > i + 1/2``, ``[size]``.

    With a temperature ``T > 0`` it is ``sigmoid((boundary * size - i - 1/2) / T)``. (pyvene multiplies by
    ``sigmoid(i / T)``, which leaves coordinate 0 half open at every temperature; this function does not.)

    Args:
        boundary: share of the coordinates, 0 to 1.
        size: number of coordinates.
        temperature: 0 for a gate of zeros and ones.
    """
    boundary = jnp.asarray(boundary)
    return _opened(boundary * size - (jnp.arange(size, dtype=boundary.dtype) + 0.5), temperature)


def mask_gate(mask_logits: Any, size: int, temperature: Any = 0.0) -> jax.Array:
    """Computes a gate ``sigmoid(mask_logits / T)``, ``[size]``; with a temperature of 0, 1 where a logit is positive.

    Args:
        mask_logits: ``[size]``, or ``[1]`` for one gate that all coordinates share.
        size: number of coordinates.
        temperature: 0 for a gate of zeros and ones.
    """
    return jnp.broadcast_to(_opened(jnp.asarray(mask_logits), temperature), (size,))


def _opened(distance: jax.Array, temperature: Any) -> jax.Array:
    temperature = jnp.asarray(temperature).astype(distance.dtype)
    soft = jax.nn.sigmoid(distance / jnp.where(temperature > 0, temperature, 1))
    return jnp.where(temperature > 0, soft, (distance > 0).astype(distance.dtype))


def as_long_as(wanted: jax.Array, vectors: jax.Array) -> jax.Array:
    """Returns ``vectors`` ``[..., d]`` with the lengths of ``wanted``; zero vectors stay zero, with zero gradients."""

    def squared(each: jax.Array) -> jax.Array:
        return (each * each).sum(axis=-1, keepdims=True)

    length, target = squared(vectors), squared(wanted)
    moves = (length > 0) & (target > 0)
    ratio = jnp.sqrt(jnp.where(moves, target, 1) / jnp.where(moves, length, 1))
    return vectors * jnp.where(moves, ratio, 0)


class _FromSource(Intervention):
    """Base of interchanges: moves the activation towards the source's."""

    strength: Any
    source: Any

    def _keep(self, source: Any, strength: Any, **arrays: Any) -> None:
        owner = type(self).__name__
        fields = {"source": number_leaf(source, owner), "strength": number_leaf(strength, owner), **arrays}
        for name in self.arrays:
            self._set(name, fields[name])

    @property
    def width(self) -> int | None:
        """Size of the last axis that the intervention fits; ``None`` fits any."""
        raise NotImplementedError

    def displacement(self, difference: jax.Array) -> jax.Array:
        """Returns how far to move at strength 1, for source minus base ``[..., d]``."""
        raise NotImplementedError

    def check_shape(self, hook: HookPoint, shape: Any) -> None:
        super().check_shape(hook, shape)
        if self.width is not None and self.width != shape[-1]:
            axis = hook.axes[-1] if hook.axes else "its last axis"
            raise InterventionError(
                f"{type(self).__name__}'s basis has {self.width} rows; {hook.name} has {axis} of size {shape[-1]}. "
                "Was it learned at another point?"
            )

    def transform(self, value: jax.Array, hook: HookPoint) -> jax.Array:
        wide = widened(value.dtype)
        source = self.aligned(self.source, value, hook).astype(wide)
        with jax.default_matmul_precision("highest"):
            moved = self.displacement(source - value.astype(wide))
        return value.astype(wide) + self.aligned(self.strength, value, hook).astype(wide) * moved


class Interchange(_FromSource):
    """Sets the component in a subspace to that of a source: ``h_b + strength * (h_s - h_b) B B^T`` (Geiger et al.
    2023).

    The rest of the activation stays the run's own. Works at any point, on its last axis: ``d_model``, ``d_head`` (with
    ``head=``), neurons.

    Args:
        source: the source's activations, shaped like this run's, like the selected part, or broadcasting to either.
        basis: orthonormal columns ``[d, k]``.
        strength: 1 sets the component, 0 leaves it.
        mask, **at: see :class:`~tljax.Intervention`. A mask ``[batch, pos, 1]`` selects a position for each prompt.

    Raises:
        InterventionError: the columns are not orthonormal.

    >>> import jax.numpy as jnp
    >>> h = jnp.zeros((1, 2, 3))
    >>> point = HookPoint("hook_resid_post", ("batch", "pos", "d_model"))
    >>> Interchange(jnp.asarray([5.0, 6.0, 7.0]), jnp.eye(3)[:, 1:2], pos=-1)(h, point)[0]
    Array([[0., 0., 0.],
           [0., 6., 0.]], dtype=float32)
    """

    arrays = ("source", "basis", "strength")
    apart = ("basis",)
    basis: Any

    def __init__(self, source: Any, basis: Any, strength: Any = 1.0, *, mask: Any = None, **at: Any) -> None:
        super().__init__(mask, **at)
        self._keep(source, strength, basis=orthonormal(basis, type(self).__name__))

    @property
    def width(self) -> int | None:
        return self.basis.shape[0]

    def displacement(self, difference: jax.Array) -> jax.Array:
        basis = jnp.asarray(self.basis).astype(difference.dtype)
        return (difference @ basis) @ basis.T


class _Gated(_FromSource):
    """An interchange of gated coordinates; ``rotation=None`` means the activation's own coordinates."""

    rotation: Any

    def _rotated(self, rotation: Any) -> Any:
        return None if rotation is None else orthonormal(rotation, type(self).__name__, "rotation")

    @property
    def width(self) -> int | None:
        return None if self.rotation is None else self.rotation.shape[0]

    def gate(self, size: int) -> jax.Array:
        """Returns how far each of ``size`` coordinates is open, ``[size]``."""
        raise NotImplementedError

    def displacement(self, difference: jax.Array) -> jax.Array:
        rotation = None if self.rotation is None else jnp.asarray(self.rotation).astype(difference.dtype)
        coordinates = difference if rotation is None else difference @ rotation
        gate = self.gate(coordinates.shape[-1]).astype(difference.dtype)
        opened = coordinates * gate.reshape((1,) * (coordinates.ndim - 1) + gate.shape)
        return opened if rotation is None else opened @ rotation.T


class RotatedInterchange(_Gated):
    """Sets some coordinates of a rotated activation to those of a source (distributed interchange, Geiger et al. 2023).

    Args:
        source: as for :class:`Interchange`.
        rotation: orthonormal columns ``[d, n]``, one for each coordinate; ``None`` means the activation's own.
        coordinates: numbers of the coordinates to set, a slice of them, a boolean mask ``[n]``, or weights ``[n]``
            between 0 and 1. Choosing others recompiles nothing.
        strength, mask, **at: as for :class:`Interchange`.

    Raises:
        InterventionError: the columns are not orthonormal, or a coordinate does not exist.
    """

    arrays = ("source", "rotation", "coordinates", "strength")
    apart = ("rotation", "coordinates")
    optional = ("rotation",)
    coordinates: Any

    def __init__(
        self, source: Any, rotation: Any, coordinates: Any, strength: Any = 1.0, *, mask: Any = None, **at: Any
    ) -> None:
        super().__init__(mask, **at)
        rotation = self._rotated(rotation)
        size = None if rotation is None else rotation.shape[1]
        self._keep(source, strength, rotation=rotation, coordinates=_weights(coordinates, size))

    def gate(self, size: int) -> jax.Array:
        if self.coordinates.shape != (size,):
            raise InterventionError(
                f"RotatedInterchange has weights for {self.coordinates.shape} coordinates; the activation has {size}."
            )
        return jnp.asarray(self.coordinates)


class BoundlessInterchange(_Gated):
    """Sets the first coordinates of a rotated activation, up to a learned boundary (Boundless DAS, Wu et al. 2023).

    Args:
        source: as for :class:`Interchange`.
        rotation: orthonormal columns ``[d, n]``, one for each coordinate.
        boundary: share of the coordinates to set, 0 to 1 (:func:`boundary_gate`).
        temperature: width of the boundary in coordinates; 0 for a sharp one.
        strength, mask, **at: as for :class:`Interchange`.
    """

    arrays = ("source", "rotation", "boundary", "temperature", "strength")
    apart = ("rotation", "boundary", "temperature")
    boundary: Any
    temperature: Any

    def __init__(
        self,
        source: Any,
        rotation: Any,
        boundary: Any,
        temperature: Any = 0.0,
        strength: Any = 1.0,
        *,
        mask: Any = None,
        **at: Any,
    ) -> None:
        super().__init__(mask, **at)
        owner = type(self).__name__
        numbers = {"boundary": number_leaf(boundary, owner), "temperature": number_leaf(temperature, owner)}
        self._keep(source, strength, rotation=orthonormal(rotation, owner, "rotation"), **numbers)

    def gate(self, size: int) -> jax.Array:
        return boundary_gate(self.boundary, size, self.temperature)


class MaskedInterchange(_Gated):
    """Sets the coordinates that a mask opens (desiderata-based masking, De Cao et al. 2020, Davies et al. 2023).

    Args:
        source: as for :class:`Interchange`.
        mask_logits: ``[n]``, or ``[1]`` for one gate that all coordinates share (:func:`mask_gate`).
        rotation: orthonormal columns ``[d, n]``, such as principal components; ``None`` means the activation's own
            coordinates, such as neurons.
        temperature: of the sigmoid; 0 opens exactly the coordinates with a positive logit.
        strength, mask, **at: as for :class:`Interchange`.
    """

    arrays = ("source", "mask_logits", "rotation", "temperature", "strength")
    apart = ("mask_logits", "rotation", "temperature")
    optional = ("rotation",)
    mask_logits: Any
    temperature: Any

    def __init__(
        self,
        source: Any,
        mask_logits: Any,
        rotation: Any = None,
        temperature: Any = 0.0,
        strength: Any = 1.0,
        *,
        mask: Any = None,
        **at: Any,
    ) -> None:
        super().__init__(mask, **at)
        owner, rotation = type(self).__name__, self._rotated(rotation)
        logits = number_leaf(mask_logits, owner)
        sizes = {1} if rotation is None else {1, rotation.shape[1]}
        if logits.ndim != 1 or (rotation is not None and logits.shape[0] not in sizes):
            raise InterventionError(
                f"MaskedInterchange needs one logit for each coordinate, or one for all; got shape "
                f"{tuple(logits.shape)}" + (f" for {rotation.shape[1]} coordinates." if rotation is not None else ".")
            )
        self._keep(source, strength, mask_logits=logits, rotation=rotation, temperature=number_leaf(temperature, owner))

    def gate(self, size: int) -> jax.Array:
        if self.mask_logits.shape[0] not in (1, size):
            raise InterventionError(
                f"MaskedInterchange has {self.mask_logits.shape[0]} logits; the activation has {size} coordinates."
            )
        return mask_gate(self.mask_logits, size, self.temperature)


class NormMatchedPlacebo(_Gated):
    """Moves as far as an interchange would, but in a random subspace: the control of its displacement's length.

    Each vector moves along the component of ``h_s - h_b`` in the placebo's subspace, by the length that the interchange
    in ``rotation`` would move it. Where that component vanishes, nothing moves.

    Args:
        source: as for :class:`Interchange`.
        rotation: the interchange's columns ``[d, n]``; ``None`` means the activation's own coordinates.
        placebo: orthonormal columns ``[d, k]`` of the subspace to move in.
        coordinates: which of the interchange's coordinates it sets, as for :class:`RotatedInterchange`; all by default.
        strength, mask, **at: as for :class:`Interchange`.
    """

    arrays = ("source", "rotation", "placebo", "coordinates", "strength")
    apart = ("rotation", "placebo", "coordinates")
    optional = ("rotation", "coordinates")
    placebo: Any
    coordinates: Any

    def __init__(
        self,
        source: Any,
        rotation: Any,
        placebo: Any,
        coordinates: Any = None,
        strength: Any = 1.0,
        *,
        mask: Any = None,
        **at: Any,
    ) -> None:
        super().__init__(mask, **at)
        rotation, placebo = self._rotated(rotation), orthonormal(placebo, type(self).__name__, "placebo")
        size = None if rotation is None else rotation.shape[1]
        weights = None if coordinates is None else _weights(coordinates, size)
        self._keep(source, strength, rotation=rotation, placebo=placebo, coordinates=weights)

    @property
    def width(self) -> int | None:
        return self.placebo.shape[0]

    def gate(self, size: int) -> jax.Array:
        return jnp.ones(size) if self.coordinates is None else jnp.asarray(self.coordinates)

    def displacement(self, difference: jax.Array) -> jax.Array:
        placebo = jnp.asarray(self.placebo).astype(difference.dtype)
        return as_long_as(super().displacement(difference), (difference @ placebo) @ placebo.T)


def _weights(coordinates: Any, size: int | None) -> Any:
    """Returns weights ``[size]`` of coordinates given as numbers, a slice, a mask or weights."""
    array = coordinates if isinstance(coordinates, slice | jax.Array) else np.asarray(coordinates)
    if not isinstance(array, slice) and (jnp.issubdtype(array.dtype, jnp.floating) or array.dtype == bool):
        if array.ndim != 1 or (size is not None and array.shape != (size,)):
            raise InterventionError(
                f"The coordinates have weights of shape {tuple(array.shape)}: give one for each of "
                f"{'the' if size is None else size} coordinates, or the numbers of those to set."
            )
        return jnp.asarray(array).astype(jnp.float32) if array.dtype == bool else number_leaf(array)
    if size is None:
        raise InterventionError(
            "Without a rotation the number of coordinates is not known here: give a mask, one entry for each "
            "coordinate."
        )
    weights = np.zeros(size, np.float32)
    try:
        weights[coordinates if isinstance(array, slice) else np.asarray(array)] = 1
    except IndexError as error:
        raise InterventionError(
            f"coordinates={coordinates!r} is out of range: the rotation has {size}, 0 to {size - 1}."
        ) from error
    return weights
