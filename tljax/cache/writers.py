"""What heads, neurons, biases and whole layers write to the residual stream, seen through what reads it.

A part's output is linear in its activations once the scales of the norms it passes are those of the run: the norm after
attention or MLP where a model has one, the norm of the reader, a projection. So those maps are applied to the weights,
``[head, d_head, d_model]`` or ``[neuron, d_model]``, and the scales to the activations; with a projection nothing as
wide as ``d_model`` is made for each neuron.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tljax.cache.slices import Cut
from tljax.config import HookedTransformerConfig
from tljax.modules.activations import scaled
from tljax.modules.norm import norm_kind
from tljax.numerics import matmul_precision, widened
from tljax.text.positions import TextCut


class After(NamedTuple):
    """A norm between a part and the residual stream, as it was in the run.

    Attributes:
        scale: what it divided by, ``[..., 1]``.
        gain: what it multiplies by, ``[d_model]``.
    """

    scale: jax.Array
    gain: jax.Array


class Pieces(NamedTuple):
    """Pieces of the residual stream itself, each ``[..., d_model]``."""

    values: tuple[jax.Array, ...]


class Heads(NamedTuple):
    """A layer's heads: ``z`` ``[..., head, d_head]`` and ``weight`` ``[head, d_head, d_model]``."""

    z: jax.Array
    weight: jax.Array
    after: After | None


class Results(NamedTuple):
    """A layer's heads, whose products with ``W_O`` are there already, ``[..., head, d_model]``."""

    value: jax.Array
    after: After | None


class Neurons(NamedTuple):
    """A layer's neurons, or some of them: ``acts`` ``[..., neuron]`` and ``weight`` ``[neuron, d_model]``."""

    acts: jax.Array
    weight: jax.Array
    after: After | None


class Biases(NamedTuple):
    """Biases together, as one part.

    Attributes:
        constant: ``[d_model]``, the same at every position.
        through: biases ``[d_model]`` that a norm divides by its scale first.
        like: any activation ``[..., anything]`` that has the leading axes.
    """

    constant: jax.Array
    through: tuple[tuple[jax.Array, After], ...]
    like: jax.Array


Part = Pieces | Heads | Results | Neurons | Biases


class Reader(NamedTuple):
    """What reads the residual stream.

    Attributes:
        scale: what its norm divided by, ``[..., 1]``; ``None`` without norm.
        projection: directions ``[d_model, direction]`` onto which what is read is projected; ``None``: it is not.
    """

    scale: jax.Array | None = None
    projection: jax.Array | None = None


@functools.partial(jax.jit, static_argnames=("cfg", "centred"))
def read_parts(
    parts: Sequence[Part],
    reader: Reader,
    taken: Cut | TextCut | None,
    stream: jax.Array | None,
    *,
    cfg: HookedTransformerConfig,
    centred: bool,
) -> jax.Array:
    """Stacks what a reader sees of each part.

    Args:
        parts: in order.
        reader: the reader.
        taken: which positions to keep; activations and scales come whole.
        stream: ``[..., d_model]``; where given, what the parts lack of it is the last row.
        cfg: the model's config.
        centred: the reader's norm subtracts the mean first.

    Returns:
        ``[part, ..., d_model]``, or ``[part, ..., direction]``.
    """
    with matmul_precision(cfg):
        through = _Through(cfg, reader, taken, centred)
        rows = [through.read(part) for part in parts]
        if stream is not None:
            whole = through.read(Pieces((stream,)))
            rows.append(whole - sum((row.sum(axis=0, keepdims=True) for row in rows), jnp.zeros_like(whole)))
        return rows[0] if len(rows) == 1 else jnp.concatenate(rows)


class _Through:
    """One reader's maps, ready to be applied to parts."""

    def __init__(
        self, cfg: HookedTransformerConfig, reader: Reader, taken: Cut | TextCut | None, centred: bool
    ) -> None:
        self.cfg, self.reader, self.taken, self.centred = cfg, reader, taken, centred
        self.after_centres = norm_kind(cfg, "ln1_post") == "LN"

    def read(self, part: Part) -> jax.Array:
        match part:
            case Pieces(values):
                cut = jnp.stack([self._cut(value, -2) for value in values])
                return self._divided(self._reading(cut), None)
            case Heads(z, weight, after):
                acts = self._divided(self._cut(z, -3), after, heads=True)
                return jnp.einsum("...he,hed->h...d", acts, self._written(weight, after))
            case Results(value, after):
                read = self._written(self._cut(value, -3), after)
                return jnp.moveaxis(self._divided(read, after, heads=True), -2, 0)
            case Neurons(acts, weight, after):
                acts = jnp.moveaxis(self._divided(self._cut(acts, -2), after), -1, 0)
                weight = self._written(weight, after)
                return acts[..., None] * weight.reshape(weight.shape[0], *(1,) * (acts.ndim - 1), weight.shape[1])
            case Biases(constant, through, like):
                lead = self._cut(like, -2).shape[:-1]
                total = self._spread(self._reading(constant), None, lead)
                for bias, after in through:
                    total += self._spread(self._written(bias, after), after, lead)
                return total[None]

    def _cut(self, array: jax.Array, axis: int) -> jax.Array:
        return array if self.taken is None else self.taken(array, axis)

    def _spread(self, vector: jax.Array, after: After | None, lead: tuple[int, ...]) -> jax.Array:
        return self._divided(jnp.broadcast_to(vector, (*lead, *vector.shape)), after)

    def _divided(self, array: jax.Array, after: After | None, heads: bool = False) -> jax.Array:
        """An array divided by the scales; ``heads``: it has an axis of heads before its last."""
        scales = [norm.scale for norm in (after, self.reader) if norm is not None and norm.scale is not None]
        if not scales:
            return array
        wide = array.astype(widened(array.dtype))
        for scale in scales:
            scale = self._cut(scale, -2)
            scale = (scale[..., None] if heads else scale).astype(wide.dtype)
            wide = wide / scale.reshape((1,) * (wide.ndim - scale.ndim) + scale.shape)
        return wide.astype(array.dtype)

    def _written(self, weight: jax.Array, after: After | None) -> jax.Array:
        """What is read of a layer's output ``[..., d_model]``, but for the scales: as it is, or projected.

        A projection takes the maps on before it meets the weights: each is its own transpose.
        """
        if self.reader.projection is None:
            return self._reading(self._onto_stream(weight, after, weight.ndim - 1))
        pulled = jnp.swapaxes(self._onto_reader(self.reader.projection), 0, 1)
        pulled = self._onto_stream(pulled, after, 1, transposed=True)
        return jnp.einsum("...d,kd->...k", weight, pulled.astype(weight.dtype))

    def _onto_stream(self, array: jax.Array, after: After | None, lead: int, transposed: bool = False) -> jax.Array:
        if after is not None:
            gain = after.gain.astype(widened(array.dtype)).reshape((1,) * lead + after.gain.shape)
            wide = array.astype(gain.dtype)
            if self.after_centres:
                wide = _centred(wide * gain) if transposed else _centred(wide) * gain
            else:
                wide = wide * gain
            array = wide.astype(array.dtype)
        return scaled(array, self.cfg.residual_multiplier)

    def _reading(self, array: jax.Array) -> jax.Array:
        """What is read of a piece of the stream, but for the scale."""
        if self.reader.projection is None:
            return _centred(array) if self.centred else array
        projection = self._onto_reader(self.reader.projection)
        return jnp.einsum("...d,dk->...k", array, projection.astype(array.dtype))

    def _onto_reader(self, projection: jax.Array) -> jax.Array:
        return projection - projection.mean(axis=0, keepdims=True) if self.centred else projection


def _centred(array: jax.Array) -> jax.Array:
    return array - array.mean(axis=-1, keepdims=True)
