"""Device names: ``"cpu"``, ``"gpu"``, ``"cuda:1"``, a jax device or a sharding."""

from typing import Any

import jax

from tljax.errors import InputError
from tljax.typing import DeviceLike

_PLATFORMS = ("cpu", "gpu", "cuda", "rocm", "tpu")


def names_device(value: Any) -> bool:
    """Whether a value is a device, a sharding or a device's name (rather than a dtype)."""
    if isinstance(value, str):
        return value.partition(":")[0] in _PLATFORMS
    return isinstance(value, jax.Device | jax.sharding.Sharding)


def resolve_device(device: DeviceLike) -> Any:
    """Returns the device or sharding a user named; ``None`` means jax's default.

    Raises:
        InputError: the name is unknown, or this machine has no such device.
    """
    if device is None or not isinstance(device, str):
        return device
    platform, _, number = device.partition(":")
    if platform not in _PLATFORMS or (number and not number.isdigit()):
        raise InputError(
            f"device={device!r} is not one of {', '.join(_PLATFORMS)}, optionally with a number ('gpu:1')."
        )
    try:
        devices = jax.devices(platform)
    except RuntimeError as error:
        raise InputError(
            f"This machine has no {platform!r} device for jax (it has {jax.default_backend()!r}). "
            "On a GPU machine install tljax[cuda]; on a TPU tljax[tpu]."
        ) from error
    if int(number or 0) >= len(devices):
        raise InputError(f"device={device!r}: there are {len(devices)} {platform} devices, numbered from 0.")
    return devices[int(number or 0)]
