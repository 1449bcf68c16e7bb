"""``harvest``: activations of many prompts at many points, to disk."""

import functools
import itertools
import os
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import numpy as np

from tljax import checks
from tljax.errors import HarvestError, InputError
from tljax.harvest.collecting import Activations, Collector, row_bytes
from tljax.harvest.dividing import Course, Division, PartWriter, begin_together, run_divided, up_to
from tljax.harvest.documents import Prompts, Reading
from tljax.harvest.index import ACTIVATIONS, FILE
from tljax.harvest.points import read_points
from tljax.harvest.running import check_room, new_index, run, skip_harvested
from tljax.harvest.store import ActivationStore
from tljax.harvest.windows import (
    Separator,
    Short,
    no_windows,
    read_cutting,
    read_skipped,
    window_batches,
)
from tljax.harvest.writing import ShardWriter
from tljax.model.hooked_transformer import HookedTransformer

StoredDtype = Literal["bfloat16", "float16", "float32"]
SHARD_BYTES = 2**28


class HarvestOptions(TypedDict, total=False):
    """What prompts are cut into, and how they are run and stored; documented at :func:`harvest`."""

    batch_size: int
    context_size: int | None
    packed: bool
    prepend_bos: bool | None
    separator: Separator
    short: Short
    field: str
    text_separator: str | None
    limit: int | None
    skip_special: Any
    shard_bytes: int
    resume: bool
    progress: bool | None


def to_disk(
    form: str,
    model: HookedTransformer,
    prompts: Prompts,
    collector: Collector,
    directory: Path,
    *,
    batch_size: int = 8,
    context_size: int | None = None,
    packed: bool = True,
    prepend_bos: bool | None = None,
    separator: Separator = None,
    short: Short = "pad",
    field: str = "text",
    text_separator: str | None = None,
    limit: int | None = None,
    skip_special: Any = False,
    shard_bytes: int = SHARD_BYTES,
    resume: bool = True,
    progress: bool | None = None,
) -> None:
    """Harvests what a collector keeps; options are those of :func:`harvest`."""
    cutting = read_cutting(
        model, prompts, context_size=context_size, packed=packed, prepend_bos=prepend_bos, separator=separator,
        short=short,
    )  # fmt: skip
    reading = Reading(field, text_separator)
    size = checks.whole(batch_size, "batch_size", at_least=1)
    wanted = None if limit is None else checks.whole(limit, "limit", at_least=1)
    skipped = read_skipped(model, skip_special)
    a_batch = size * cutting.context_size * row_bytes(collector)
    per_shard = max(1, checks.whole(shard_bytes, "shard_bytes", at_least=1) // a_batch)
    recipe = {
        **vars(cutting), "batch_size": size, "batches_per_shard": per_shard, "limit": wanted,
        "skip_special": list(skipped), **reading._asdict(),
    }  # fmt: skip
    start = new_index(form, model, collector, recipe)
    tokens = wanted if cutting.form != "rows" else min(wanted or np.size(prompts), np.size(prompts))
    if tokens is not None and not (directory / FILE).is_file():
        check_room(directory, tokens * row_bytes(collector), f"{tokens} tokens")
    batches = window_batches(model, prompts, cutting, reading, size)
    if (first := next(batches, None)) is None:
        raise no_windows(cutting)
    batches = itertools.chain([first], batches)
    division = Division.of(model)
    index, parts = begin_together(division, directory, start, resume, first, wanted)
    skip_harvested(index, batches, directory)
    if not index.complete and (parts or division.n_processes > 1):
        left = batches if wanted is None else up_to(batches, skipped, wanted - index.counts["tokens"])
        course = Course(left, division, parts, per_shard * size)
        writer = PartWriter(directory, collector, index, per_shard, per_shard * size)
        run_divided(model, course, writer, division, skipped, progress)
    elif not index.complete:
        run(model, batches, ShardWriter(directory, collector, index, per_shard, wanted), skipped, progress)
    elif wanted is None and next(batches, None) is not None:
        raise HarvestError(
            f"{directory} was harvested from other prompts: they ended after {index.counts['windows']} windows, and "
            "these go on. Use another directory, or the same prompts."
        )


@functools.partial(checks.typed, receiver=to_disk)
def harvest(
    model: HookedTransformer,
    prompts: Prompts,
    points: Any,
    directory: str | os.PathLike[str],
    *,
    max_norm_ratio: float | None = None,
    dtype: StoredDtype = "bfloat16",
    covariance: bool = False,
    **options: Unpack[HarvestOptions],
) -> ActivationStore:
    """Runs prompts through a model, and stores the activations at some points.

    One forward pass a batch gives all points; it stops at the last of them. A thread writes while the model runs.
    Shards are written whole or not at all. A call that was killed and is made again with the same arguments goes on,
    and leaves the same bytes as one that was not; it reads the prompts from their beginning, and checks that they
    are the same.

    Where ``jax.distributed`` connects several processes, all of them make the same call, with a directory that they
    share: each writes shards of its own, and the store has the bytes that one process would write.

    Args:
        model: the model; interventions that it carries apply.
        prompts: a text, an iterable of texts, of paths of ``.txt`` and ``.jsonl`` files, or of lists of token ids; a
            function that returns one; or an array of token ids ``[row, pos]``, whose rows are run as they are.
        points: hook points that have a position axis: a name, several, or a predicate. The axes after it are stored as
            one, heads in order.
        directory: an empty or new directory, or the one of a call that was interrupted.
        batch_size: windows that run at once. Part of the result: other batches may round otherwise.
        context_size: tokens of a window, special ones included; ``None`` means 128, or the length of an array's rows.
        packed: join documents, with ``separator`` between them, and cut windows from that; what remains at the end is
            left out. ``False`` cuts each document alone.
        prepend_bos: whether every window starts with BOS; ``None`` means ``cfg.default_prepend_bos``.
        separator: between packed documents: ``"bos"``, ``"eos"``, ``"none"`` or an id; ``None`` means BOS where windows
            start with it, or else EOS if there is one. A BOS that would follow the window's own is left out.
        short: with ``packed=False``, whether windows shorter than ``context_size`` are padded (padding is not stored)
            or dropped.
        field: the key of a ``.jsonl`` file's lines that holds the text, or token ids.
        text_separator: what stands between documents of a ``.txt`` file, such as ``"<|endoftext|>"``; ``None`` means
            that the file is one document.
        limit: stop after the batch that brings the stored tokens to this number.
        skip_special: leave out the activations of BOS, EOS and padding tokens, or of the tokens with these ids. They
            are still run.
        max_norm_ratio: leave out a token whose norm, at any of the points, is more than this many times the median of
            its batch (10 takes away massive activations, such as the first token's).
        dtype: of the stored activations; statistics are of the stored values.
        covariance: also sum up products of all pairs of entries, ``d * d`` numbers a shard.
        shard_bytes: about how large a file is. A killed harvest loses at most one.
        resume: go on with what the directory holds; ``False`` refuses a directory that holds a harvest.
        progress: whether to show a bar with tokens a second; ``None`` shows one after three seconds.

    Returns:
        The store.

    Raises:
        InputError: prompts that cannot be read, or an option out of range.
        UnknownHookError: a point is unknown.
        HarvestError: the directory holds something else or another harvest (says what differs); an activation is not
            finite; the disk is full, or too small for ``limit`` tokens (before anything runs).

    Compiles nothing that a forward pass does not, but for one program a set of shapes.
    """
    found = read_points(model, points)
    if max_norm_ratio is not None and not max_norm_ratio > 0:
        raise InputError(f"max_norm_ratio={max_norm_ratio} must be positive, such as 10.")
    collector = Activations(found, dtype, max_norm_ratio, covariance)
    to_disk(ACTIVATIONS, model, prompts, collector, Path(directory), **options)
    return ActivationStore.open(directory)
