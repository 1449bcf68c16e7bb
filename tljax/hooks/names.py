"""Hook names: every spelling in use, resolved to the names of the table."""

import functools
import numbers
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tljax.checks import typed
from tljax.config import HookedTransformerConfig
from tljax.errors import AmbiguousHookError, UnknownHookError, nearest
from tljax.hooks.point import HookPoint
from tljax.hooks.points import EMBEDDING, HEAD, HookPointSpec, HookTable, point_table

ActName = str | tuple[Any, ...]
"""A hook name as a user spells it: a text, or a tuple ``(name, layer[, layer_type])``."""

_LAYER_TYPE_ALIASES = {"a": "attn", "m": "mlp", "b": "", "block": "", "blocks": "", "attention": "attn"}


@typed
def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """Expands TransformerLens's short forms into a full hook name.

    Args:
        name: an activation name (``"resid_post"``, ``"q"``, ``"mlp_post"``), a compact form (``"k6"``,
            ``"scale4ln1"``), or a full name, which is returned unchanged.
        layer: layer number.
        layer_type: ``"attn"``/``"a"``, ``"mlp"``/``"m"``, ``"ln1"``, ``"ln2"`` …, where the name alone is ambiguous.

    Returns:
        The full name.

    >>> get_act_name("k", 6, "a"), get_act_name("resid_post", 2), get_act_name("scale4ln1"), get_act_name("normalized")
    ('blocks.6.attn.hook_k', 'blocks.2.hook_resid_post', 'blocks.4.ln1.hook_scale', 'ln_final.hook_normalized')
    """
    if ("." in name or name.startswith("hook_")) and layer is None and layer_type is None:
        return name
    text, layer, part = _read(name, layer, layer_type)
    prefix, stages = ("", (EMBEDDING, HEAD)) if layer is None else (f"blocks.{layer}.", ("blocks.0.", "blocks.1."))
    for stage in stages:
        if len(found := _every_kind().spellings[stage].meanings(text, part)) == 1:
            return prefix + found[0]
    return f"{prefix}{part}.hook_{text}" if part else f"{prefix}hook_{text}"


@functools.lru_cache(maxsize=1)
def _every_kind() -> HookTable:
    """Returns the points of a model with every kind of part (experts in layer 1), to read names without a model."""
    plain = HookedTransformerConfig(d_model=4, d_head=4, n_layers=1, n_ctx=1, d_vocab=1, act_fn="solu_ln")
    other = plain.replace(
        n_layers=2, act_fn="silu", gated_mlp=True, positional_embedding_type="rotary", rotary_dim=2, q_lora_rank=1,
        kv_lora_rank=1, num_experts=1, experts_per_token=1, d_expert=1, moe_layers=(False, True),
    )  # fmt: skip
    return HookTable(point_table(plain) | point_table(other))


def _read(name: str, layer: Any = None, layer_type: str | None = None) -> tuple[str, Any, str]:
    """Splits a name into the name itself, its layer or ``None``, and the part of the block, or an empty string."""
    if layer is None and (full := re.fullmatch(r"blocks\.(-?\d+)\.(.+)", name)):
        return full[2], int(full[1]), ""
    short = "." not in name and not name.startswith("hook_")
    if layer is None and short and (compact := re.fullmatch(r"([a-z_]+)(\d+)([a-z]?.*)", name)):
        name, layer, layer_type = compact[1], int(compact[2]), compact[3] or layer_type
    return name, layer, _LAYER_TYPE_ALIASES.get(layer_type or "", layer_type or "")


def _spelled(name: Any) -> tuple[str, Any, str]:
    """Splits any spelling of a hook name as :func:`_read` does.

    Raises:
        UnknownHookError: this is not a hook name.
    """
    if isinstance(name, HookPoint | HookPointSpec):
        name = name.name
    if isinstance(name, str) or is_act_tuple(name):
        return _read(name) if isinstance(name, str) else _read(*name)
    if isinstance(name, tuple) and len(name) == 2 and isinstance(name[1], str):
        raise UnknownHookError(f"The name comes first, then the layer: {(name[1], name[0])!r} instead of {name!r}.")
    raise UnknownHookError(
        f"A hook name is a string, a (name, layer) tuple or a predicate on names, got {type(name).__name__}."
    )


def layer_in(name: Any) -> int | None:
    """Returns the layer written in a name such as ``"k6"``, ``("z", -1)`` or ``"blocks.3.hook_resid_pre"``, if any."""
    return _spelled(name)[1]


def find(name: Any, table: HookTable, n_layers: int, layers: Iterable[int] | None = None) -> dict[int | None, str]:
    """Returns the hook points that a name stands for, by layer; a point outside the blocks has layer ``None``.

    Args:
        name: any spelling. A name without a layer, such as ``"z"`` or ``"ln1.hook_scale"``, stands for that point in
            every layer that has it.
        table: the model's points.
        n_layers: number of layers.
        layers: layers to look in for a name without a layer; all by default.

    Raises:
        AmbiguousHookError: it could mean several points of a layer; lists them.
        UnknownHookError: the model has no such point; names the nearest ones.
    """
    text, layer, part = _spelled(name)
    outside = [table.spellings[stage] for stage in (EMBEDDING, HEAD)] if layer is None else []
    known = [one for stage in outside if text in stage.exact for one in stage.meanings(text, part)]
    if known:
        return {None: known[0]}
    numbers = range(n_layers) if layer is None else [layer + n_layers if layer < 0 else layer]
    inside = {n: table.spellings[f"blocks.{n}."].meanings(text, part) for n in numbers if 0 <= n < n_layers}
    if any(inside.values()):
        wanted = numbers if layers is None or layer is not None else layers
        found: dict[int | None, tuple[str, ...]] = {number: inside[number] for number in wanted if inside[number]}
    else:
        found = {None: tuple(one for stage in outside for one in stage.meanings(text, part))}
    options = dict.fromkeys(one for meanings in found.values() for one in meanings)
    if found and not options:
        hint = _hint(text, layer, part, table, n_layers)
        raise UnknownHookError(f"{name!r} is not a hook point of this model.{hint}")
    if len(options) > 1:
        prefix = "" if layer is None else f"blocks.{layer}."
        listed = " or ".join(repr(prefix + option) for option in options)
        raise AmbiguousHookError(f"{name!r} could mean {listed}: say which.")
    return {number: one if number is None else f"blocks.{number}.{one}" for number, (one,) in found.items()}


def resolve(name: Any, table: HookTable, n_layers: int) -> str:
    """Returns the table's name for any accepted spelling of a hook name.

    Args:
        name: a full name (also of TransformerBridge), a short form, a name within its block beside a layer,
            ``("attn.hook_z", 1)``, a tuple such as ``("scale", 1, "ln1")``, or a point itself.
        table: the model's points.
        n_layers: number of layers, for negative layer numbers.

    Raises:
        UnknownHookError: no such point; names the nearest ones.
        AmbiguousHookError: it could mean several points; lists them.
    """
    if isinstance(name, str) and name in table:
        return name
    found = find(name, table, n_layers)
    layer, full = next(iter(found.items()))
    if layer is not None and layer_in(name) is None:
        raise AmbiguousHookError(
            f"{name!r} is a point of each of the layers {[*found]}: say of which, such as {full!r}."
        )
    return full


def _hint(text: str, layer: int | None, part: str, table: HookTable, n_layers: int) -> str:
    if layer is not None and not -n_layers <= layer < n_layers:
        return f" The model has {n_layers} layers, numbered 0 to {n_layers - 1}."
    parameter = text.replace("hook_", "").split(".")[-1]
    if parameter.startswith(("W_", "b_")):
        return f" {parameter} is a weight, not an activation: read model.{parameter}."
    is_short = "." not in text and not text.startswith("hook_")
    full = get_act_name(text, layer, part) if is_short else text if layer is None else f"blocks.{layer}.{text}"
    return (nearest(full, table) or " ") + " model.hook_points() lists them all."


def select(
    names: "str | tuple[Any, ...] | Callable[[str], bool] | Sequence[Any] | None",
    table: HookTable,
    n_layers: int,
) -> tuple[str, ...]:
    """Returns the full names, in firing order, that a names filter picks.

    Args:
        names: ``None`` (every point that is not optional), a name, a list of names, or a predicate on full names.
        table: the model's points by name.
        n_layers: number of layers.

    Raises:
        UnknownHookError: a name is unknown, or the filter picks nothing.
    """
    if names is None:
        return tuple(name for name, point in table.items() if not point.optional)
    if callable(names):
        chosen: Iterable[str] = {name for name, point in table.items() if not point.optional and names(name)}
    elif isinstance(names, str) or is_act_tuple(names) or not isinstance(names, Iterable):
        chosen = {resolve(names, table, n_layers)}
    else:
        chosen = {resolved for item in names for resolved in select(item, table, n_layers)}
    if not chosen:
        if callable(names) and (optional := [name for name, point in table.items() if point.optional and names(name)]):
            raise UnknownHookError(
                f"The filter matches only points that exist when they are named, such as {optional[0]!r}: give names "
                "instead of a predicate."
            )
        raise UnknownHookError(
            "The filter matches no hook point of this model. It is called with full names such as "
            "'hook_embed' and 'blocks.0.hook_resid_post'; model.hook_points() lists them all."
        )
    return tuple(name for name in table if name in chosen)


def is_act_tuple(names: Any) -> bool:
    """Whether this is one ``(name, layer[, layer_type])`` tuple rather than a sequence of names."""
    return (
        isinstance(names, tuple)
        and len(names) in (2, 3)
        and isinstance(names[0], str)
        and (names[1] is None or isinstance(names[1], numbers.Integral))
    )
