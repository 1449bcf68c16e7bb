"""Checking that parameters fit a config: names, shapes and dtypes, with all faults in one error."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from tljax.checkpoints.layout import flatten, parameter_shapes
from tljax.config import HookedTransformerConfig
from tljax.dictionary_params import dictionaries_in, without_dictionaries
from tljax.errors import CheckpointError, nearest
from tljax.offload import abstract

_TURNED = ("W_Q", "W_K", "W_V")
_THEIRS = ("mask", "IGNORE", "_W_K", "_W_V", "_b_K", "_b_V")
"""Entries of TransformerLens's state dicts that are not parameters in tljax."""
_SHOWN = 12


def check_parameters(
    params: Any, cfg: HookedTransformerConfig, consequence: str = "", may_be_stacked: bool = True
) -> None:
    """Checks the names, shapes and dtypes of nested parameters in the stored layout, without reading their values.

    If ``n_heads`` equals ``d_model``, TransformerLens's ``W_Q`` has the same shape as ours and cannot be told from it.

    Args:
        params: arrays, tracers or ``jax.ShapeDtypeStruct``, as in ``cfg`` or all stacked along a leading axis.
        cfg: the config.
        consequence: what the mismatch leads to, for the error, such as ``", nothing was saved"``.
        may_be_stacked: whether stacked parameters are accepted.

    Raises:
        CheckpointError: they do not fit; lists parameters that are missing, unknown, or of another shape or dtype.
    """
    params = abstract(params)
    _check_nesting(params, cfg)
    _check_dictionaries(params, cfg)
    params = without_dictionaries(params)
    flat, expected = flatten(params), parameter_shapes(cfg)
    shapes = {path: getattr(leaf, "shape", None) for path, leaf in flat.items()}
    if shapes != expected and not (may_be_stacked and _are_stacked(shapes, expected)):
        raise CheckpointError(_message(shapes, expected, consequence))
    if wrong := [
        f"{path} is {leaf.dtype}" for path, leaf in flat.items() if not jnp.issubdtype(leaf.dtype, jnp.floating)
    ]:
        raise CheckpointError(f"Parameters are floating-point numbers; {_listed(wrong)}.")


def _check_nesting(params: Any, cfg: HookedTransformerConfig) -> None:
    """Raises CheckpointError unless ``params`` is a nested mapping with a sequence of blocks."""
    if not isinstance(params, Mapping):
        raise CheckpointError(
            f"params must be nested dicts such as model.params, got {type(params).__name__}: "
            "{'embed': {'W_E': ...}, 'blocks': ({'attn': {'W_Q': ...}, ...}, ...), 'unembed': {...}}."
        )
    if flat := [key for key in params if not isinstance(key, str) or "." in key]:
        raise CheckpointError(
            f"params has the flat name {flat[0]!r}: parameters are nested. A state dict of TransformerLens goes "
            "through HookedTransformer.from_transformer_lens; other flat names through "
            "tljax.checkpoints.layout.unflatten."
        )
    blocks = params.get("blocks", ())
    if not isinstance(blocks, tuple | list):
        raise CheckpointError(
            f"params['blocks'] must be a tuple of one dict for each of the {cfg.n_layers} layers, got "
            f"{type(blocks).__name__}."
        )


def _check_dictionaries(params: Any, cfg: HookedTransformerConfig) -> None:
    """Raises CheckpointError unless the dictionaries among the parameters are those that the config says."""
    there = dictionaries_in(params)
    said = {splice.writes: (splice.d_sae, splice.d_out) for splice in cfg.splices}
    shapes = {name: one.W_dec.shape[-2:] for name, one in there.items()}
    if shapes != said:
        wrong = next(name for name in (*said, *shapes) if said.get(name) != shapes.get(name))
        raise CheckpointError(
            f"The dictionary at {wrong} has W_dec {shapes.get(wrong, 'absent')} among the parameters and "
            f"{said.get(wrong, 'absent')} in the config. Dictionaries go in by model.with_dictionaries(...) and out by "
            "model.without_dictionaries(), which change both."
        )


def _are_stacked(shapes: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether all shapes have one more leading axis, of one size: several models, for ``jax.vmap``."""
    if shapes.keys() != expected.keys() or None in shapes.values():
        return False
    sizes = {shape[0] if len(shape) == len(expected[path]) + 1 else None for path, shape in shapes.items()}
    return len(sizes) == 1 and None not in sizes and all(shape[1:] == expected[path] for path, shape in shapes.items())


def _message(shapes: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], consequence: str) -> str:
    known = shapes.keys() & expected.keys()
    wrong = [
        f"{path} is {_shown(shapes.get(path, 'absent'))}, should be {expected.get(path, 'absent')}"
        + ("" if path in expected else nearest(path, expected.keys() - known, 1))
        for path in [*expected, *(path for path in shapes if path not in expected)]
        if path not in known or shapes[path] != expected[path]
    ]
    text = f"The parameters do not fit the config{consequence}. {_listed(wrong)}."
    turned = [path for path in known if path.endswith(_TURNED) and shapes[path] != expected[path]]
    theirs = [path for path in shapes if path not in expected and path.endswith(_THEIRS)]
    if theirs or any(shapes[path] == _theirs(expected[path]) for path in turned):
        text += (
            " This is TransformerLens's layout (W_Q [n_heads, d_model, d_head]); tljax stores W_Q [d_model, n_heads, "
            "d_head]: load it with HookedTransformer.from_transformer_lens(state_dict, cfg)."
        )
    return text


def _theirs(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[1], shape[0], *shape[2:])


def _shown(shape: Any) -> Any:
    return "no array" if shape is None else shape


def _listed(wrong: Iterable[str]) -> str:
    """Joins the first few of ``wrong``, with the number of the others."""
    wrong = list(wrong)
    more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return "; ".join(wrong[:_SHOWN]) + more
