"""Meshes: made of the first devices, checked, and found at the arrays that lie on them."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from tljax.checks import is_traced, typed
from tljax.errors import ShardingError
from tljax.offload import HostBlocks
from tljax.scale.rules import ShardingRules


@typed
def make_mesh(n_devices: int | None = None, **mesh_shape: int) -> Mesh:
    """Makes a mesh of the first devices of jax's default backend.

    Args:
        n_devices: how many devices, all along one axis ``"model"`` (tensor parallel).
        **mesh_shape: or the axes by name, outermost first: ``make_mesh(data=2, model=4)``.

    Raises:
        ShardingError: there are fewer devices.

    >>> dict(make_mesh(1).shape)
    {'model': 1}
    """
    if (n_devices is None) == (not mesh_shape):
        raise ShardingError("Give the number of devices, make_mesh(4), or the mesh's axes, make_mesh(data=2, model=4).")
    shape: dict[str, Any] = dict(mesh_shape) or {"model": n_devices}
    for name, length in shape.items():
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ShardingError(f"{name}={length!r}: a mesh needs a positive number of devices along each axis.")
    count, there = int(np.prod(list(shape.values()))), jax.devices()
    if count > len(there):
        raise ShardingError(
            f"{count} devices were asked for, and jax sees {len(there)} ({there[0].platform}). Use at most that many; "
            "to try a mesh on one machine's CPU, set XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{count} before jax starts."
        )
    if jax.process_count() > 1 and count < len(there):
        raise ShardingError(
            f"{count} devices were asked for, and the {jax.process_count()} processes have {len(there)} together. A "
            "mesh of several processes has all of their devices; for one of this process alone, write "
            'jax.sharding.Mesh(jax.local_devices(), ("model",)).'
        )
    grid = np.array(there[:count]).reshape(list(shape.values()))
    return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def checked_mesh(mesh: Any, rules: Any) -> tuple[Mesh, ShardingRules]:
    """Returns the mesh, its axes left to XLA, and the rules, by default those that the axes' names suggest.

    Raises:
        ShardingError: this is no mesh of devices, or rules and mesh do not fit each other.
    """
    if not isinstance(mesh, Mesh):
        raise ShardingError(
            f"mesh is a {type(mesh).__name__}; expected a jax.sharding.Mesh, such as tljax.scale.make_mesh(4) or "
            'jax.make_mesh((2, 4), ("data", "model")).'
        )
    chosen = ShardingRules.for_mesh(mesh.axis_names) if rules is None else ShardingRules(rules)
    chosen.check(mesh.axis_names)
    auto = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=auto), chosen  # explicit axes would ask each product for one


def mesh_of(params: Any) -> Mesh | None:
    """Returns the mesh that arrays lie on (the first one's), or ``None`` if they are on one device or traced."""
    while isinstance(params, Mapping) and params:  # the first array, without a walk over all of them
        params = next((part for part in params.values() if not isinstance(part, HostBlocks)), None)
    for leaf in jax.tree.leaves(params)[:1]:
        if isinstance(leaf, jax.Array) and not is_traced(leaf):
            sharding = leaf.sharding
            if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1:
                return sharding.mesh
    return None
