"""Assembles the result of a sweep from the metrics that were measured at its sites."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tljax.errors import InputError
from tljax.patching.engine.run import Measured, Reduce
from tljax.patching.result import PatchingResult


def as_result(
    measured: Measured,
    sizes: Sequence[int],
    axes: Sequence[str],
    reduce: Reduce,
    activation_name: str = "",
    labels: Mapping[str, Sequence[str]] | None = None,
    rows: Any = None,
    change: Mapping[str, np.ndarray] | None = None,
) -> PatchingResult:
    """Builds a result, with the axis of sites reshaped to ``sizes``; ``change`` holds estimates, like ``values``."""
    if reduce not in ("mean", "none"):
        raise InputError(f'reduce={reduce!r} is not one of "mean" and "none".')
    per_prompt = reduce == "none"
    if per_prompt and (single := [name for name, value in measured.baseline.items() if value.ndim == 0]):
        raise InputError(
            f'reduce="none" keeps a number for each prompt, and {single[0]!r} returns one for all. Index all '
            "prompts, logits[:, -1, token], instead of logits[0, -1, token]."
        )

    def shaped(arrays: Mapping[str, np.ndarray], sizes: Sequence[int] | None) -> jax.Array:
        kept = []
        for array in arrays.values():
            array = array if sizes is None else array.reshape(*sizes, *array.shape[1:])
            has_batch = array.ndim > (0 if sizes is None else len(sizes))
            kept.append(array.mean(axis=-1) if has_batch and not per_prompt else array)
        return jax.device_put(np.stack(kept) if measured.several else kept[0])

    names = (*(("metric",) if measured.several else ()), *axes, *(("batch",) if per_prompt else ()))
    return PatchingResult(
        shaped(measured.values, sizes),
        names,
        shaped(measured.baseline, None),
        None if measured.clean is None else shaped(measured.clean, None),
        tuple(measured.values) if measured.several else ("metric",),
        activation_name,
        labels or {},
        rows,
        measured.report,
        None if change is None else shaped(change, sizes),
    )
