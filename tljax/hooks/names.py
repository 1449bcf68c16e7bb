"""Hook names: TransformerLens's short forms, and the other spellings in use, resolved to the names of the table."""

import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tljax.checks import typed
from tljax.errors import UnknownHookError, nearest

_ACTIVATION_ALIASES = {
    "attn": "pattern", "attn_logits": "attn_scores", "key": "k", "query": "q", "value": "v",
    "mlp_pre": "pre", "mlp_mid": "mid", "mlp_post": "post",
}  # fmt: skip
_LAYER_TYPE_ALIASES = {"a": "attn", "m": "mlp", "b": "", "block": "", "blocks": "", "attention": "attn"}
_ATTENTION_NAMES = ("k", "v", "q", "z", "rot_k", "rot_q", "result", "pattern", "attn_scores", "q_latent", "kv_latent")
_MLP_NAMES = ("pre", "post", "mid", "pre_linear")
_NORM_NAMES = ("scale", "normalized")

_ALIASES_IN_A_BLOCK = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "ln2.hook_in": "hook_resid_mid",
    "attn.hook_attn": "attn.hook_pattern",
    "attn.hook_out": "hook_attn_out",
    "attn.q.hook_out": "attn.hook_q",
    "attn.k.hook_out": "attn.hook_k",
    "attn.v.hook_out": "attn.hook_v",
    "attn.o.hook_in": "attn.hook_z",
    "attn.hook_q_input": "hook_q_input",
    "attn.hook_k_input": "hook_k_input",
    "attn.hook_v_input": "hook_v_input",
    "attn.hook_attn_in": "hook_attn_in",
    "mlp.hook_out": "hook_mlp_out",
    "mlp.gate.hook_out": "mlp.hook_pre",
    "mlp.out.hook_in": "mlp.hook_post",
}
_ALIASES_OUTSIDE = {
    "embed.hook_out": "hook_embed",
    "pos_embed.hook_out": "hook_pos_embed",
    "hook_unembed": "unembed.hook_out",
}


def stage_of(name: str) -> tuple[str, str]:
    """The stage a point belongs to (``"embedding"``, ``"blocks.3."`` or ``"head"``) and its name within it."""
    if name.startswith("blocks."):
        _, layer, relative = name.split(".", 2)
        return f"blocks.{layer}.", relative
    return ("head" if name.startswith(("ln_final.", "unembed.")) else "embedding"), name


def layer_of(name: str) -> int | None:
    """The layer of a point inside a block, else ``None``."""
    return int(name.split(".", 2)[1]) if name.startswith("blocks.") else None


def layer_of_short(name: str) -> int | None:
    """The layer that is written in a name, full or compact (``"k6"``, ``"scale4ln1"``), else ``None``."""
    if (full := re.match(r"blocks\.(-?\d+)\.", name)) is not None:
        return int(full[1])
    compact = re.fullmatch(r"([a-z_]+)(\d+)([a-z]?.*)", name)
    return int(compact[2]) if compact is not None and "." not in name else None


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
    compact = re.fullmatch(r"([a-z_]+)(\d+)([a-z]?.*)", name)
    if compact is not None:
        name, layer, layer_type = compact[1], int(compact[2]), compact[3] or layer_type
    layer_type = _LAYER_TYPE_ALIASES.get(layer_type or "", layer_type)
    name = _ACTIVATION_ALIASES.get(name, name)
    if not layer_type:
        layer_type = "attn" if name in _ATTENTION_NAMES else "mlp" if name in _MLP_NAMES else layer_type
    full = f"blocks.{layer}." if layer is not None else ""
    if layer_type:
        full += f"{layer_type}."
    if name in _NORM_NAMES and layer is None:
        full = f"ln_final.{full}"
    return f"{full}hook_{name}"


def _other_spelling(name: str, gated: bool) -> str:
    match = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
    if match is None:
        return _ALIASES_OUTSIDE.get(name, name)
    if match[2] == "mlp.in.hook_out":
        return f"{match[1]}mlp.{'hook_pre_linear' if gated else 'hook_pre'}"
    return match[1] + _ALIASES_IN_A_BLOCK.get(match[2], match[2])


def _count_negative_layers(name: str, n_layers: int) -> str:
    return re.sub(r"^blocks\.(-\d+)\.", lambda m: f"blocks.{int(m[1]) + n_layers}.", name)


def resolve(name: Any, table: Mapping[str, Any], n_layers: int) -> str:
    """Returns the table's name for any accepted spelling of a hook name.

    Args:
        name: a full name, a short form, a TransformerBridge name, or a tuple such as ``("scale", 1, "ln1")``.
        table: the model's points by name.
        n_layers: number of layers, for negative layer numbers.

    Raises:
        UnknownHookError: no such point; names the nearest ones.
    """
    expanded = get_act_name(*name) if isinstance(name, tuple) and is_act_tuple(name) else name
    if not isinstance(expanded, str):
        if isinstance(name, tuple) and len(name) == 2 and isinstance(name[1], str):
            raise UnknownHookError(f"The name comes first, then the layer: {(name[1], name[0])!r} instead of {name!r}.")
        raise UnknownHookError(
            f"A hook name is a string, a (name, layer) tuple or a predicate on names, got {type(name).__name__}."
        )
    if expanded in table:
        return expanded
    gated = any(known.endswith("hook_pre_linear") for known in table)
    for candidate in (expanded, get_act_name(expanded)):
        candidate = _other_spelling(_count_negative_layers(candidate, n_layers), gated)
        if candidate in table:
            return candidate
    raise UnknownHookError(
        f"{name!r} is not a hook point of this model.{_hint(get_act_name(expanded), table, n_layers)}"
    )


def _hint(name: str, table: Mapping[str, Any], n_layers: int) -> str:
    layer = re.match(r"blocks\.(-?\d+)\.", name)
    if layer and not -n_layers <= int(layer[1]) < n_layers:
        return f" The model has {n_layers} layers, numbered 0 to {n_layers - 1}."
    parameter = name.replace("hook_", "").split(".")[-1]
    if parameter.startswith(("W_", "b_")):
        return f" {parameter} is a weight, not an activation: read model.{parameter}."
    return (nearest(name, table) or " ") + " model.hook_points() lists them all."


def select(
    names: "str | tuple[Any, ...] | Callable[[str], bool] | Sequence[Any] | None",
    table: Mapping[str, Any],
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
