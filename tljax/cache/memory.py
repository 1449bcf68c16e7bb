"""The size of a cache before it is made, and a warning if it is large."""

import functools
import math
import warnings
from typing import Any

from tljax.config import HookedTransformerConfig
from tljax.hooks.points import point_table
from tljax.memory import free_bytes, is_large
from tljax.text.warned import level_of_caller


class LargeCacheWarning(UserWarning):
    """A cache will take more than a quarter of the free memory."""


@functools.lru_cache(maxsize=256)
def cache_bytes(cfg: HookedTransformerConfig, names: tuple[str, ...], batch: int, pos: int) -> int:
    """Returns the size in bytes of the named activations for ``batch`` prompts of ``pos`` tokens (full positions)."""
    rows = map(point_table(cfg).__getitem__, names)
    return sum(row.dtype.itemsize * math.prod(row.shape(batch, pos)) for row in rows)


def warn_if_large(size: int, count: int, device: Any) -> None:
    """Warns when ``count`` activations of ``size`` bytes in all exceed a quarter of the free memory."""
    free = free_bytes(device)
    if free is None or not is_large(size, free):
        return
    warnings.warn(
        f"This cache of {count} activations will take {size / 2**30:.2f} GiB; {free / 2**30:.2f} GiB are free. "
        'Keep only what you need with names_filter=lambda name: "resid_post" in name, pos_slice=-1, or device="cpu".',
        LargeCacheWarning,
        stacklevel=level_of_caller(),
    )
