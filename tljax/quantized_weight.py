"""``QuantizedWeight``: a matrix held as codes of eight or four bits with scales, and made floats where it is used.

A number is ``(code - zero) * scale``, or ``table[code] * scale``. A scale belongs to a block of numbers: all that are
multiplied into one output, a group of these, a rectangle. Weights alone are quantised, never activations (weight-only
quantisation: Dettmers et al. 2022, LLM.int8(); Frantar et al. 2022, GPTQ).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.errors import QuantizationError

_LEVELS = {"int8": 128, "int4": 8}
"""How many codes are below zero."""
CODES, TABLE = "codes", "table"
PARTS = (CODES, "scale", "zero", TABLE)
"""Names of the arrays of a quantised weight."""


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A quantised weight, in ``model.params`` in place of the matrix that it stands for.

    Attributes:
        codes: ``[...]``, the shape of the matrix: int8, or an eight-bit float; codes of four bits lie two to a uint8,
            so that their axis ``packed`` is half as long. (jax keeps int4 in whole bytes on some backends.)
        scale: ``[...]``, as many axes as the matrix; each length divides the matrix's, and so says how long a block is.
        zero: the code that stands for zero, ``[...]`` as ``scale``; ``None``: 0.
        table: ``[16]``, the number that each code of four bits stands for; ``None``: codes are numbers from -8 to 7.
        packed: the axis along which two neighbours share a byte, counted from the last, -1; ``None``: none.
        dtype: dtype of the floats that :meth:`dequantized` returns, the model's.
    """

    codes: Any
    scale: Any
    zero: Any = None
    table: Any = None
    packed: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        shape, blocks = self.shape, tuple(self.scale.shape)
        fits = len(blocks) == len(shape) and all(
            count and size % count == 0 for size, count in zip(shape, blocks, strict=True)
        )
        if not fits or (self.zero is not None and tuple(self.zero.shape) != blocks):
            zero = "" if self.zero is None else f" and zero {list(self.zero.shape)}"
            raise QuantizationError(
                f"A weight of {list(shape)} has scale {list(blocks)}{zero}. Expected one length for each axis that "
                "divides it, the number of blocks along it, in both."
            )

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        keyed = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in PARTS]
        return keyed, (self.packed, self.dtype)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Sequence[Any]) -> "QuantizedWeight":
        weight = object.__new__(cls)  # children may be anything while jax goes through a tree
        weight.__dict__.update(zip(PARTS, children, strict=True), packed=aux[0], dtype=aux[1])
        return weight

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        shape = list(self.codes.shape)
        if self.packed is not None:
            shape[self.packed] *= 2
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """Number of its axes."""
        return self.codes.ndim

    @property
    def size(self) -> int:
        """Number of its weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zeros and table together."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def parts(self) -> dict[str, Any]:
        """Its arrays by name."""
        return {name: part for name in PARTS if (part := getattr(self, name)) is not None}

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 if self.packed is None else 4

    @staticmethod
    def axes_of(name: str, axes: Sequence[str]) -> tuple[str, ...]:
        """Returns the axes of one of its arrays, of a matrix with these axes."""
        return ("code",) if name == TABLE else tuple(axes)

    def with_parts(self, parts: Mapping[str, Any]) -> "QuantizedWeight":
        """Returns the weight with other arrays of these names."""
        return dataclasses.replace(self, **parts)

    def astype(self, dtype: Any) -> "QuantizedWeight":
        """Returns the weight whose floats have another dtype; codes and scales stay as they are."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype).name)

    def numbers(self) -> jax.Array:
        """Returns the codes one to an entry, in the matrix's shape."""
        return _unpacked(self)

    def dequantized(self) -> jax.Array:
        """Returns the matrix as floats, computed in float32 and rounded to ``dtype``."""
        return _floats(self)

    def __getitem__(self, index: Any) -> jax.Array:
        """Returns one entry of the first axis as floats: one expert's matrix, without making floats of the others.

        Args:
            index: a whole number, which may be traced.
        """
        length = self.shape[0]
        one = {name: part[index // (length // len(part))] for name, part in self.parts.items() if name != TABLE}
        return dataclasses.replace(self, **one).dequantized()

    def entries(self, index: Sequence[np.ndarray]) -> jax.Array:
        """Returns the floats at places ``[n]`` along each axis, without making floats of the others."""
        return _entries(self, tuple(index))


def as_floats(weight: Any) -> jax.Array:
    """Returns an array as it is, and a quantised weight as floats."""
    return weight.dequantized() if isinstance(weight, QuantizedWeight) else weight


def is_quantized_weight(node: Any) -> bool:
    """Whether a node of a tree is a quantised weight; as ``is_leaf=`` it keeps jax from taking one apart."""
    return isinstance(node, QuantizedWeight)


def is_quantized(params: Any) -> bool:
    """Whether there are quantised weights among parameters."""
    return any(map(is_quantized_weight, jax.tree.leaves(params, is_leaf=is_quantized_weight)))


def refuse_quantized(params: Any, what: str) -> None:
    """Raises QuantizationError if there are quantised weights among parameters.

    Args:
        params: parameters.
        what: what cannot be done with them, the start of the message: ``"save_hf writes floats"``.
    """
    if is_quantized(params):
        raise QuantizationError(
            f"{what}, and weights of this model are quantised. model.dequantize() makes floats of them, the rounded "
            "ones; for the original weights load the model without quantize=."
        )


def made_after(params: Any, stream: Any) -> Any:
    """Returns parameters whose quantised weights become floats when a block's input is there, not before.

    In one program of several blocks, or of several steps, XLA otherwise makes the floats of all of them first.

    Args:
        params: of a block.
        stream: what enters it.
    """
    if not is_quantized(params):
        return params
    never = _never(jax.lax.stop_gradient(stream.reshape(-1)[0]))

    def tied(weight: Any) -> Any:
        if not isinstance(weight, QuantizedWeight):
            return weight
        return weight.with_parts({CODES: weight.codes ^ never.astype(weight.codes.dtype)})

    return jax.tree.map(tied, params, is_leaf=is_quantized_weight)


@jax.custom_batching.custom_vmap
def _never(number: jax.Array) -> jax.Array:
    """Returns 0, which XLA does not know."""
    return (number > jnp.inf).astype(jnp.int8)


@_never.def_vmap
def _never_of_all(axis_size: int, in_batched: list[bool], number: jax.Array) -> tuple[jax.Array, bool]:
    return _never(
        number[0] if in_batched[0] else number
    ), False  # or each of what is mapped would have weights of its own


@functools.partial(jax.jit, static_argnames=("bits", "blocks", "packed"))
def quantized(weight: jax.Array, bits: str, blocks: tuple[int, ...], packed: int | None = None) -> QuantizedWeight:
    """Rounds a matrix to the nearest codes, from -128 to 127 or from -8 to 7.

    A scale is the largest magnitude in its block, over 127.5 or 7.5: qwix's numbers, with its
    ``calibration_method="absmax"``.

    Args:
        weight: floats.
        bits: ``"int8"`` or ``"int4"``.
        blocks: length of a block along each axis; each divides the axis.
        packed: axis of even length, counted from the last, along which two codes of four bits share a byte.

    Returns:
        The quantised weight; scales are float32. A NaN or infinity makes its whole block NaN.
    """
    counts = tuple(size // block for size, block in zip(weight.shape, blocks, strict=True))
    wide = weight.astype(jnp.float32)
    split = wide.reshape([size for pair in zip(counts, blocks, strict=True) for size in pair])
    largest = jnp.abs(split).max(axis=tuple(range(1, split.ndim, 2)))
    levels = _LEVELS[bits]
    scale = largest / (levels - 0.5)
    numbers = jnp.round(wide / _spread(jnp.where(scale == 0, 1, scale), wide.shape))
    codes = jnp.clip(numbers, -levels, levels - 1).astype(jnp.int8)
    codes = codes if packed is None else pack(codes, packed)
    return QuantizedWeight(codes, scale, packed=packed, dtype=weight.dtype.name)


def pack(codes: Any, axis: int) -> Any:
    """Puts two neighbours along an axis into one byte, the first in its lower half; numpy or jax arrays."""
    whole = [slice(None)] * codes.ndim
    first, second = (
        codes[(*whole[:axis], slice(start, None, 2), *whole[codes.ndim + axis + 1 :])].astype("uint8") & 15
        for start in (0, 1)
    )
    return first | (second << 4)


def _unpacked(weight: QuantizedWeight) -> jax.Array:
    """Returns codes in the matrix's shape: int8, or unsigned where a table says what they stand for."""
    codes, axis = weight.codes, weight.packed
    if axis is None:
        return codes
    if weight.table is None:  # shifting a signed number to the right keeps its sign
        halves = [(codes << 4).astype(jnp.int8) >> 4, codes.astype(jnp.int8) >> 4]
    else:
        halves = [codes & 15, codes >> 4]
    return jnp.stack(halves, axis=codes.ndim + axis + 1).reshape(weight.shape)


def _spread(part: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Repeats what blocks share over a matrix of this shape."""
    split = [(count, size // count) for count, size in zip(part.shape, shape, strict=True)]
    blocks = part.reshape([length for count, _ in split for length in (count, 1)])
    return jnp.broadcast_to(blocks, [length for pair in split for length in pair]).reshape(shape)


@jax.custom_jvp
def _dequantized(weight: QuantizedWeight) -> jax.Array:
    codes = _unpacked(weight)
    numbers = codes.astype(jnp.float32) if weight.table is None else weight.table.astype(jnp.float32)[codes]
    if weight.zero is not None:
        numbers = numbers - _spread(weight.zero.astype(jnp.float32), numbers.shape)
    return (numbers * _spread(weight.scale.astype(jnp.float32), numbers.shape)).astype(weight.dtype)


@functools.partial(_dequantized.defjvp, symbolic_zeros=True)
def _refuse_derivative(primals: tuple[QuantizedWeight], tangents: tuple[QuantizedWeight]) -> Any:
    leaves = jax.tree.leaves(tangents, is_leaf=lambda one: isinstance(one, jax.custom_derivatives.SymbolicZero))
    (weight,) = primals
    if not all(isinstance(one, jax.custom_derivatives.SymbolicZero) for one in leaves):
        raise QuantizationError(
            f"A derivative with respect to a quantised weight {list(weight.shape)} was asked for, and whole numbers "
            "have none. Activations have: model.run_with_grads, or jax.grad with respect to a hook's array. For "
            "derivatives with respect to weights use model.dequantize()."
        )
    floats = _dequantized(weight)
    return floats, jnp.zeros_like(floats)


_floats = jax.jit(_dequantized, inline=True)


@jax.jit
def _entries(weight: QuantizedWeight, index: tuple[jax.Array, ...]) -> jax.Array:
    shape, axis, rank = weight.shape, weight.packed, weight.ndim
    place = tuple(jnp.asarray(one, jnp.int32) for one in index)

    def of_block(part: jax.Array) -> jax.Array:
        blocks = (one // (size // count) for one, size, count in zip(place, shape, part.shape, strict=True))
        return part[tuple(blocks)]

    if axis is None:
        codes = weight.codes[place]
    else:
        own = place[rank + axis]
        octet = weight.codes[(*place[: rank + axis], own // 2, *place[rank + axis + 1 :])]
        code = jnp.where(own % 2 == 0, octet & 15, octet >> 4)
        codes = code if weight.table is not None else (code << 4).astype(jnp.int8) >> 4
    zero = None if weight.zero is None else of_block(weight.zero)
    return _dequantized(QuantizedWeight(codes, of_block(weight.scale), zero, weight.table, None, weight.dtype))
