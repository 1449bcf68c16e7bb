"""How much memory a thing may take."""

import os
from typing import Any

import jax

WORKING_BYTES = 256 * 2**20
"""What results in between may take at once, where more would not make the work faster."""

LARGE_SHARE = 1 / 4
"""The share of the free memory above which a user is warned, and what is only there for speed is not made."""

BATCH_SHARE = 1 / 8
"""The share of the free memory that each kind of array of a batch may take: what runs on them needs several more."""

_UNKNOWN = 4 * 2**30


def how_many(size: int) -> int:
    """How many things of ``size`` bytes to work on at once: as many as fit into ``WORKING_BYTES``, at least one."""
    return max(1, WORKING_BYTES // size)


def batch_budget(device: Any = None) -> int:
    """Bytes that each kind of array of a batch may take on a device."""
    return int((free_bytes(device) or _UNKNOWN) * BATCH_SHARE)


def is_large(size: int, free: int) -> bool:
    """Whether ``size`` bytes are a large part of those that are free."""
    return size > free * LARGE_SHARE


def free_bytes(device: Any = None) -> int | None:
    """Free memory of a device, or of this machine for the CPU; ``None`` when it cannot be told."""
    device = jax.devices()[0] if device is None else device
    if device.platform == "cpu":
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return None
    stats = device.memory_stats()
    return None if not stats or "bytes_limit" not in stats else stats["bytes_limit"] - stats.get("bytes_in_use", 0)
