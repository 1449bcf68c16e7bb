"""Entries of a ``PatchingResult``: which one a label means, and whether two runs' metrics make a scale."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tljax.checks import is_traced
from tljax.errors import InputError, nearest


def check_scale(clean: jax.Array, baseline: jax.Array, axes: Sequence[str]) -> None:
    """Refuses metrics of two runs that leave nothing to normalise by; traced ones are not looked at.

    Raises:
        InputError: an entry of ``clean`` equals that of ``baseline``; ``axes`` name their axes.
    """
    if is_traced(clean, baseline):
        return
    same = np.argwhere(np.asarray(clean == baseline))
    if not len(same):
        return
    if not clean.ndim:
        raise InputError(
            f"The clean and the corrupted run have the same metric ({float(clean):.4g}): nothing to normalise by."
        )
    entries = [[f"{axis} {n}" for axis, n in zip(axes, at, strict=True)] for at in same[:5]]
    raise InputError(
        f"The clean and the corrupted run have the same metric for {'; '.join(map(', '.join, entries))}: nothing "
        "to normalise by. Leave out the prompts whose corruption changes nothing."
    )


def entry_number(result: Any, axis: str, entry: int | str) -> int:
    """Returns the number of an entry along an axis of a result, given by number or by label.

    Raises:
        InputError: an axis or an entry that the result does not have.
    """
    if axis not in result.axis_names:
        raise InputError(f"No axis {axis!r}; the axes are {result.axis_names}.{nearest(axis, result.axis_names)}")
    size = result.sizes[axis]
    if isinstance(entry, str):
        texts = tuple(result.metric_names if axis == "metric" else result.labels.get(axis, ()))
        if texts.count(entry) != 1:
            found = f"{texts.count(entry)} times" if entry in texts else "not"
            raise InputError(f"{entry!r} is {found} among the labels of axis {axis!r}: give a number below {size}.")
        return texts.index(entry)
    if isinstance(entry, bool) or not isinstance(entry, int | np.integer) or not -size <= entry < size:
        raise InputError(f"Axis {axis!r} has {size} entries; there is no entry {entry!r}.")
    return int(entry)
