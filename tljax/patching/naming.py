"""What a sweep's activation name means: which points of which layers."""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from tljax import checks
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError, UnknownHookError
from tljax.hooks.names import layer_of, layer_of_short, resolve, stage_of
from tljax.hooks.points import point_table
from tljax.patching.engine.sites import EMBEDDING


def named_points(
    cfg: HookedTransformerConfig, activation_name: str, layers: Sequence[int] | int | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Full names of the patched points, and their layers.

    Raises:
        InputError: a name with one layer in it beside ``layers=`` of others, a layer that does not exist or lacks the
            point, a short name of several points, a point outside the blocks.
        UnknownHookError: no layer has such a point.
    """
    only = one_place(cfg, activation_name)
    single = isinstance(layers, int | np.integer) and not isinstance(layers, bool)
    numbers = checks.layers((layers,) if single else layers, cfg.n_layers)
    if len(set(numbers)) < len(numbers):
        raise InputError(f"layers={list(numbers)} names a layer twice: each layer is patched once.")
    if only is not None:
        layer = layer_of(only) or 0
        if layers is not None and numbers != (layer,):
            raise InputError(
                f"{activation_name!r} names a point of one place, {only}, and layers={layers!r} others. Leave layers= "
                "out, or give a short name, such as 'resid_pre', that every layer has."
            )
        return (only,), (layer,)
    found = {layer: name for layer in numbers if (name := _at_layer(cfg, activation_name, layer)) is not None}
    if len(found) < len(numbers) and (layers is not None or not found):
        elsewhere = [n for n in range(cfg.n_layers) if _at_layer(cfg, activation_name, n) is not None]
        if not elsewhere:
            resolve((activation_name.removeprefix("hook_"), numbers[0]), point_table(cfg), cfg.n_layers)  # says why
        lacking = next(layer for layer in numbers if layer not in found)
        raise InputError(f"Layer {lacking} has no {activation_name!r}: layers {elsewhere} have it.")
    numbers = tuple(layer for layer in numbers if layer in found)
    return tuple(found[layer] for layer in numbers), numbers


def one_place(cfg: HookedTransformerConfig, activation_name: Any) -> str | None:
    """The full name of what is named with its layer, or is of the embedding; ``None`` for a name of every layer's.

    Raises:
        InputError: it is no point that a sweep can patch.
    """
    table = point_table(cfg)
    named = activation_name
    if isinstance(named, str) and named.removeprefix("hook_") in ("embed", "pos_embed"):
        named = f"hook_{named.removeprefix('hook_')}"
    elif not isinstance(named, str):
        raise InputError(
            f"activation_name is a name, such as 'resid_pre', 'blocks.3.attn.hook_z' or 'z3'; got {named!r}."
        )
    try:
        name = resolve(named, table, cfg.n_layers)
    except UnknownHookError:
        if layer_of_short(named) is None:
            return None
        raise
    if layer_of(name) is None and name not in EMBEDDING:
        raise InputError(
            f"{activation_name!r} is {name}, and a sweep patches points inside the blocks, 'embed' and 'pos_embed'. "
            "For a norm inside the blocks say which: 'ln1.hook_scale', 'ln2.hook_normalized'."
        )
    return name


def _at_layer(cfg: HookedTransformerConfig, activation_name: str, layer: int) -> str | None:
    """The full name of a layer's point by its short name, or its name within the block; ``None`` if there is none."""
    table, short = point_table(cfg), activation_name.removeprefix("hook_")
    for spelling in ((short, layer), f"blocks.{layer}.{activation_name}"):
        with contextlib.suppress(UnknownHookError):
            return resolve(spelling, table, cfg.n_layers)
    ends = (f".{activation_name}", f".hook_{short}")
    found = [name for name in table if layer_of(name) == layer and name.endswith(ends)]
    if len(found) > 1:
        options = " or ".join(repr(stage_of(name)[1]) for name in found)
        raise InputError(f"{activation_name!r} could mean {options}: say which.")
    return found[0] if found else None
