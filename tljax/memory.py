"""Memory budgets."""

import os
from typing import Any

import jax

WORKING_BYTES = 256 * 2**20
"""Bytes that intermediate results may take at once where larger chunks would not be faster."""

LARGE_SHARE = 1 / 4
"""The share of free memory above which a user is warned, and copies that serve only speed are not made."""

BATCH_SHARE = 1 / 8
"""The share of free memory that each kind of array of a batch may take; running the batch needs several more."""

_UNKNOWN = 4 * 2**30


def how_many(size: int) -> int:
    """Returns how many items of ``size`` bytes fit into ``WORKING_BYTES``, at least one."""
    return max(1, WORKING_BYTES // size)


def batch_budget(device: Any = None) -> int:
    """Returns the bytes that each kind of array of a batch may take on a device."""
    return int((free_bytes(device) or _UNKNOWN) * BATCH_SHARE)


def is_large(size: int, free: int) -> bool:
    """Whether ``size`` bytes are a large part of those that are free."""
    return size > free * LARGE_SHARE


def free_bytes(device: Any = None) -> int | None:
    """Returns the free bytes of a device, or of this machine for the CPU; ``None`` if they are not known."""
    device = jax.devices()[0] if device is None else device
    if device.platform == "cpu":
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return None
    stats = device.memory_stats()
    return None if not stats or "bytes_limit" not in stats else stats["bytes_limit"] - stats.get("bytes_in_use", 0)
