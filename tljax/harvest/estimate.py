"""What a harvest will take, before it starts."""

import dataclasses
import os
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tljax import checks
from tljax.harvest.collecting import Activations, row_bytes
from tljax.harvest.harvest import SHARD_BYTES, StoredDtype
from tljax.harvest.points import read_points
from tljax.harvest.windows import CONTEXT_SIZE, Windows
from tljax.model.hooked_transformer import HookedTransformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarvestEstimate:
    """What a harvest will take.

    Attributes:
        tokens: how many tokens.
        bytes: on disk.
        shards: files of the usual size.
        tokens_per_second: of the model on this device as far as the last point, measured; ``None`` if not timed.
        free_bytes: on the disk of the directory that was named, or of the current one.
    """

    tokens: int
    bytes: int
    shards: int
    tokens_per_second: float | None
    free_bytes: int

    @property
    def seconds(self) -> float | None:
        """How long the model will run, compilation aside; ``None`` if not timed."""
        return None if self.tokens_per_second is None else self.tokens / self.tokens_per_second

    @property
    def fits(self) -> bool:
        """Whether the disk has room."""
        return self.bytes <= self.free_bytes

    def __str__(self) -> str:
        time = "" if self.seconds is None else f", {self.seconds:,.0f} s at {self.tokens_per_second:,.0f} tokens/s"
        return (
            f"{self.tokens:,} tokens: {self.bytes / 1e9:.2f} GB in {self.shards} shards{time}; "
            f"{self.free_bytes / 1e9:.2f} GB free{'' if self.fits else ', too little'}"
        )


@checks.typed
def estimate_harvest(
    model: HookedTransformer,
    n_tokens: int,
    points: Any,
    *,
    dtype: StoredDtype = "bfloat16",
    batch_size: int = 8,
    context_size: int | None = None,
    directory: str | os.PathLike[str] = ".",
    timed: bool = True,
) -> HarvestEstimate:
    """Says how many bytes and seconds a harvest takes.

    Args:
        model: the model.
        n_tokens: how many tokens would be stored.
        points, dtype, batch_size, context_size: as in :func:`harvest`.
        directory: where it would go; need not be there.
        timed: whether to run a batch of random tokens, twice: the first compiles what the harvest needs as well.

    Returns:
        The estimate; its text is one line.

    Raises:
        UnknownHookError: a point is unknown.
        InputError: a number is out of range.
    """
    tokens = checks.whole(n_tokens, "n_tokens", at_least=1)
    size = CONTEXT_SIZE if context_size is None else context_size
    size = checks.whole(
        min(size, model.cfg.n_ctx) if context_size is None else size, "context_size", 1, model.cfg.n_ctx
    )
    at_once = checks.whole(batch_size, "batch_size", at_least=1)
    collector = Activations(read_points(model, points), dtype)
    needed = tokens * row_bytes(collector)
    path = Path(directory).absolute()
    there = next(one for one in (path, *path.parents) if one.exists())
    speed = _tokens_per_second(model, collector, at_once, size) if timed else None
    return HarvestEstimate(
        tokens=tokens, bytes=needed, shards=-(-needed // SHARD_BYTES), tokens_per_second=speed,
        free_bytes=shutil.disk_usage(there).free,
    )  # fmt: skip


def _tokens_per_second(model: HookedTransformer, collector: Activations, batch_size: int, size: int) -> float:
    tokens = np.random.default_rng(0).integers(0, model.cfg.d_vocab, (batch_size, size)).astype(np.int32)
    windows = Windows(tokens, np.ones(tokens.shape, bool), np.zeros_like(tokens), batch_size, 0)
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(collector.collect(model, windows, np.ones(tokens.size, bool)))
        seconds = time.perf_counter() - start
    return tokens.size / seconds
