"""Plans a sweep: which suffixes run together, from which layer, in programs of a fixed shape.

A row is one patched prompt of one site. It has nothing to compute below its layer nor before its first changed
position. Rows are sorted by layer and cut into pages of a fixed number of tokens and rows; a page runs from the lowest
layer of its rows to the top, so pages that span few layers waste little, and pages that hold many tokens read the
weights fewer times. The page size that costs least is chosen.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np


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

    def take(self, index: np.ndarray) -> "Rows":
        """The rows with these numbers."""
        return Rows(self.site[index], self.prompt[index], self.layer[index], self.start[index])


@dataclasses.dataclass(frozen=True)
class Page:
    """Rows that run together, from ``layer`` up, padded to ``n_tokens`` tokens and ``n_rows`` rows."""

    rows: Rows
    layer: int
    n_tokens: int
    n_rows: int


@dataclasses.dataclass(frozen=True)
class PageLimits:
    """How large pages may be, and what a page costs besides its tokens.

    Attributes:
        tokens: most tokens of a page (one row may hold more).
        rows: most rows of a page.
        overhead: cost of running one block on a page, in tokens: reading the weights and starting the program.
    """

    tokens: int
    rows: int
    overhead: int


def power_of_two(number: int) -> int:
    """The power of two that is not below ``number``."""
    return 1 << max(number - 1, 0).bit_length()


def plan_pages(rows: Rows, end: int, n_layers: int, limits: PageLimits) -> list[Page]:
    """Cuts rows into the pages that cost least.

    Args:
        rows: what is to run; rows at ``n_layers`` need no block and get pages of their own.
        end: one past the last position that matters.
        n_layers: number of blocks.
        limits: bounds and costs.
    """
    if not len(rows):
        return []
    lengths = end - rows.start
    order = _balanced_order(rows.layer, lengths)
    rows, lengths = rows.take(order), lengths[order]
    largest = max(power_of_two(int(lengths.max())), power_of_two(limits.tokens + 1) // 2)
    best: list[np.ndarray] = []
    best_cost, best_size = np.inf, 0
    size = power_of_two(int(lengths.max()))
    while size <= largest:
        for split_layers in (False, True):
            cuts = list(_cut(lengths, rows.layer, size, limits.rows, split_layers))
            cost = sum((n_layers - int(rows.layer[cut[0]])) * (size + limits.overhead) for cut in cuts)
            if cost < best_cost:
                best, best_cost, best_size = cuts, cost, size
        size *= 2
    n_rows = power_of_two(max(len(cut) for cut in best))
    return [Page(rows.take(cut), int(rows.layer[cut[0]]), best_size, n_rows) for cut in best]


def _balanced_order(layer: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Rows by layer, long and short ones alternating, so that every page of a layer holds about as many rows."""
    by_length = np.lexsort((lengths, layer))
    order = []
    for rows in np.split(by_length, np.flatnonzero(np.diff(layer[by_length])) + 1):
        shuffled = np.empty_like(rows)
        shuffled[0::2] = rows[::-1][: (len(rows) + 1) // 2]
        shuffled[1::2] = rows[: len(rows) // 2]
        order.append(shuffled)
    return np.concatenate(order)


def _cut(
    lengths: np.ndarray, layer: np.ndarray, n_tokens: int, n_rows: int, split_layers: bool
) -> Iterator[np.ndarray]:
    start, filled = 0, 0
    for row, length in enumerate(lengths):
        new_layer = row > start and layer[row] != layer[row - 1] and split_layers
        if row > start and (filled + length > n_tokens or row - start >= n_rows or new_layer):
            yield np.arange(start, row)
            start, filled = row, 0
        filled += length
    yield np.arange(start, len(lengths))


@dataclasses.dataclass(frozen=True)
class PageLayout:
    """Index arrays of a page.

    Attributes:
        page: the page.
        row: ``[token]``, the row each packed token belongs to (the last row for padding).
        pos: ``[token]``, its position.
        is_real: ``[token]``, ``False`` at padding.
        source: ``[token]``, the base token at that place, ``prompt * frame + pos``.
        prompt: ``[row]``, the prompt of each row.
        key_source: ``[row, frame]``: see :class:`~tljax.modules.packing.Packing`.
        query_source: ``[row, frame]``: likewise.
        last: ``[row]``, the packed token at the position that is read.
    """

    page: Page
    row: np.ndarray
    pos: np.ndarray
    is_real: np.ndarray
    source: np.ndarray
    prompt: np.ndarray
    key_source: np.ndarray
    query_source: np.ndarray
    last: np.ndarray


def lay_out(page: Page, frame: int, end: int, read: int) -> PageLayout:
    """Works out where the tokens of a page go.

    Args:
        page: the page.
        frame: number of positions of a row.
        end: one past the last position computed.
        read: the position whose packed tokens become ``last``.
    """
    rows, n_tokens, n_rows = page.rows, page.n_tokens, page.n_rows
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
    is_real = np.arange(n_tokens) < used
    arrays = (row, pos, prompt[row] * frame + pos, prompt, key_source, query_source, last)
    row, pos, source, prompt, key_source, query_source, last = (array.astype(np.int32) for array in arrays)
    return PageLayout(page, row, pos, is_real, source, prompt, key_source, query_source, last)
