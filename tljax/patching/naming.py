"""Resolves a sweep's activation name to hook points and their layers."""

from collections.abc import Sequence

import numpy as np

from tljax import checks
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.hooks.names import ActName, find, layer_in
from tljax.hooks.points import HEAD, point_table, stage_of


def named_points(
    cfg: HookedTransformerConfig, activation_name: ActName, layers: Sequence[int] | int | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Returns the full names of the patched hook points, and their layers (0 for a point of the embedding).

    Raises:
        InputError: the name includes a layer and ``layers`` gives others, a layer does not exist or lacks the point, a
            short name fits several points, or the point is one that sweeps do not patch.
        UnknownHookError: no layer has such a point.
    """
    if not isinstance(activation_name, str | tuple):
        raise InputError(
            f"activation_name is a name, such as 'resid_pre', 'blocks.3.attn.hook_z' or 'z3'; got {activation_name!r}."
        )
    table = point_table(cfg)
    single = isinstance(layers, int | np.integer) and not isinstance(layers, bool)
    numbers = checks.layers((layers,) if single else layers, cfg.n_layers)
    if len(set(numbers)) < len(numbers):
        raise InputError(f"layers={list(numbers)} names a layer twice: each layer is patched once.")
    found = find(activation_name, table, cfg.n_layers, numbers)
    if None in found and (stage_of(found[None])[0] == HEAD or table[found[None]].holds_numbers):
        raise InputError(
            f"{activation_name!r} is {found[None]}, and a sweep patches points inside the blocks, "
            "'embed', 'pos_embed' and a norm of the embedding. For a norm inside the blocks say which: "
            "'ln1.hook_scale', 'ln2.hook_normalized'."
        )
    names, where = tuple(found.values()), tuple(layer or 0 for layer in found)
    is_one_place = None in found or layer_in(activation_name) is not None
    if is_one_place and layers is not None and numbers != where:
        raise InputError(
            f"{activation_name!r} names a point of one place, {names[0]}, and layers={layers!r} others. Leave layers= "
            "out, or give a short name, such as 'resid_pre', that every layer has."
        )
    if layers is not None and (lacking := [layer for layer in numbers if layer not in where]):
        elsewhere = list(find(activation_name, table, cfg.n_layers))
        raise InputError(f"Layer {lacking[0]} has no {activation_name!r}: layers {elsewhere} have it.")
    return names, where
