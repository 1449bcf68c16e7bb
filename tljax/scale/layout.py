"""Where one array lies: from its axes and shape, rules and the shape of a mesh, to a ``PartitionSpec`` and bytes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from tljax.scale.rules import ShardingRules


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one array lies on a mesh.

    Attributes:
        axes: names of its axes.
        shape: their lengths.
        spec: for each axis, the mesh axes that it is split over.
        bytes_per_device: bytes that each device holds of it.
        why: why an axis that has a rule is whole on every device, or that none has a rule; empty if all are split.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    spec: PartitionSpec
    bytes_per_device: int
    why: str

    @property
    def is_split(self) -> bool:
        """Whether no device holds all of it."""
        return any(self.spec)


def lay_out(
    axes: Sequence[str],
    shape: Sequence[int],
    rules: ShardingRules,
    mesh_shape: Mapping[str, int],
    dtype: Any = "float32",
) -> Placement:
    """Decides where an array lies; touches no device.

    Args:
        axes: names of its axes, such as ``("d_model", "n_heads", "d_head")``.
        shape: their lengths.
        rules: what is split over what.
        mesh_shape: length of each mesh axis: ``mesh.shape``, or ``{"data": 2, "model": 4}``.
        dtype: of its numbers.

    Returns:
        Its placement. An axis whose length does not divide by a mesh axis is not split over that one.

    >>> rules = ShardingRules.tensor_parallel()
    >>> lay_out(("d_model", "n_kv", "d_head"), (8, 2, 4), rules, {"model": 4}).why
    'n_kv=2 does not divide by model=4'
    """
    spec, reasons, used = [], [], dict[str, str]()
    for axis, length in zip(axes, shape, strict=True):
        own: list[str] = []
        for over in rules[axis]:
            parts = math.prod(mesh_shape[name] for name in own) * mesh_shape[over]
            if over in used:
                reasons.append(f"{over} splits {used[over]} already")
            elif length % parts:
                reasons.append(f"{axis}={length} does not divide by {'·'.join([*own, over])}={parts}")
            else:
                own.append(over)
                used[over] = axis
        spec.append(own[0] if len(own) == 1 else tuple(own) or None)
    count = math.prod(mesh_shape[name] for name in used)
    if not used and not reasons:
        reasons.append(f"no rule for {' or '.join(dict.fromkeys(axes)) or 'a single number'}")
    size = math.prod(shape) * np.dtype(dtype).itemsize // count
    return Placement(tuple(axes), tuple(shape), PartitionSpec(*spec), size, "; ".join(dict.fromkeys(reasons)))
