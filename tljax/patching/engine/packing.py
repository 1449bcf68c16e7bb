"""Plans a sweep: which patched runs go through the blocks together, and in what shapes.

A row is one patched prompt of one site. It has nothing to compute below its layer or before its first changed position.
Rows are sorted by layer and cut into packed batches that fit in memory, with the rows' suffixes end to end and no
padding between them. A batch starts with the rows of its lowest layer and adds the others when it reaches their layers,
so each block runs once for all of them. Its arrays grow in few steps, because every shape is a program to compile.

On a mesh that spreads prompts, rows are dealt to as many lanes as there are groups of devices, and each group computes
its own lane: a packed batch is ``[lane, token]``, with one lane on one device.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tljax.sizes import packed_size

_WORTH_COMPILING = 0.05, 0.5e9
"""The least that a new program has to save: this share of a plan's cost, and this many FLOPs."""

_MOST_PLANS = 64
"""Number of plans remembered, so that repeating a sweep compiles nothing."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a sweep; each attribute has one entry for each row.

    Attributes:
        site: number of the site.
        prompt: which prompt of the batch.
        layer: block that the row's change enters at; ``n_layers`` for a change of the final residual stream.
        start: first position that changes.
    """

    site: np.ndarray
    prompt: np.ndarray
    layer: np.ndarray
    start: np.ndarray

    def __len__(self) -> int:
        return len(self.site)

    def take(self, index: np.ndarray | slice) -> "Rows":
        """Returns the rows with these numbers."""
        return Rows(self.site[index], self.prompt[index], self.layer[index], self.start[index])

    def below(self, layer: int) -> "Rows":
        """Returns the rows that have entered at a layer; rows are sorted by layer."""
        return self.take(slice(int(np.searchsorted(self.layer, layer, side="right"))))


def joined(parts: Sequence[Rows]) -> Rows:
    """Returns the rows of all parts, one part after the other."""
    names = [field.name for field in dataclasses.fields(Rows)]
    return Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclasses.dataclass(frozen=True)
class BatchLimits:
    """How large packed batches may be.

    Attributes:
        tokens: most tokens of a lane of a packed batch (one row may hold more).
        rows: most rows of a lane.
        lanes: number of lanes.
        filled: how many of them get rows.
    """

    tokens: int
    rows: int
    lanes: int = 1
    filled: int = 1


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Rows that run together.

    Attributes:
        lanes: the rows of each lane, sorted by layer; a lane may have none.
        layer: the lowest of their layers.
        sizes: for each layer from there up, the number of tokens and of rows of a lane's arrays.
    """

    lanes: tuple[Rows, ...]
    layer: int
    sizes: tuple[tuple[int, int], ...]

    def size(self, layer: int) -> tuple[int, int]:
        """Returns the number of tokens and of rows of the arrays at a layer."""
        return self.sizes[layer - self.layer]

    @property
    def n_rows(self) -> int:
        """Number of rows in all lanes."""
        return sum(map(len, self.lanes))


class BlockRun(NamedTuple):
    """One run of a block, or the size of a program for it.

    Attributes:
        tokens: packed tokens of a lane.
        rows: rows they belong to.
        narrow: whether the block computes the output of one token a row only.
    """

    tokens: int
    rows: int
    narrow: bool

    def holds(self, run: "BlockRun") -> bool:
        """Whether a program of this size can do ``run``."""
        return self.tokens >= run.tokens and self.rows >= run.rows and self.narrow == run.narrow


def plan_batches(
    rows: Rows, end: int, layers: tuple[int, int | None], limits: BatchLimits, programs: "Programs"
) -> list[PackedBatch]:
    """Cuts rows into packed batches and chooses their sizes.

    Args:
        rows: the rows to run, each entering below the block to stop before.
        end: one past the last position that matters.
        layers: the block to stop before, and the block that computes only one token a row, if any.
        limits: largest sizes of a packed batch.
        programs: the programs that exist, which are used again and added to.
    """
    if not len(rows):
        return []
    none, lanes = rows.take(slice(0)), []
    for lane in _deal(rows, end, limits.filled):
        ordered = lane.take(_balanced_order(lane.layer, end - lane.start))
        lanes.append([ordered.take(cut) for cut in _cut(end - ordered.start, limits)])
    lanes += [[]] * (limits.lanes - len(lanes))
    pages = list(itertools.zip_longest(*lanes, fillvalue=none))
    needed = [_needed(page, end, *layers) for page in pages]
    sizes = iter(programs.sizes_for([run for runs in needed for run in runs]))
    return [
        PackedBatch(page, layers[0] - len(runs), tuple(next(sizes)[:2] for _ in runs))
        for page, runs in zip(pages, needed, strict=True)
    ]


@dataclasses.dataclass
class Programs:
    """The sizes for which programs exist. A new size is added only if it saves enough of a plan's cost.

    Attributes:
        cost: function from a size to the cost of running a block, in FLOPs.
        sizes: sizes run so far.
    """

    cost: Callable[[BlockRun], float]
    sizes: set[BlockRun] = dataclasses.field(default_factory=set)

    def __post_init__(self) -> None:
        self._kept = functools.lru_cache(_MOST_PLANS)(self._choose)

    def sizes_for(self, runs: Sequence[BlockRun]) -> list[BlockRun]:
        """Chooses a size for each block run; runs that came before get the sizes they got then."""
        return self._kept(tuple(runs))

    def _choose(self, runs: tuple[BlockRun, ...]) -> list[BlockRun]:
        chosen = self._cheapest(runs)
        self.sizes.update(chosen)
        return chosen

    def _cheapest(self, runs: Sequence[BlockRun]) -> list[BlockRun]:
        """Returns a size for each run: an existing one, or a new one while adding it saves enough."""
        known = sorted(self.sizes)
        sizes = [*known, *_candidates(runs)]
        costs = np.asarray([[self.cost(size) if size.holds(run) else np.inf for run in runs] for size in sizes])
        share, least = _WORTH_COMPILING
        worth = max(share * costs.min(axis=0).sum(), least)
        taken = list(range(len(known)))
        best = costs[taken].min(axis=0, initial=np.inf)
        while True:
            with_one = np.minimum(best, costs)
            rank = np.isinf(with_one).sum(axis=1), np.where(np.isinf(with_one), 0, with_one).sum(axis=1)
            new = int(np.lexsort(rank[::-1])[0])
            if np.isfinite(best).all() and best.sum() - rank[1][new] <= worth:
                break
            taken.append(new)
            best = with_one[new]
        return [sizes[taken[number]] for number in costs[taken].argmin(axis=0)]


def _candidates(runs: Sequence[BlockRun]) -> list[BlockRun]:
    """Returns standard sizes that fit some of the runs."""
    sizes = []
    for narrow in (False, True):
        kind = [run for run in runs if run.narrow == narrow]
        for tokens in sorted({packed_size(run.tokens) for run in kind}):
            sizes.append(BlockRun(tokens, packed_size(max(run.rows for run in kind if run.tokens <= tokens)), narrow))
    return sizes


def _deal(rows: Rows, end: int, lanes: int) -> list[Rows]:
    """Deals rows to lanes, so that each has about the same work to do at every layer; no lane is empty.

    Rows are sorted by layer and length and dealt forth and back, so that lanes differ by one row at most.
    """
    lanes = min(lanes, len(rows))
    order = np.lexsort((end - rows.start, rows.layer))
    turn, place = np.divmod(np.arange(len(rows)), lanes)
    lane = np.where(turn % 2, lanes - 1 - place, place)
    return [rows.take(np.sort(order[lane == number])) for number in range(lanes)]


def _balanced_order(layer: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Orders rows by layer, alternating long and short ones so that packed batches hold about equally many rows."""
    by_length = np.lexsort((lengths, layer))
    order = []
    for rows in np.split(by_length, np.flatnonzero(np.diff(layer[by_length])) + 1):
        shuffled = np.empty_like(rows)
        shuffled[0::2] = rows[::-1][: (len(rows) + 1) // 2]
        shuffled[1::2] = rows[: len(rows) // 2]
        order.append(shuffled)
    return np.concatenate(order)


def _cut(lengths: np.ndarray, limits: BatchLimits) -> list[slice]:
    cuts, start, filled = [], 0, 0
    for row, length in enumerate(lengths):
        if row > start and (filled + length > limits.tokens or row - start >= limits.rows):
            cuts.append(slice(start, row))
            start, filled = row, 0
        filled += int(length)
    return [*cuts, slice(start, len(lengths))]


def _needed(lanes: Sequence[Rows], end: int, top: int, narrow: int | None) -> list[BlockRun]:
    """Returns the block runs of a packed batch from its lowest layer to ``top``, as large as the largest lane needs."""
    layers = range(min(int(lane.layer[0]) for lane in lanes if len(lane)), top)
    n_rows = [np.searchsorted(lane.layer, layers, side="right") for lane in lanes]
    tokens = [np.append(0, np.cumsum(end - lane.start))[n] for lane, n in zip(lanes, n_rows, strict=True)]
    largest = zip(np.max(tokens, axis=0), np.max(n_rows, axis=0), layers, strict=True)
    return [BlockRun(int(t), int(r), layer == narrow) for t, r, layer in largest]


class PackedTokens(NamedTuple):
    """Some packed tokens, each attribute ``[lane, token]``.

    Attributes:
        row: the token's row, its number in ``BatchLayout.rows``.
        prompt: its prompt.
        pos: its position.
        source: the base run's token at the same prompt and position, ``prompt * padded_length + pos``.
        is_real: ``False`` at padding, whose other attributes are those of some real token.
    """

    row: np.ndarray
    prompt: np.ndarray
    pos: np.ndarray
    source: np.ndarray
    is_real: np.ndarray


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """Index arrays of a packed batch at one layer. Tokens and rows are counted in their lane.

    Attributes:
        rows: the rows that have entered, lane after lane.
        number: ``[lane, row]``, number of each row in ``rows`` (that of the lane's last row for padding).
        is_row: ``[lane, row]``, ``False`` at padding.
        row: ``[lane, token]``, the row each packed token belongs to (the last row for padding).
        pos: ``[lane, token]``, its position.
        is_real: ``[lane, token]``, ``False`` at padding.
        source: ``[lane, token]``, the base run's token at the same prompt and position.
        prompt: ``[lane, row]``, the prompt of each row.
        key_source, query_source: ``[lane, row, padded_pos]``, as in :class:`~tljax.modules.packing.Packing`.
        last: ``[lane, row]``, the packed token at the position that is read.
    """

    rows: Rows
    number: np.ndarray
    is_row: np.ndarray
    row: np.ndarray
    pos: np.ndarray
    is_real: np.ndarray
    source: np.ndarray
    prompt: np.ndarray
    key_source: np.ndarray
    query_source: np.ndarray
    last: np.ndarray

    @property
    def lanes(self) -> int:
        """Number of lanes."""
        return self.row.shape[0]

    @property
    def n_tokens(self) -> int:
        """Number of tokens of a lane's arrays, padding included."""
        return self.row.shape[1]

    @property
    def n_rows(self) -> int:
        """Number of rows of a lane's arrays, padding included."""
        return self.number.shape[1]

    @property
    def entered(self) -> np.ndarray:
        """Number of tokens of each lane, ``[lane]``, without padding."""
        return self.is_real.sum(axis=1)

    def tokens(self, last: bool) -> PackedTokens:
        """Returns the packed tokens, or only those that are read, one for each row."""
        every = self.by_token(self.number), self.by_token(self.prompt), self.pos, self.source, self.is_real
        return PackedTokens(*(np.take_along_axis(one, self.last, axis=1) if last else one for one in every))

    def by_token(self, values: np.ndarray) -> np.ndarray:
        """Returns for each packed token what ``values`` ``[lane, row]`` has for its row."""
        return np.take_along_axis(values, self.row, axis=1)


def lay_out(packed: PackedBatch, layer: int, padded_length: int, end: int, read: int) -> BatchLayout:
    """Computes the index arrays of a packed batch at a layer.

    Args:
        packed: the packed batch.
        layer: the block about to run.
        padded_length: number of positions of a row.
        end: one past the last position computed.
        read: the position whose packed tokens become ``last``.
    """
    size, lanes = packed.size(layer), [lane.below(layer) for lane in packed.lanes]
    before = np.cumsum([0, *map(len, lanes)])
    arrays = [
        _lay_out_lane(lane, int(first), size, padded_length, end, read)
        for lane, first in zip(lanes, before[:-1], strict=True)
    ]
    return BatchLayout(joined(lanes), *(np.stack(parts) for parts in zip(*arrays, strict=True)))


def _lay_out_lane(
    rows: Rows, first: int, size: tuple[int, int], padded_length: int, end: int, read: int
) -> tuple[np.ndarray, ...]:
    """Returns the arrays of one lane, in the order of :class:`BatchLayout`; ``first`` is the number of its first row.

    Padding repeats the last row. A lane without rows repeats the first row of all and its first prompt.
    """
    n_tokens, n_rows = size
    lengths = end - rows.start
    ends = np.cumsum(lengths)
    used, count = int(lengths.sum()), len(rows)
    number = np.minimum(first + np.arange(n_rows), first + count - 1) if count else np.zeros(n_rows, int)
    row = np.full(n_tokens, max(count - 1, 0))
    row[:used] = np.repeat(np.arange(count), lengths)
    pos = np.full(n_tokens, end - 1)
    pos[:used] = np.arange(used) - np.repeat(ends - lengths, lengths) + np.repeat(rows.start, lengths)
    prompt = np.full(n_rows, rows.prompt[-1] if count else 0)
    prompt[:count] = rows.prompt
    key_source = n_tokens + prompt[:, None] * padded_length + np.arange(padded_length)[None]
    key_source[row[:used], pos[:used]] = np.arange(used)
    query_source = np.where(key_source < n_tokens, key_source, 0)
    last = np.full(n_rows, max(used - 1, 0))
    last[:count] = ends - end + read
    is_row, is_real = np.arange(n_rows) < count, np.arange(n_tokens) < used
    row, pos, source, prompt, key_source, query_source, last = (
        array.astype(np.int32)
        for array in (row, pos, prompt[row] * padded_length + pos, prompt, key_source, query_source, last)
    )
    return number, is_row, row, pos, is_real, source, prompt, key_source, query_source, last
