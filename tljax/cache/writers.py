"""Contributions of heads, neurons, biases and whole layers to the residual stream, as a norm or projection reads them.

With the scales of all norms fixed to those of the run, a part's contribution is linear in its activations. So the norm
after attention or MLP (if there is one), the reader's norm and the projection are applied to the weights,
``[head, d_head, d_model]`` or ``[neuron, d_model]``, and the scales to the activations. With a projection, nothing as
wide as ``d_model`` is computed for each neuron.
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
    """A norm between a part and the residual stream, with its scale from the run.

    Attributes:
        scale: the scale it divided by, ``[..., 1]``.
        gain: the weight it multiplies by, ``[d_model]``.
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
    """A layer's heads, already multiplied by ``W_O``, ``[..., head, d_model]``."""

    value: jax.Array
    after: After | None


class Neurons(NamedTuple):
    """A layer's neurons, or some of them: ``acts`` ``[..., neuron]`` and ``weight`` ``[neuron, d_model]``."""

    acts: jax.Array
    weight: jax.Array
    after: After | None


class Biases(NamedTuple):
    """The sum of several biases, as one part.

    Attributes:
        constant: ``[d_model]``, the same at every position.
        through: biases ``[d_model]``, each with the norm that it passes first.
        like: any activation ``[..., width]`` with the leading axes to broadcast to.
    """

    constant: jax.Array
    through: tuple[tuple[jax.Array, After], ...]
    like: jax.Array


Part = Pieces | Heads | Results | Neurons | Biases


class Reader(NamedTuple):
    """A reader of the residual stream: a norm, then a projection, each optional.

    Attributes:
        scale: the scale its norm divided by, ``[..., 1]``; ``None`` without norm.
        projection: directions ``[d_model, direction]`` to project onto; ``None`` without projection.
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
    """Stacks the parts of the residual stream as a reader sees them.

    Args:
        parts: the parts, in the order of the rows.
        reader: the reader.
        taken: which positions to keep; activations and scales are given with all positions.
        stream: ``[..., d_model]``; if given, the stream minus the parts is the last row.
        cfg: the model's config.
        centred: whether the reader's norm subtracts the mean first.

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
    """One reader's linear maps and scales, to be applied to parts."""

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
        """Divides an array by the scales; with ``heads`` it has an axis of heads before its last."""
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
        """Returns output weights ``[..., d_model]`` as the reader sees them, but for the scales.

        With a projection, the maps are applied to it and not to the weights: each map is its own transpose.
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
        """Returns a piece of the stream as the reader sees it, but for the scale."""
        if self.reader.projection is None:
            return _centred(array) if self.centred else array
        projection = self._onto_reader(self.reader.projection)
        return jnp.einsum("...d,dk->...k", array, projection.astype(array.dtype))

    def _onto_reader(self, projection: jax.Array) -> jax.Array:
        return projection - projection.mean(axis=0, keepdims=True) if self.centred else projection


def _centred(array: jax.Array) -> jax.Array:
    return array - array.mean(axis=-1, keepdims=True)
