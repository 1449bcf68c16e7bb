"""How large a cache will be, said before it is made."""

import functools
import math
import os
import warnings
from typing import Any

import jax

from tljax.config import HookedTransformerConfig
from tljax.hooks.points import point_table
from tljax.text.warned import level_of_caller


class LargeCacheWarning(UserWarning):
    """A cache will take more than a quarter of the free memory."""


@functools.lru_cache(maxsize=256)
def cache_bytes(cfg: HookedTransformerConfig, names: tuple[str, ...], batch: int, pos: int) -> int:
    """Size in bytes of the named activations for ``batch`` prompts of ``pos`` tokens (full positions)."""
    rows = map(point_table(cfg).__getitem__, names)
    return sum(row.dtype.itemsize * math.prod(row.shape(batch, pos)) for row in rows)


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


def warn_if_large(size: int, count: int, device: Any) -> None:
    """Warns when ``count`` activations of ``size`` bytes in all exceed a quarter of the free memory."""
    free = free_bytes(device)
    if free is None or size <= free / 4:
        return
    warnings.warn(
        f"This cache of {count} activations will take {size / 2**30:.2f} GiB; {free / 2**30:.2f} GiB are free. "
        'Keep only what you need with names_filter=lambda name: "resid_post" in name, pos_slice=-1, or device="cpu".',
        LargeCacheWarning,
        stacklevel=level_of_caller(),
    )
