"""``ActivationStore``: harvested activations on disk."""

import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tljax import checks
from tljax.errors import HarvestError
from tljax.fingerprint import fingerprint_of
from tljax.harvest.collecting import Arrays, sums_of
from tljax.harvest.index import ACTIVATIONS, Index
from tljax.harvest.moments import Statistics, merge_moments
from tljax.harvest.reader import Reader
from tljax.harvest.shards import OpenShard, open_shard
from tljax.harvest.stored import StoredArray, not_stored, one_point
from tljax.harvest.windows import NOTHING
from tljax.harvest.writing import CONTEXT
from tljax.model.hooked_transformer import HookedTransformer


class Example(NamedTuple):
    """A stored token in its window.

    Attributes:
        tokens: ids of the window, without padding.
        pos: where in it the token stands.
        document: number of its document.
    """

    tokens: np.ndarray
    pos: int
    document: int


class Store:
    """What stores of activations and of codes have in common. Open one with :meth:`open`.

    Attributes:
        directory: where it lies.
        index: what its index says.
    """

    _FORM: str

    def __init__(self, directory: Path, index: Index, shards: tuple[OpenShard, ...]) -> None:
        self.directory, self.index, self._shards = directory, index, shards

    @classmethod
    def _open(cls, directory: str | os.PathLike[str], partial: bool) -> Any:
        path = Path(directory)
        index = Index.read(path, cls._FORM)
        if not index.complete and not partial:
            raise HarvestError(
                f"The harvest in {path} stopped after {len(index.shards)} shards ({index.counts['tokens']} tokens): "
                "make the same call again to go on with it, or open(directory, partial=True) for what is there."
            )
        if not index.counts["tokens"]:
            raise HarvestError(f"{path} holds no tokens: every one of them was left out, or the harvest just began.")
        return cls(path, index, tuple(open_shard(path, shard, index) for shard in index.shards))

    def __len__(self) -> int:
        return self.index.counts["tokens"]

    @property
    def tokens(self) -> StoredArray:
        """Id of each stored token, int32 ``[token]``."""
        return self._array("tokens")

    @property
    def positions(self) -> StoredArray:
        """Position of each stored token in its window, int32 ``[token]``."""
        return self._array("positions")

    @property
    def documents(self) -> StoredArray:
        """Number of each stored token's document, int32 ``[token]``."""
        return self._array("documents")

    @property
    def windows(self) -> StoredArray:
        """Number of each stored token's window, int32 ``[token]``."""
        return self._array("windows")

    @property
    def context(self) -> StoredArray:
        """Token ids of every window that was run, int32 ``[window, pos]``; -1 at padding."""
        return self._array(CONTEXT)

    def _array(self, name: str) -> StoredArray:
        return StoredArray([shard[name] for shard in self._shards])

    def example(self, token: int) -> Example:
        """Returns a stored token with the window around it.

        Args:
            token: number of the stored token, as in ``store.tokens[token]``.
        """
        number = checks.entry(token, len(self), "token", "stored tokens", HarvestError)
        window = self.context[int(self.windows[number])]
        return Example(window[window != NOTHING], int(self.positions[number]), int(self.documents[number]))

    def check(self, model: HookedTransformer) -> None:
        """Raises HarvestError, with the differences, if the store is not of this model."""
        if found := self.index.model.differences(fingerprint_of(model)):
            raise HarvestError(
                f"{self.directory} was harvested from another model: {'; '.join(found)}. Load that model, or harvest "
                "from this one."
            )

    def verify(self) -> None:
        """Reads every shard, and raises HarvestError if a byte is not what was written."""
        for shard in self._shards:
            shard.check_contents()


class ActivationStore(Store):
    """Activations of many tokens at some points, memory-mapped.

    ``store["blocks.3.hook_resid_post"]`` is an array ``[token, width]`` whose rows are read when they are asked for;
    ``store.tokens[i]``, ``store.positions[i]`` and ``store.example(i)`` say which token a row belongs to.
    """

    _FORM = ACTIVATIONS

    @classmethod
    @checks.typed
    def open(cls, directory: str | os.PathLike[str], *, partial: bool = False) -> "ActivationStore":
        """Opens a store.

        Args:
            directory: where :func:`harvest` put it.
            partial: whether a harvest that has not come to its end will do.

        Raises:
            HarvestError: there is no store, it is half-written, or a shard is missing, cut short or of another harvest.
        """
        return cls._open(directory, partial)

    def __repr__(self) -> str:
        return f"ActivationStore({len(self)} tokens, {', '.join(self.points)}, {self.dtype}, {str(self.directory)!r})"

    @property
    def points(self) -> tuple[str, ...]:
        """Stored points, in firing order."""
        return tuple(self.index.recipe["points"])

    @property
    def widths(self) -> dict[str, int]:
        """Numbers stored for a token, by point."""
        return {name: self.index.arrays[name]["width"] for name in self.points}

    @property
    def dtype(self) -> str:
        """As what activations are stored."""
        return self.index.recipe["dtype"]

    def shape(self, point: str) -> tuple[int, ...]:
        """Returns the shape of one token's activation before its axes were joined, such as ``(n_heads, d_head)``."""
        return tuple(self.index.recipe["points"][self._known(point)]["shape"])

    def __contains__(self, point: str) -> bool:
        return point in self.points

    def __getitem__(self, point: str) -> StoredArray:
        """The activations at a point, ``[token, width]``.

        Raises:
            HarvestError: it is not stored; names the nearest.
        """
        return self._array(self._known(point))

    def _known(self, point: str) -> str:
        if point not in self.points:
            raise not_stored(point, self.points)
        return point

    @functools.cached_property
    def _sums(self) -> Arrays:
        """Sums over all shards but those of products, which are read when they are asked for."""
        total: Arrays = {}
        for shard in self._shards:
            for point in self.points:
                own = {name: one for name, one in sums_of(shard.sums, point).items() if name != "products"}
                merged = merge_moments(sums_of(total, point), own)
                total |= {f"{point}/{name}": value for name, value in merged.items()}
        return total

    def statistics(self, point: str | None = None) -> Statistics:
        """Returns statistics of the stored activations at a point, which may be left out if there is only one.

        Raises:
            HarvestError: the point is not stored.
        """
        first, *others = self.points
        if point is None and others:
            raise HarvestError(f"Say of which point: {', '.join(self.points)}.")
        name = self._known(first if point is None else point)
        if not self.index.recipe["covariance"]:
            return Statistics.of(sums_of(self._sums, name))
        total: Arrays = {}
        for shard in self._shards:
            total = merge_moments(total, sums_of(shard.sums, name))
        return Statistics.of(total)

    @checks.typed
    def reader(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        points: Any = None,
        dtype: str = "float32",
        block_tokens: int | None = None,
    ) -> Reader:
        """Returns batches of tokens in a random order, each a function of the seed and the step alone.

        Args:
            batch_size: tokens of a batch.
            seed: of the order.
            shuffle: ``False`` goes through the tokens as they are stored.
            points: which of the stored points to read; ``None`` reads all.
            dtype: of the batches.
            block_tokens: shuffle within blocks of about this many tokens, which are made of stretches drawn from the
                whole store; ``None`` shuffles over all tokens. For stores larger than memory: see :class:`Reader`.

        Raises:
            HarvestError: a point is not stored.
        """
        names = one_point(self.points, points)
        arrays = {name: self[name] for name in names}
        return Reader(arrays, batch_size, seed=seed, shuffle=shuffle, dtype=dtype, block_tokens=block_tokens)
