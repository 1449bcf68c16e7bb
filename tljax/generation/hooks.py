"""Hooks in generation: interventions address positions of the whole text, whichever part of it a step computes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tljax.errors import HookError, InterventionError
from tljax.hooks.dictionary import HookDictionary
from tljax.hooks.intervention import Intervention
from tljax.hooks.interventions import Chain, Mean
from tljax.hooks.point import POSITION_AXES
from tljax.hooks.points import HookPointSpec
from tljax.hooks.selectors import Selector
from tljax.text.padding import pad_axis


@dataclasses.dataclass(frozen=True)
class TextSize:
    """Lengths of the texts of a generation, in positions.

    Attributes:
        prompt: length of the longest prompt.
        total: most positions of prompt and answer together.
        capacity: positions for which there is room.
        lengths: length of each prompt. Positions count from the first token of each text.
    """

    prompt: int
    total: int
    capacity: int
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, mask: np.ndarray, total: int, capacity: int) -> "TextSize":
        """Returns the size of texts that continue prompts padded on the left, with this mask ``[batch, pos]``."""
        return cls(mask.shape[1], total, capacity, tuple(mask.sum(axis=1).tolist()))


def place_hooks(hooks: HookDictionary, table: Mapping[str, HookPointSpec], size: TextSize) -> HookDictionary:
    """Returns the hooks with every position selection and operand laid out over the text's capacity.

    Args:
        hooks: the hooks.
        table: the model's hook points.
        size: the text.

    Raises:
        InterventionError: a position is outside the text or counts from its end, which is not known yet; or an array
            along positions fits neither the prompt nor the text.
        HookError: a backward hook.
    """
    entries = []
    for entry in hooks.entries:
        if entry.direction == "bwd":
            raise HookError(f"The backward hook at {entry.name} has no gradient to act on in generation: remove it.")
        function = entry.function
        if isinstance(function, Intervention):
            function = _placed(function, table[entry.name], size)
        entries.append(dataclasses.replace(entry, function=function))
    return HookDictionary(tuple(entries))


def _placed(intervention: Intervention, spec: HookPointSpec, size: TextSize) -> Intervention:
    if isinstance(intervention, Chain):
        return Chain(*(_placed(part, spec, size) for part in intervention.parts))
    if isinstance(intervention, Mean) and intervention.reference is None and set(intervention.over) & {*POSITION_AXES}:
        raise InterventionError(
            f"Mean(over={intervention.over}) at {spec.name} needs every position of the text at once, and generation "
            "makes them one by one. Pass a reference=."
        )
    selectors = [_placed_selector(selector, spec, size) for selector in intervention.at]
    dropped = {selector.axis for selector in selectors if selector.kind == "number"}
    names = (*intervention.arrays, "mask")
    fields = {
        name: value if name in intervention.apart else _placed_array(value, spec, dropped, selectors, size)
        for name, value in ((name, getattr(intervention, name)) for name in names)
    }
    return type(intervention).stored(
        fields | {name: getattr(intervention, name) for name in intervention.settings}, selectors
    )


def _placed_selector(selector: Selector, spec: HookPointSpec, size: TextSize) -> Selector:
    if selector.axis not in POSITION_AXES:
        return selector
    what = f"{selector.axis}= at {spec.name}"
    if selector.kind in ("number", "numbers"):
        for number in np.atleast_1d(np.asarray(selector.payload)).astype(int):
            which = "longest prompt" if len(set(size.lengths)) > 1 else "prompt"
            if number < 0:
                raise InterventionError(
                    f"{selector.axis}={number} at {spec.name} counts from the end of a text that is still growing. "
                    f"The last token of the {which} is {selector.axis}={max(size.lengths) - 1}; all that follow "
                    f'it are {selector.axis}="new".'
                )
            new, shortest = size.total - size.prompt, min(size.lengths)
            if number >= shortest + new:
                which = f" of prompt {size.lengths.index(shortest)}" if len(set(size.lengths)) > 1 else ""
                raise InterventionError(
                    f"{selector.axis}={number} at {spec.name} is beyond the text{which}: {shortest} tokens of prompt "
                    f"and at most {new} new ones make positions 0 to {shortest + new - 1}."
                )
        return selector
    mask = np.zeros(size.capacity, np.float32)
    if selector.kind == "span":
        mask[slice(size.prompt) if selector.payload == "prompt" else slice(size.prompt, None)] = 1
    elif selector.kind == "slice":
        bounds = selector.payload
        if any(bound is not None and bound < 0 for bound in (bounds.start, bounds.stop)):
            raise InterventionError(
                f"The slice for {what} counts from the end of a text that is still growing. Count from its beginning: "
                f"the prompt has {size.prompt} tokens."
            )
        mask[bounds] = 1
    elif selector.size in (size.prompt, size.total):
        mask[: selector.size] = np.asarray(selector.payload)
    else:
        raise InterventionError(
            f"The mask for {what} has {selector.size} entries; the prompt has {size.prompt} positions and the text up "
            f"to {size.total}."
        )
    return Selector.stored(selector.axis, "places" if selector.kind == "span" else "mask", mask)


def _placed_array(
    value: Any, spec: HookPointSpec, dropped: set[str], selectors: Sequence[Selector], size: TextSize
) -> Any:
    """Pads an operand with zeros along positions, up to the text's capacity."""
    shape = np.shape(value)
    if not shape:
        return value
    listed = {selector.axis: selector.size for selector in selectors if selector.kind == "numbers"}
    whole = spec.axes[-len(shape) :]
    part = tuple(axis for axis in spec.axes if axis not in dropped)[-len(shape) :]
    for axes in dict.fromkeys((whole, part)):
        if len(axes) == len(shape) and (room := _room(shape, axes, listed, size)) is not None:
            for axis, length in enumerate(room):
                value = pad_axis(value, length, axis)
            return value
    raise InterventionError(
        f"An array of shape {tuple(shape)} at {spec.name}, axes {spec.axes}, fits neither the prompt's {size.prompt} "
        f"positions nor the text's {size.total}. Give one for each, or one that does not depend on the position."
    )


def _room(shape: Sequence[int], axes: Sequence[str], listed: Mapping[str, int], size: TextSize) -> list[int] | None:
    """Returns the shape with the text's capacity along positions; ``None`` if it fits neither prompt nor text."""
    room = []
    for length, axis in zip(shape, axes, strict=True):
        if axis not in POSITION_AXES or length == 1 or listed.get(axis) == length:
            room.append(length)
        elif length in (size.prompt, size.total):
            room.append(size.capacity)
        else:
            return None
    return room
