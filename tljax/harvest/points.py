"""The points that are harvested, and the run that reads them."""

import dataclasses
from typing import Any

import jax
import numpy as np

from tljax.errors import HarvestError, UnknownHookError
from tljax.harvest.windows import Windows
from tljax.hooks.names import select
from tljax.hooks.points import ENTRY, layer_of, point_table, stage_of
from tljax.model.hooked_transformer import HookedTransformer
from tljax.text.batch import Batch


@dataclasses.dataclass(frozen=True)
class Point:
    """One harvested point.

    Attributes:
        name: full hook name.
        axes: axes after ``batch`` and ``pos``, such as ``("head", "d_head")``.
        shape: their sizes; they are stored as one axis.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Numbers of one token."""
        return int(np.prod(self.shape))

    @property
    def place(self) -> str:
        """The point in words, for messages."""
        layer = layer_of(self.name)
        return self.name if layer is None else f"{self.name} (layer {layer})"


def read_points(model: HookedTransformer, points: Any) -> tuple[Point, ...]:
    """Returns the points that names stand for, in firing order.

    Raises:
        UnknownHookError: a name is unknown (names the nearest), or nothing is named.
        HarvestError: a point has no position axis, or holds whole numbers.
    """
    table = point_table(model.cfg)
    if points is None:
        raise UnknownHookError('points= is None: name what to keep, such as points=["blocks.0.hook_resid_post"].')
    found = []
    for name in select(points, table, model.cfg.n_layers):
        row = table[name]
        if row.axes[:2] != ("batch", "pos"):
            raise HarvestError(
                f"{name} has the axes {', '.join(row.axes)}: a store has one row for each token, so only points whose "
                "second axis is pos can be harvested, such as attn.hook_z or hook_resid_post."
            )
        if row.holds_numbers:
            raise HarvestError(
                f"{name} holds whole numbers; a store holds activations, and keeps token ids beside them by itself."
            )
        found.append(Point(name, row.axes[2:], row.shape()[2:]))
    return tuple(found)


def hooks_in_words(model: HookedTransformer) -> list[str]:
    """Returns a model's hooks as a store's index states them, in order."""
    forward = (entry for entry in model._hooks.entries if entry.direction == "fwd")
    return [f"{entry.name}: {type(entry.function).__name__}" for entry in forward]


def run_to_points(model: HookedTransformer, points: tuple[Point, ...], windows: Windows) -> tuple[jax.Array, ...]:
    """Runs windows as far as the last point.

    Args:
        model: the model.
        points: in firing order.
        windows: the windows.

    Returns:
        Each point's activations ``[window, pos, ...]``.
    """
    names = [point.name for point in points]
    stop = None
    if stage_of(names[-1])[1] == ENTRY and not any(entry.name == names[-1] for entry in model._hooks.entries):
        stop = layer_of(names.pop())  # what enters a block is what the run returns that stops before it
    inputs: Any = windows.tokens
    if not windows.text[: windows.count].all():
        text = np.where(windows.text.any(axis=1, keepdims=True), windows.text, True)  # filling windows: any text
        inputs = Batch.from_mask(windows.tokens, text, "right")
    if names:
        last, cache = model.run_with_cache(
            inputs, return_type=None, names_filter=names, return_cache_object=False, stop_at_layer=stop
        )
    else:
        last, cache = model(inputs, return_type=None, stop_at_layer=stop), {}
    values = [cache[name] for name in names] + ([] if stop is None else [last])
    for point, value in zip(points, values, strict=True):
        if value.shape != (*windows.tokens.shape, *point.shape):
            raise HarvestError(
                f"{point.name} has shape {value.shape} in a run that names {', '.join(names)}: points that change how "
                "the attention's inputs are made are harvested in a run of their own."
            )
    return tuple(values)
