"""Which token of one prompt belongs to which token of another, where the two differ in length."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from tljax.checks import is_traced, typed
from tljax.errors import InputError
from tljax.text.batch import Batch
from tljax.text.positions import find, no_such_position, ranks

_NOTHING = -1
"""What stands where a token has no counterpart."""

_Anchor = tuple[int, int, int, int]
"""Start and stop of a labelled part in the base prompt, and in the source prompt."""


@typed
def align(
    base: Any,
    source: Any,
    *,
    spans: Mapping[str, Any] | None = None,
    source_spans: Mapping[str, Any] | None = None,
    method: Literal["auto", "position", "tokens"] = "auto",
) -> Int[np.ndarray, "batch pos"]:
    """Returns for each token of the base prompts the position of its counterpart in the source prompts.

    With ``"auto"``, two prompts of equally many tokens are matched position by position. Otherwise labelled parts are
    matched with each other, from their last tokens backwards; what stands between them is matched one to one if it has
    equally many tokens on both sides, and else by tokens. ``"tokens"`` leaves the labels and lengths out.

    By tokens: a longest common subsequence of the two prompts is matched (the earliest, of several), and between two
    matched tokens what was replaced by equally many others is matched one to one. An inserted token has no counterpart.

    Args:
        base: the prompts that are asked about: a ``Batch``, or token ids ``[batch, pos]`` or ``[pos]``.
        source: as many prompts, of any lengths.
        spans: labelled parts of the base prompts: for each label ``[batch, 2]``, first position and the one after the
            last, or ``[batch]`` for single tokens, counted in each prompt's text; negative where a prompt lacks it.
        source_spans: the same labels in the source prompts. A part that one of two prompts lacks is left out.
        method: ``"position"`` takes prompts of equal lengths only.

    Returns:
        ``[batch, pos]``, int32, -1 at tokens without a counterpart and at padding. Rows and columns are those of the
        base's array, padding included, and the numbers in it index the source's array in the same way, so that
        ``np.take_along_axis(source_tokens, aligned, axis=1)`` is right wherever ``aligned >= 0``.

    Raises:
        InputError: different numbers of prompts, labels that differ, positions that a prompt lacks, parts that overlap
            or stand in another order; or lengths that differ with ``"position"``.

    >>> align([[5, 6, 7, 8]], [[5, 9, 9, 7, 8]])
    array([[ 0, -1,  3,  4]], dtype=int32)
    """
    sides = [_rows(prompts, name) for prompts, name in ((base, "base"), (source, "source"))]
    (rows, places, width), (others, other_places, _) = sides
    if len(rows) != len(others):
        raise InputError(f"There are {len(rows)} base prompts and {len(others)} source prompts: align them in pairs.")
    labels = _labels(spans, source_spans)
    bounds = [_bounds(spans, labels, rows, "spans"), _bounds(source_spans, labels, others, "source_spans")]
    aligned = np.full((len(rows), width), _NOTHING, np.int32)
    for number, (row, other) in enumerate(zip(rows, others, strict=True)):
        if method != "tokens" and len(row) == len(other):
            pairs = ((place, place) for place in range(len(row)))
        elif method == "position":
            raise InputError(
                f"Prompt {number} has {len(row)} tokens and its source {len(other)}, so positions do not match. Leave "
                "method= out, or give labelled parts, spans= and source_spans=."
            )
        else:
            parts = [one[number] for one in bounds] if method == "auto" else [{}, {}]
            pairs = _matched(row, other, _anchors(parts[0], parts[1], number))
        for place, other_place in pairs:
            aligned[number, places[number][place]] = other_places[number][other_place]
    return aligned


def read_alignment(aligned: Any, text: np.ndarray, source_text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Checks which source token stands for each base token: what :func:`align` returned, or was written by hand.

    Args:
        aligned: for each entry of the base's array ``[batch, pos]`` the entry of the source's array, or -1; ``None``
            for texts of equal lengths, which are matched position by position, whatever side their padding is on.
        text: which entries of the base's array are text, ``[batch, pos]``.
        source_text: which of the source's are, ``[batch, source_pos]``.

    Returns:
        Two arrays ``[batch, pos]``: where the value of each entry stands in the source's array, and which entries keep
        their own value, for which the first is 0.

    Raises:
        InputError: lengths that differ without an alignment, another shape or dtype, or an entry that is no token.
    """
    if aligned is None:
        lengths = text.sum(axis=1), source_text.sum(axis=1)
        if (different := np.flatnonzero(lengths[0] != lengths[1])).size:
            row = int(different[0])
            raise InputError(
                f"Prompt {row} has {lengths[0][row]} tokens, its source {lengths[1][row]}. Say which token stands for "
                "which: align=tljax.text.align(prompt, source), or compare model.to_str_tokens(prompt) and (source)."
            )
        own = np.zeros(text.shape, bool)
        if text.shape == source_text.shape and (text == source_text).all():
            return np.broadcast_to(np.arange(text.shape[1]), text.shape), own
        return find(source_text, np.maximum(ranks(text), 0))[0], own
    numbers = np.asarray(aligned)
    if numbers.shape != text.shape or numbers.dtype.kind not in "iu":
        raise InputError(
            f"align= has shape {numbers.shape} and dtype {numbers.dtype}; give whole numbers {text.shape}, one for "
            "each entry of the base prompts' array: a source position, or -1."
        )
    own = ~text | (numbers < 0)
    places = np.where(own, 0, numbers)
    wrong = (numbers < _NOTHING) | (places >= source_text.shape[1])
    wrong |= ~own & ~np.take_along_axis(source_text, np.minimum(places, source_text.shape[1] - 1), axis=1)
    if (wrong & text).any():
        row, pos = (int(n) for n in np.argwhere(wrong & text)[0])
        raise InputError(
            f"align= holds {numbers[row, pos]} at [{row}, {pos}], which is no token of source prompt {row}: it has "
            f"{int(source_text[row].sum())} in an array of {source_text.shape[1]}."
        )
    return places, own


def _rows(prompts: Any, name: str) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """Returns the ids of each prompt without padding, their places in the array, and its width."""
    if is_traced(prompts):
        raise InputError(f"{name}= is traced: align looks at the tokens, so call it outside jax.jit.")
    if isinstance(prompts, Batch):
        prompts.check()
        tokens, mask = np.asarray(prompts.tokens), np.asarray(prompts.mask)
    else:
        try:
            tokens = np.atleast_2d(np.asarray(prompts))
        except ValueError as error:
            raise InputError(f"{name}= has rows of different lengths: pass model.to_batch(rows).") from error
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.size:
            raise InputError(
                f"{name}= must be a Batch, or token ids [batch, pos]; got {type(prompts).__name__} of shape "
                f"{tokens.shape}, dtype {tokens.dtype}. model.to_batch(texts) makes a Batch of texts."
            )
        mask = np.ones(tokens.shape, bool)
    places = [np.flatnonzero(row) for row in mask]
    return [row[own] for row, own in zip(tokens, places, strict=True)], places, tokens.shape[1]


def _labels(spans: Mapping[str, Any] | None, source_spans: Mapping[str, Any] | None) -> list[str]:
    if (spans is None) != (source_spans is None):
        raise InputError("Labelled parts are matched between the two prompts: give both spans= and source_spans=.")
    one, other = dict(spans or {}), dict(source_spans or {})
    if lone := sorted(set(one) ^ set(other)):
        raise InputError(f"spans= and source_spans= must have the same labels; only one of them has {', '.join(lone)}.")
    return list(one)


def _bounds(
    spans: Mapping[str, Any] | None, labels: Sequence[str], rows: Sequence[np.ndarray], name: str
) -> list[dict[str, tuple[int, int]]]:
    """Returns for each prompt the parts that it has, by label, after checking them."""
    found: list[dict[str, tuple[int, int]]] = [{} for _ in rows]
    for label in labels:
        given = np.asarray((spans or {})[label])
        given = np.stack([given, given + (given >= 0)], axis=-1) if given.ndim == 1 else given
        if given.dtype.kind not in "iu" or given.shape != (len(rows), 2):
            raise InputError(
                f"{name}[{label!r}] must be whole numbers [{len(rows)}, 2], or [{len(rows)}] for single tokens; got "
                f"shape {given.shape}, dtype {given.dtype}."
            )
        for number, (start, stop) in enumerate(given.tolist()):
            if start < 0:
                continue
            if stop > len(rows[number]):
                raise InputError(f"{name}[{label!r}]: {no_such_position(number, stop - 1, len(rows[number]))}")
            if start >= stop:
                raise InputError(f"{name}[{label!r}] of prompt {number} is {start} to {stop}, which is empty.")
            found[number][label] = start, stop
    return found


def _anchors(
    parts: Mapping[str, tuple[int, int]], source_parts: Mapping[str, tuple[int, int]], number: int
) -> list[_Anchor]:
    """Returns the parts that both prompts have, in their order; one inside another in both prompts is left out."""
    both = [(label, (*parts[label], *source_parts[label])) for label in parts if label in source_parts]
    both.sort(key=lambda one: (one[1][0], -one[1][1], one[1][2], -one[1][3]))
    kept: list[tuple[str, _Anchor]] = []
    for label, anchor in both:
        if kept:
            last, (_, stop, start, source_stop) = kept[-1]
            within = anchor[1] <= stop and start <= anchor[2] and anchor[3] <= source_stop
            if within:
                continue
            if anchor[0] < stop or anchor[2] < source_stop:
                raise InputError(
                    f"In prompt {number} the parts {last!r} and {label!r} overlap, or stand in another order than in "
                    "its source. Leave one of the two labels out."
                )
        kept.append((label, anchor))
    return [anchor for _, anchor in kept]


def _matched(row: np.ndarray, other: np.ndarray, anchors: list[_Anchor]) -> Iterator[tuple[int, int]]:
    """Yields matched positions of two prompts: between the labelled parts, and in them."""
    start, source_start = 0, 0
    for begin, stop, source_begin, source_stop in [*anchors, (len(row), len(row), len(other), len(other))]:
        between, source_between = row[start:begin], other[source_start:source_begin]
        if anchors and len(between) == len(source_between):
            pairs = [(place, place) for place in range(len(between))]
        else:
            pairs = _by_tokens(between, source_between)
        yield from ((start + place, source_start + other_place) for place, other_place in pairs)
        common = min(stop - begin, source_stop - source_begin)
        yield from ((stop - common + step, source_stop - common + step) for step in range(common))
        start, source_start = stop, source_stop


def _by_tokens(row: np.ndarray, other: np.ndarray) -> list[tuple[int, int]]:
    """Matches a longest common subsequence, and one to one what was replaced by equally many tokens."""
    pairs: list[tuple[int, int]] = []
    start, source_start = 0, 0
    for place, other_place in [*_common(row, other), (len(row), len(other))]:
        if place - start == other_place - source_start:
            pairs += [(start + step, source_start + step) for step in range(place - start)]
        pairs += [(place, other_place)] if place < len(row) and other_place < len(other) else []
        start, source_start = place + 1, other_place + 1
    return pairs


def _common(row: np.ndarray, other: np.ndarray) -> list[tuple[int, int]]:
    """Returns the positions of a longest common subsequence of two rows: of several, the earliest."""
    left = np.zeros((len(row) + 1, len(other) + 1), np.int32)
    """The longest from each pair of positions on."""
    for place in range(len(row) - 1, -1, -1):
        taken = left[place + 1, 1:] + (other == row[place])
        best = np.maximum(left[place + 1, :-1], taken)
        left[place, :-1] = np.maximum.accumulate(best[::-1])[::-1]
    found, place, other_place = [], 0, 0
    while place < len(row) and other_place < len(other):
        if row[place] == other[other_place]:
            found.append((place, other_place))
            place, other_place = place + 1, other_place + 1
        elif left[place, other_place + 1] >= left[place + 1, other_place]:
            other_place += 1
        else:
            place += 1
    return found
