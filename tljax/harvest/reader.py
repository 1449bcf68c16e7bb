"""``Reader``: shuffled batches of stored tokens, each a pure function of the seed and the step."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tljax import checks
from tljax.errors import HarvestError
from tljax.harvest.permutation import permute
from tljax.harvest.stored import StoredArray

STRETCH = 256
"""Tokens that are read together where blocks are shuffled."""


class Reader:
    """Batches of tokens. ``reader.batch(step)`` depends on the seed and the step alone, so a run resumes exactly.

    The batches of a reader are cut from an endless sequence of epochs. An epoch is every token once, in an order of its
    own, computed and not stored. A batch may end one epoch and begin the next.

    Where the store is larger than memory, every row of a batch is a read of its own from the disk. With
    ``block_tokens`` the epoch goes through blocks, each made of stretches of 256 tokens from all over the store in an
    order of their own; tokens are shuffled within a block. What is read together then lies together: the disk reads
    each stretch once.

    Args:
        arrays: the stored points.
        batch_size: tokens of a batch.
        seed, shuffle, dtype, block_tokens: as in :meth:`ActivationStore.reader`.
    """

    def __init__(
        self,
        arrays: Mapping[str, StoredArray],
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        dtype: str = "float32",
        block_tokens: int | None = None,
    ) -> None:
        self._arrays, self._dtype, self.shuffle = dict(arrays), np.dtype(dtype), shuffle
        self.batch_size = checks.whole(batch_size, "batch_size", at_least=1, error=HarvestError)
        self.seed = checks.whole(seed, "seed", error=HarvestError)
        self._size = len(next(iter(self._arrays.values())))
        at_least = checks.whole(0 if block_tokens is None else block_tokens, "block_tokens", 0, error=HarvestError)
        if block_tokens is not None and at_least < STRETCH:
            raise HarvestError(f"block_tokens={block_tokens} must be at least {STRETCH}, the tokens read together.")
        self.block_tokens = None if block_tokens is None else at_least // STRETCH * STRETCH

    def __repr__(self) -> str:
        return f"Reader({', '.join(self.points)}, batch_size={self.batch_size}, {self._size} tokens, seed={self.seed})"

    def __len__(self) -> int:
        """Steps in which every token was read once."""
        return -(-self._size // self.batch_size)

    @property
    def points(self) -> tuple[str, ...]:
        """The points it reads."""
        return tuple(self._arrays)

    def rows(self, step: int) -> np.ndarray:
        """Returns the numbers of a batch's tokens in the store, int64 ``[batch]``."""
        number = checks.whole(step, "step", at_least=0, error=HarvestError)
        place = number * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        epoch, index = np.divmod(place, self._size)
        if not self.shuffle:
            return index
        rows = np.empty_like(index)
        for one in np.unique(epoch):
            rows[epoch == one] = self._order(index[epoch == one], int(one))
        return rows

    def _order(self, index: np.ndarray, epoch: int) -> np.ndarray:
        """Returns the tokens at these places of an epoch."""
        if self.block_tokens is None or self.block_tokens >= self._size:
            return permute(index, self._size, self.seed, epoch)
        stretches = self._size // STRETCH
        blocked, rows = stretches * STRETCH, np.empty_like(index)
        for block in np.unique(index // self.block_tokens):
            start = int(block) * self.block_tokens
            size = min(self.block_tokens, blocked - start)
            here = (index >= start) & (index < start + size)
            within = permute(index[here] - start, size, self.seed, epoch, 1 + int(block)) if size > 0 else index[here]
            stretch = permute(start // STRETCH + within // STRETCH, stretches, self.seed, epoch, 0)
            rows[here] = stretch * STRETCH + within % STRETCH
        last = index >= blocked  # fewer than a stretch: others in every epoch
        rows[last] = index[last]
        return (rows + int(permute(np.zeros(1, np.int64), self._size, self.seed, epoch, -1)[0])) % self._size

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Returns a batch.

        Args:
            step: 0, 1, 2 ….

        Returns:
            ``[batch, width]`` of each point.
        """
        rows = self.rows(step)
        return {name: array.take(rows, self._dtype) for name, array in self._arrays.items()}

    def __call__(self, step: int) -> Any:
        """Returns a batch ``[batch, width]`` if the reader has one point, or else what :meth:`batch` returns."""
        values = self.batch(step)
        return values if len(values) > 1 else next(iter(values.values()))
