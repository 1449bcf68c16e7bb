"""Placing parameters on a device, in a sharding, or in a sharding chosen for each parameter."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from tljax.devices import resolve_device
from tljax.errors import InputError, OffloadError
from tljax.quantized_weight import TABLE, QuantizedWeight
from tljax.scale.layout import lay_out
from tljax.scale.mesh import checked_mesh, make_mesh
from tljax.typing import DeviceLike

ShardingRule = Callable[[str, tuple[int, ...]], jax.Device | jax.sharding.Sharding | None]
Axes = Mapping[str, tuple[str, ...]]


class Placer:
    """Puts parameters where they belong.

    Args:
        device: ``None`` (jax's default device), a name such as ``"cpu"`` or ``"gpu:1"``, a device, a sharding
            for every parameter, or a function ``(dotted path, shape) -> sharding``. With a sharding each
            device receives only its part.
    """

    def __init__(self, device: DeviceLike | ShardingRule) -> None:
        self._device = device

    def target(self, path: str, shape: tuple[int, ...]) -> Any:
        """Returns the device or sharding of a parameter; ``None`` is jax's default device."""
        return self._device(path, shape) if callable(self._device) else resolve_device(self._device)

    def __call__(self, path: str, array: Any) -> Any:
        """Returns an array, or a quantised weight (each of its arrays), where the parameter ``path`` belongs."""
        if isinstance(array, QuantizedWeight):
            targets = {name: self.target(path, part.shape) for name, part in array.parts.items() if name != TABLE}
            one = next(iter(targets.values()))
            on_mesh = isinstance(one, jax.sharding.NamedSharding)
            targets[TABLE] = jax.sharding.NamedSharding(one.mesh, jax.sharding.PartitionSpec()) if on_mesh else one
            return array.with_parts({name: self._put(part, targets[name]) for name, part in array.parts.items()})
        return self._put(array, self.target(path, array.shape))

    @staticmethod
    def _put(array: Any, target: Any) -> jax.Array:
        if isinstance(target, jax.sharding.Sharding) and isinstance(array, np.ndarray):
            return in_parts(array.shape, target, lambda index: array[index])
        return jax.device_put(array, target)


def host_device() -> Any:
    """Returns a device in the host's memory; ``None``, which is jax's default, where jax runs without its CPU."""
    try:
        return jax.local_devices(backend="cpu")[-1]
    except RuntimeError:
        return None


def check_one_device(device: DeviceLike | ShardingRule, is_mesh: bool) -> None:
    """Raises OffloadError if parameters are to go to several devices, or each where a function says."""
    target = None if is_mesh or callable(device) else resolve_device(device)
    if is_mesh or callable(device) or (isinstance(target, jax.sharding.Sharding) and len(target.device_set) > 1):
        raise OffloadError(
            "offload='host' came together with several devices (mesh=, n_devices=, or a device= that chooses for each "
            "parameter): blocks on the host go to one device as they run. Pass one of the two; on several devices a "
            "model is spread instead, and each holds its part."
        )


def in_parts(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """Makes an array of which each device receives its part; a part that several devices hold is read once.

    Args:
        shape: of the whole.
        sharding: where the parts belong.
        read: returns the part at an index.
    """
    holders: dict[Any, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        ranges = tuple(one.indices(length)[:2] for one, length in zip(index or (), shape, strict=True))
        holders.setdefault(ranges, []).append(device)
    placed = []
    for ranges, devices in holders.items():
        part = np.asarray(read(tuple(slice(*one) for one in ranges)), order="C")
        placed += [jax.device_put(part, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)


def placer_for(device: DeviceLike | ShardingRule, n_devices: int, mesh: Any, rules: Any) -> Callable[[Axes], Placer]:
    """Returns a function from the axes of all parameters to what places them.

    Args:
        device: see :class:`Placer`.
        n_devices: how many devices to spread the parameters over, by tensor parallelism.
        mesh: or the mesh to spread them over; only one of the three is given.
        rules: what is split over what; ``None``: what the names of the mesh's axes suggest.

    Raises:
        InputError: several are given, or rules without a mesh.
        ShardingError: there are fewer devices, or rules and mesh do not fit each other.
    """
    given = {"device": device is not None, "n_devices": n_devices != 1, "mesh": mesh is not None}
    if sum(given.values()) > 1:
        named = " and ".join(f"{name}=" for name, is_given in given.items() if is_given)
        raise InputError(f"{named} came together, and each says where the parameters go. Pass one of them.")
    if n_devices != 1:
        mesh = make_mesh(n_devices)
    if mesh is None:
        if rules is not None:
            raise InputError("rules= says what is split over the axes of a mesh: pass mesh= or n_devices= as well.")
        return lambda axes: Placer(device)
    mesh, rules = checked_mesh(mesh, rules)

    def placer(axes: Axes) -> Placer:
        def sharding(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
            return jax.sharding.NamedSharding(mesh, lay_out(axes[path], shape, rules, mesh.shape).spec)

        return Placer(sharding)

    return placer
