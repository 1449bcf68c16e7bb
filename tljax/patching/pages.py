"""Plans a sweep: which patched runs go through the blocks together, and in what shapes.

A row is one patched prompt of one site. It has nothing to compute below its layer nor before its first changed
position. Rows are sorted by layer and cut into pages that fit in memory; a page starts with the rows of its lowest
layer and takes in the others as it reaches theirs, so each block runs once for all of them. Its arrays grow in a few
steps only, because every shape is a program to compile.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

_STEPS = 4
"""Most sizes, besides the largest one needed, that the pages of a sweep may have."""

_WORTH_COMPILING = 1.3
"""How much more a plan may cost that needs no new program."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a sweep, one entry each.

    Attributes:
        site: number of the site.
        prompt: which prompt of the batch.
        layer: block that the row's change enters at; the number of layers for a change of the final residual stream.
        start: first position that changes.
    """

    site: np.ndarray
    prompt: np.ndarray
    layer: np.ndarray
    start: np.ndarray

    def __len__(self) -> int:
        return len(self.site)

    def take(self, index: np.ndarray | slice) -> "Rows":
        """The rows with these numbers."""
        return Rows(self.site[index], self.prompt[index], self.layer[index], self.start[index])


@dataclasses.dataclass(frozen=True)
class PageLimits:
    """How large pages may be, and what running a block costs besides its tokens.

    Attributes:
        tokens: most tokens of a page (one row may hold more).
        rows: most rows of a page.
        overhead: cost of running one block once, in tokens: reading the weights and starting the program.
    """

    tokens: int
    rows: int
    overhead: int


@dataclasses.dataclass(frozen=True)
class Page:
    """Rows that run together.

    Attributes:
        rows: sorted by layer.
        layer: the lowest of their layers.
        sizes: for each layer from there up, the number of tokens and of rows of its arrays.
    """

    rows: Rows
    layer: int
    sizes: tuple[tuple[int, int], ...]

    def size(self, layer: int) -> tuple[int, int]:
        """Tokens and rows of the arrays at a layer."""
        return self.sizes[layer - self.layer]


def power_of_two(number: int) -> int:
    """The power of two that is not below ``number``."""
    return 1 << max(number - 1, 0).bit_length()


def size_from(number: int) -> int:
    """The smallest standard size that is not below ``number``: a power of two, or one and a half times one."""
    power = power_of_two(number)
    return power * 3 // 4 if power >= 32 and number <= power * 3 // 4 else max(power, 8)


def plan_pages(rows: Rows, end: int, top: int, limits: PageLimits, programs: "Programs | None" = None) -> list[Page]:
    """Cuts rows into pages and chooses their sizes.

    Args:
        rows: what is to run, each at a layer below ``top``.
        end: one past the last position that matters.
        top: the block to stop before.
        limits: bounds and costs.
        programs: what exists already, to use again and to add to.
    """
    if not len(rows):
        return []
    rows = rows.take(_balanced_order(rows.layer, end - rows.start))
    parts = [rows.take(cut) for cut in _cut(end - rows.start, limits)]
    needed = [_needed(part, end, top) for part in parts]
    tokens, n_rows = (np.concatenate([need[which] for need in needed]) for which in (0, 1))
    sizes = (programs or Programs()).sizes_for(tokens, n_rows, limits.overhead)
    ends = np.cumsum([len(need[0]) for need in needed])
    return [
        Page(part, int(part.layer[0]), tuple((int(t), int(r)) for t, r in own))
        for part, own in zip(parts, np.split(sizes, ends[:-1]), strict=True)
    ]


@dataclasses.dataclass
class Programs:
    """The page sizes for which programs exist: they are used again unless they cost much more than better ones.

    Attributes:
        sizes: tokens and rows.
        plans: sizes chosen before, by the work they were chosen for.
    """

    sizes: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    plans: dict[bytes, np.ndarray] = dataclasses.field(default_factory=dict)

    def sizes_for(self, tokens: np.ndarray, n_rows: np.ndarray, overhead: int) -> np.ndarray:
        """Chooses a size for each block run, ``[run, 2]``; the same work always gets the same sizes."""
        work = np.stack([tokens, n_rows]).astype(np.int64).tobytes()
        if work not in self.plans:
            chosen = _best_sizes(tokens, n_rows, overhead)
            again = _sizes_from(sorted(self.sizes), tokens, n_rows)
            if again is not None and _cost(again, overhead) <= _WORTH_COMPILING * _cost(chosen, overhead):
                chosen = again
            self.plans[work] = chosen
            self.sizes.update((int(t), int(r)) for t, r in chosen)
        return self.plans[work]


def _cost(sizes: np.ndarray, overhead: int) -> float:
    return float((sizes[:, 0] + overhead).sum())


def _balanced_order(layer: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Rows by layer, long and short ones alternating, so that pages hold about as many rows each."""
    by_length = np.lexsort((lengths, layer))
    order = []
    for rows in np.split(by_length, np.flatnonzero(np.diff(layer[by_length])) + 1):
        shuffled = np.empty_like(rows)
        shuffled[0::2] = rows[::-1][: (len(rows) + 1) // 2]
        shuffled[1::2] = rows[: len(rows) // 2]
        order.append(shuffled)
    return np.concatenate(order)


def _cut(lengths: np.ndarray, limits: PageLimits) -> list[slice]:
    cuts, start, filled = [], 0, 0
    for row, length in enumerate(lengths):
        if row > start and (filled + length > limits.tokens or row - start >= limits.rows):
            cuts.append(slice(start, row))
            start, filled = row, 0
        filled += int(length)
    return [*cuts, slice(start, len(lengths))]


def _needed(rows: Rows, end: int, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and rows of a page at each layer from its lowest to ``top``."""
    n_rows = np.searchsorted(rows.layer, np.arange(int(rows.layer[0]), top), side="right")
    return np.cumsum(end - rows.start)[n_rows - 1], n_rows


def _best_sizes(tokens: np.ndarray, n_rows: np.ndarray, overhead: int) -> np.ndarray:
    """The few standard sizes in which these block runs cost least, ``[run, 2]``."""
    *lower, largest = sorted({size_from(int(number)) for number in tokens})
    lower = lower if len(lower) <= 12 else lower[:: -(-len(lower) // 12)]
    choices = (
        np.asarray((*chosen, largest))
        for count in range(min(_STEPS, len(lower)) + 1)
        for chosen in itertools.combinations(lower, count)
    )
    steps = min(choices, key=lambda steps: float((steps[np.searchsorted(steps, tokens)] + overhead).sum()))
    taken = np.searchsorted(steps, tokens)
    rows = np.asarray([size_from(int(n_rows[taken == step].max(initial=1))) for step in range(len(steps))])
    return np.stack([steps[taken], rows[taken]], axis=1)


def _sizes_from(known: Sequence[tuple[int, int]], tokens: np.ndarray, n_rows: np.ndarray) -> np.ndarray | None:
    """The smallest known size for each block run, ``[run, 2]``; ``None`` if some fit none."""
    sizes = []
    for number, count in zip(tokens, n_rows, strict=True):
        fitting = next((size for size in known if size[0] >= number and size[1] >= count), None)
        if fitting is None:
            return None
        sizes.append(fitting)
    return np.asarray(sizes)


@dataclasses.dataclass(frozen=True)
class PageLayout:
    """Index arrays of a page at one layer.

    Attributes:
        rows: the rows that have entered.
        n_rows: rows of the arrays, padding included.
        row: ``[token]``, the row each packed token belongs to (the last row for padding).
        pos: ``[token]``, its position.
        is_real: ``[token]``, ``False`` at padding.
        source: ``[token]``, the base token at that place, ``prompt * frame + pos``.
        prompt: ``[row]``, the prompt of each row.
        key_source: ``[row, frame]``: see :class:`~tljax.modules.packing.Packing`.
        query_source: ``[row, frame]``: likewise.
        last: ``[row]``, the packed token at the position that is read.
    """

    rows: Rows
    n_rows: int
    row: np.ndarray
    pos: np.ndarray
    is_real: np.ndarray
    source: np.ndarray
    prompt: np.ndarray
    key_source: np.ndarray
    query_source: np.ndarray
    last: np.ndarray

    @property
    def n_tokens(self) -> int:
        """Tokens of the arrays, padding included."""
        return len(self.row)


def lay_out(page: Page, layer: int, frame: int, end: int, read: int) -> PageLayout:
    """Works out where the tokens of a page go at a layer.

    Args:
        page: the page.
        layer: the block about to run.
        frame: number of positions of a row.
        end: one past the last position computed.
        read: the position whose packed tokens become ``last``.
    """
    n_tokens, n_rows = page.size(layer)
    rows = page.rows.take(slice(int(np.searchsorted(page.rows.layer, layer, side="right"))))
    lengths = end - rows.start
    ends = np.cumsum(lengths)
    used = int(ends[-1])
    row = np.full(n_tokens, len(rows) - 1)
    row[:used] = np.repeat(np.arange(len(rows)), lengths)
    pos = np.full(n_tokens, end - 1)
    pos[:used] = np.arange(used) - np.repeat(ends - lengths, lengths) + np.repeat(rows.start, lengths)
    prompt = np.full(n_rows, rows.prompt[-1])
    prompt[: len(rows)] = rows.prompt
    key_source = n_tokens + prompt[:, None] * frame + np.arange(frame)[None]
    key_source[row[:used], pos[:used]] = np.arange(used)
    query_source = np.where(key_source < n_tokens, key_source, 0)
    last = np.full(n_rows, used - 1)
    last[: len(rows)] = ends - end + read
    arrays = (row, pos, prompt[row] * frame + pos, prompt, key_source, query_source, last)
    row, pos, source, prompt, key_source, query_source, last = (array.astype(np.int32) for array in arrays)
    is_real = np.arange(n_tokens) < used
    return PageLayout(rows, n_rows, row, pos, is_real, source, prompt, key_source, query_source, last)
