"""Placing parameters on a device, in a sharding, or in a sharding chosen for each parameter."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tljax.devices import resolve_device
from tljax.typing import DeviceLike

ShardingRule = Callable[[str, tuple[int, ...]], jax.Device | jax.sharding.Sharding | None]
Placer = Callable[[str, Any], jax.Array]


def placer(device: DeviceLike | ShardingRule) -> Placer:
    """Returns a function ``(path, array) -> jax.Array`` that puts a parameter where ``device`` says.

    Args:
        device: ``None`` (jax's default device), a name such as ``"cpu"`` or ``"gpu:1"``, a device, a sharding
            for every parameter, or a function ``(dotted path, shape) -> sharding``. With a sharding each
            device receives only its part.
    """

    def place(path: str, array: Any) -> jax.Array:
        target = device(path, array.shape) if callable(device) else resolve_device(device)
        if isinstance(target, jax.sharding.Sharding) and isinstance(array, np.ndarray):
            return jax.make_array_from_callback(array.shape, target, lambda index: array[index])
        return jax.device_put(array, target)

    return place
