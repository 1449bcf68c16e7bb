"""Prompts, and their positions, over the devices of the mesh that a model lies on."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from tljax.checks import is_traced
from tljax.errors import ShardingError
from tljax.processes import as_numpy, check_same, is_distributed, put
from tljax.scale.mesh import mesh_of
from tljax.scale.rules import DATA_AXES, POS_AXIS


def spread(value: Any, params: Any, axis: int = 0, *, move: bool = False, positions: bool = False) -> Any:
    """Returns an input of a model, its prompts spread over the data axes of the model's mesh where they divide.

    Args:
        value: ``[batch, ...]``, on the host or on one device; an array that lies on a mesh is left as it is, unless
            ``move``.
        params: the parameters that it will meet; on one device nothing happens.
        axis: the axis that is spread.
        move: whether an array that lies on a mesh is moved.
        positions: whether the next axis is positions, which are spread over the mesh axis for them where they divide.

    Raises:
        ShardingError: ``value`` lies on other devices than the model.
    """
    mesh = mesh_of(params)
    if mesh is None or is_traced(value):
        return value
    if isinstance(value, jax.Array) and not move and not isinstance(value.sharding, SingleDeviceSharding):
        if value.sharding.device_set != set(mesh.devices.flat):
            raise ShardingError(
                f"The input lies on {len(value.sharding.device_set)} devices, and the model on {mesh.size} others. Put "
                "it on the model's mesh, jax.device_put(input, NamedSharding(model.mesh, spec)), or pass it as a numpy "
                "array."
            )
        own = value.sharding
        if isinstance(own, NamedSharding) and own.mesh.axis_types != mesh.axis_types:
            raise ShardingError(
                f"The input lies on a mesh with axes of type {', '.join(map(str, own.mesh.axis_types))} (what "
                "jax.make_mesh makes by default), and XLA splits a model's arrays by itself. Put the input on "
                "model.mesh, jax.device_put(input, NamedSharding(model.mesh, spec)), or pass it as a numpy array."
            )
        return value
    return over_data(value, mesh, axis, positions=positions)


def on_devices(arrays: Any, params: Any, axis: int = 0) -> Any:
    """Returns a tree of a computation's own arrays on the devices of its parameters, spread as prompts are.

    Unlike :func:`spread` it puts arrays on a device in any case, and several processes do not compare them.
    """
    mesh = mesh_of(params)
    if mesh is None or is_traced(arrays):
        return jax.device_put(arrays)
    return jax.tree.map(lambda array: over_data(array, mesh, axis, compare=False), arrays)


def over_data(value: Any, mesh: Mesh, axis: int = 0, *, compare: bool = True, positions: bool = False) -> jax.Array:
    """Returns an array on a mesh, one axis spread over the mesh's data axes where its length divides.

    Args:
        value: ``[..., batch, ...]``, on the host or on one device; on several processes each has the whole of it.
        mesh: the mesh.
        axis: the axis that is spread.
        compare: whether several processes compare what they have.
        positions: whether the next axis is positions.

    Raises:
        ShardingError: processes have different values.
    """
    shape, over = np.shape(value), list[str]()
    for name in DATA_AXES:
        parts = math.prod(mesh.shape[one] for one in over) * mesh.shape.get(name, 1)
        if name in mesh.shape and shape[axis] % parts == 0:
            over.append(name)
    along = POS_AXIS if positions and POS_AXIS in mesh.shape and shape[axis + 1] % mesh.shape[POS_AXIS] == 0 else None
    spec = [*[None] * axis, tuple(over) or None, *([] if along is None else [along])]
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    if not is_distributed(mesh):
        return jax.device_put(value, sharding)
    here = as_numpy(value)
    if compare:
        check_same(here, "Prompts", mesh)
    return jax.make_array_from_callback(here.shape, sharding, lambda index: here[index])


def n_groups(params: Any) -> int:
    """Returns how many groups of devices prompts are spread over; one on one device."""
    mesh = mesh_of(params)
    return 1 if mesh is None else math.prod(mesh.shape.get(name, 1) for name in DATA_AXES)


def gathered(array: Any, params: Any) -> Any:
    """Returns an array that lies whole in every group of devices that prompts are spread over.

    What it is split over within a group stays; one that is on the host or on one device is copied to the model's mesh.
    """
    mesh = mesh_of(params)
    if mesh is None or is_traced(array):
        return array
    spec: list[Any] = []
    if isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding) and array.sharding.mesh == mesh:
        for over in array.sharding.spec:
            names = [over] if isinstance(over, str) else list(over or ())
            spec.append(tuple(name for name in names if name not in DATA_AXES) or None)
    return put(array, NamedSharding(mesh, PartitionSpec(*spec)))


def kept_spread(after: Any, before: Any) -> Any:
    """Returns what a stage put out, its prompts and positions spread as those that came in.

    Where parameters are split along ``d_model`` over the same devices, XLA may move to those what prompts were spread
    over, and each device would then compute all prompts.
    """
    if not isinstance(before, jax.Array) or not isinstance(after, jax.Array) or is_traced(before, after):
        return after
    was, now = before.sharding, after.sharding
    if not isinstance(was, NamedSharding) or not any(was.spec[:2]):
        return after
    lead = [*was.spec[:2]]
    while lead[-1] is None:
        lead.pop()
    spec = now.spec if isinstance(now, NamedSharding) else PartitionSpec()  # older JAX does not name what XLA chose
    if [*spec[: len(lead)]] == lead and (len(spec) == len(lead) or spec[-1] is not None):
        return after
    taken = {name for over in lead for name in ([over] if isinstance(over, str) else over or ())}
    kept = [*lead, *(None if one in taken or isinstance(one, tuple) else one for one in spec[len(lead) :])]
    while kept[-1] is None:  # as XLA itself would name it: programs are kept by this name
        kept.pop()
    return jax.device_put(after, NamedSharding(was.mesh, PartitionSpec(*kept)))
