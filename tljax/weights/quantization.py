"""Which parameters are quantised, in which blocks, and rounding them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax.numpy as jnp

from tljax.errors import QuantizationError, nearest
from tljax.modules.parameters import contracted_axes
from tljax.quantized_weight import QuantizedWeight, quantized

Bits = Literal["int8", "int4"]
"""How many bits a weight has."""

_GROUP = 128
_SMALLEST_GROUP = 16
"""Groups that are no shorter than this are worth a scale each."""
_FLOAT = ("W_router", "W_shared_gate")
"""Matrices that stay floats: small, and what they choose among is decided by small differences."""


@dataclasses.dataclass(frozen=True)
class WeightBits:
    """How the large matrices of blocks are held: attention's, MLPs' and experts'. Everything else stays floats.

    Attributes:
        bits: ``"int8"`` or ``"int4"``.
        group_size: how many weights that are multiplied into one output share a scale; ``None``: with eight bits all
            of them, with four bits 128 (where that does not divide, the largest of 64, 32 and 16 that does, or all).

    Raises:
        QuantizationError: other bits, or a group size that is not a positive number.
    """

    bits: str
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in get_args(Bits):
            raise QuantizationError(
                f"Weights are quantised to {' or '.join(map(repr, get_args(Bits)))}; got {self.bits!r}."
                f"{nearest(str(self.bits), get_args(Bits))}"
            )
        size = self.group_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise QuantizationError(f"group_size={size!r}: expected a positive number of weights, or None.")

    @classmethod
    def asked(cls, quantize: str | None, group_size: int | None) -> "WeightBits | None":
        """Returns what the arguments of a function that loads ask for; ``None``: floats.

        Raises:
            QuantizationError: other bits, or a group size without them.
        """
        if quantize is None and group_size is not None:
            raise QuantizationError(f'group_size={group_size} is how weights are quantised: pass quantize="int4" too.')
        return None if quantize is None else cls(quantize, group_size)

    def blocks(self, path: str, axes: Sequence[str], shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the length along each axis of a block that shares a scale.

        Raises:
            QuantizationError: the group size does not divide.
        """
        blocks, summed = [1] * len(axes), contracted_axes(path, axes)
        total = math.prod(shape[axis] for axis in summed)
        size = self.group_size
        if size is None:
            size = total if self.bits == "int8" else _usual_group(total, shape[summed[-1]])
        left = size
        for axis in reversed(summed):  # the innermost first: neighbours in memory
            blocks[axis] = math.gcd(left, shape[axis])
            left //= blocks[axis]
            if left > 1 and blocks[axis] != shape[axis]:
                break
        if left > 1:
            lengths = " × ".join(f"{axes[axis]}={shape[axis]}" for axis in summed)
            raise QuantizationError(
                f"group_size={size} does not divide the {total} weights of {path} that are multiplied into one output "
                f"({lengths}). Take a divisor of {shape[summed[-1]]}, or "
                "leave group_size out."
            )
        return tuple(blocks)


def _usual_group(total: int, innermost: int) -> int:
    """Returns the size of groups where none is asked for."""
    if total <= _GROUP:
        return total
    if innermost % _GROUP == 0 or (_GROUP % innermost == 0 and total % _GROUP == 0):
        return _GROUP
    shared = math.gcd(_GROUP, innermost)
    return shared if shared >= _SMALLEST_GROUP else innermost


def is_quantizable(path: str, axes: Sequence[str]) -> bool:
    """Whether a parameter is one of the large matrices of a block."""
    name = path.rpartition(".")[2]
    return path.startswith("blocks.") and name.startswith("W_") and name not in _FLOAT and len(axes) > 1


def packed_axis(path: str, axes: Sequence[str], shape: Sequence[int]) -> int | None:
    """Returns the axis along which codes of four bits share bytes, counted from the last; ``None``: none is even.

    It is one that is summed over if that is even, and never that of experts.
    """
    summed = contracted_axes(path, axes)
    others = [axis for axis in range(len(axes) - 1, -1, -1) if axis not in summed and axes[axis] != "n_experts"]
    found = [axis for axis in (*reversed(summed), *others) if shape[axis] % 2 == 0]
    return found[0] - len(axes) if found else None


def quantize_parameters(
    flat: Mapping[str, Any], axes: Mapping[str, tuple[str, ...]], form: WeightBits
) -> dict[str, Any]:
    """Returns parameters by dotted path with the large matrices quantised.

    Args:
        flat: floats by dotted path.
        axes: the parameters' axes, by dotted path.
        form: bits and groups.

    Raises:
        QuantizationError: the group size does not divide one of them, or one is quantised already.
    """
    blocks = {}
    for path, leaf in flat.items():
        if isinstance(leaf, QuantizedWeight):
            raise QuantizationError(
                f"{path} is quantised already ({leaf.bits} bits): rounding it again would add a second error. Quantise "
                "the model with its original weights; or model.dequantize() first, if you mean it."
            )
        if is_quantizable(path, axes[path]):
            if leaf.ndim != len(axes[path]):
                raise QuantizationError(f"{path} is stacked, for several models at once: quantise each, then stack.")
            blocks[path] = form.blocks(path, axes[path], leaf.shape)
    return {
        path: quantized(
            jnp.asarray(leaf), form.bits, blocks[path],
            packed_axis(path, axes[path], leaf.shape) if form.bits == "int4" else None,
        ) if path in blocks else leaf
        for path, leaf in flat.items()
    }  # fmt: skip
