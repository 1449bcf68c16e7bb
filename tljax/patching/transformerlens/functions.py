"""TransformerLens's ``patching`` module: its functions, by name and result shape, on the sweep engine.

``get_act_patch_…(model, corrupted_tokens, clean_cache, patching_metric)`` patches clean activations into the corrupted
run, one site at a time. Results are arrays, or a :class:`~tljax.patching.PatchingResult` where prompts are kept apart
(``reduce="none"``), the baseline is asked for or metrics are given by name.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp

from tljax.checks import typed
from tljax.errors import InputError
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.engine.report import join_reports
from tljax.patching.engine.run import Metrics
from tljax.patching.result import PatchingResult
from tljax.patching.transformerlens.generic import MaxBatch, Reduce, is_plain
from tljax.patching.transformerlens.generic import generic_activation_patch as generic_activation_patch
from tljax.patching.transformerlens.generic import make_df_from_ranges as make_df_from_ranges
from tljax.patching.transformerlens.setters import PatchSetter
from tljax.patching.transformerlens.setters import (
    layer_head_dest_src_pos_pattern_patch_setter as layer_head_dest_src_pos_pattern_patch_setter,
)
from tljax.patching.transformerlens.setters import layer_head_pattern_patch_setter as layer_head_pattern_patch_setter
from tljax.patching.transformerlens.setters import (
    layer_head_pos_pattern_patch_setter as layer_head_pos_pattern_patch_setter,
)
from tljax.patching.transformerlens.setters import layer_head_vector_patch_setter as layer_head_vector_patch_setter
from tljax.patching.transformerlens.setters import (
    layer_pos_head_vector_patch_setter as layer_pos_head_vector_patch_setter,
)
from tljax.patching.transformerlens.setters import layer_pos_patch_setter as layer_pos_patch_setter
from tljax.text.padding import pad_axis


class PatchOptions(TypedDict, total=False):
    """Options that all of these functions take, documented at :func:`generic_activation_patch`."""

    index_axis_names: Sequence[str] | None
    index_df: Any
    return_index_df: bool
    reduce: Reduce
    baseline: bool
    max_batch: MaxBatch
    progress: bool | None


def _patch_function(
    name: str, activation: str, setter: PatchSetter, axes: tuple[str, ...], what: str
) -> Callable[..., Any]:
    """Makes a function ``get_act_patch_<name>`` that patches one kind of activation."""

    def get_act_patch(
        model: HookedTransformer,
        corrupted_tokens: Any,
        clean_cache: Any,
        patching_metric: Metrics,
        *,
        patch_setter: PatchSetter = setter,
        activation_name: str = activation,
        **options: Unpack[PatchOptions],
    ) -> Any:
        if options.get("index_axis_names") is None and options.get("index_df") is None:
            options["index_axis_names"] = axes
        return generic_activation_patch(
            model, corrupted_tokens, clean_cache, patching_metric, patch_setter, activation_name, **options
        )

    get_act_patch.__name__ = get_act_patch.__qualname__ = f"get_act_patch_{name}"
    get_act_patch.__doc__ = (
        f"Patches {what} (``{activation}``), one run for each {', '.join(axes[:-1])} and {axes[-1]}.\n\n"
        f"Returns ``[{', '.join(axes)}]``; arguments and other results are those of :func:`generic_activation_patch`."
    )
    return typed(get_act_patch, receiver=generic_activation_patch)


_BY_LAYER_POS = (layer_pos_patch_setter, ("layer", "pos"))
_BY_POS_HEAD = (layer_pos_head_vector_patch_setter, ("layer", "pos", "head"))
_BY_HEAD = (layer_head_vector_patch_setter, ("layer", "head"))

get_act_patch_resid_pre = _patch_function(
    "resid_pre", "resid_pre", *_BY_LAYER_POS, "the residual stream entering a block"
)
get_act_patch_resid_mid = _patch_function(
    "resid_mid", "resid_mid", *_BY_LAYER_POS, "the residual stream between attention and MLP"
)
get_act_patch_attn_out = _patch_function("attn_out", "attn_out", *_BY_LAYER_POS, "the output of attention")
get_act_patch_mlp_out = _patch_function("mlp_out", "mlp_out", *_BY_LAYER_POS, "the output of the MLP")
get_act_patch_attn_head_out_by_pos = _patch_function("attn_head_out_by_pos", "z", *_BY_POS_HEAD, "a head's output")
get_act_patch_attn_head_q_by_pos = _patch_function("attn_head_q_by_pos", "q", *_BY_POS_HEAD, "a head's query")
get_act_patch_attn_head_k_by_pos = _patch_function("attn_head_k_by_pos", "k", *_BY_POS_HEAD, "a head's key")
get_act_patch_attn_head_v_by_pos = _patch_function("attn_head_v_by_pos", "v", *_BY_POS_HEAD, "a head's value")
get_act_patch_attn_head_out_all_pos = _patch_function(
    "attn_head_out_all_pos", "z", *_BY_HEAD, "a head's output at all positions"
)
get_act_patch_attn_head_q_all_pos = _patch_function(
    "attn_head_q_all_pos", "q", *_BY_HEAD, "a head's queries at all positions"
)
get_act_patch_attn_head_k_all_pos = _patch_function(
    "attn_head_k_all_pos", "k", *_BY_HEAD, "a head's keys at all positions"
)
get_act_patch_attn_head_v_all_pos = _patch_function(
    "attn_head_v_all_pos", "v", *_BY_HEAD, "a head's values at all positions"
)
get_act_patch_attn_head_pattern_all_pos = _patch_function(
    "attn_head_pattern_all_pos", "pattern", layer_head_pattern_patch_setter, ("layer", "head_index"),
    "a head's attention pattern",
)  # fmt: skip
get_act_patch_attn_head_pattern_by_pos = _patch_function(
    "attn_head_pattern_by_pos", "pattern", layer_head_pos_pattern_patch_setter, ("layer", "head_index", "dest_pos"),
    "the attention pattern of one query",
)  # fmt: skip
get_act_patch_attn_head_pattern_dest_src_pos = _patch_function(
    "attn_head_pattern_dest_src_pos", "pattern", layer_head_dest_src_pos_pattern_patch_setter,
    ("layer", "head_index", "dest_pos", "src_pos"), "one cell of an attention pattern",
)  # fmt: skip


@functools.partial(typed, receiver=generic_activation_patch)
def get_act_patch_attn_head_all_pos_every(
    model: HookedTransformer, corrupted_tokens: Any, clean_cache: Any, metric: Metrics, **kwargs: Unpack[PatchOptions]
) -> Any:
    """Patches each head's output, queries, keys, values and pattern at all positions: ``[patch_type, layer, head]``.

    If there are fewer key/value heads than query heads, the missing sites are 0 in an array, and NaN in a
    :class:`~tljax.patching.PatchingResult`, so that they do not count as sites without effect.

    Args:
        model, corrupted_tokens, clean_cache, metric: as in :func:`generic_activation_patch`.
        **kwargs: passed to each sweep.
    """
    functions = {
        "out": get_act_patch_attn_head_out_all_pos,
        "q": get_act_patch_attn_head_q_all_pos,
        "k": get_act_patch_attn_head_k_all_pos,
        "v": get_act_patch_attn_head_v_all_pos,
        "pattern": get_act_patch_attn_head_pattern_all_pos,
    }
    return _every(functions, (model, corrupted_tokens, clean_cache, metric), kwargs)


@functools.partial(typed, receiver=generic_activation_patch)
def get_act_patch_attn_head_by_pos_every(
    model: HookedTransformer, corrupted_tokens: Any, clean_cache: Any, metric: Metrics, **kwargs: Unpack[PatchOptions]
) -> Any:
    """Patches each head's output, query, key, value and pattern row at each position.

    Args:
        model, corrupted_tokens, clean_cache, metric, **kwargs: as in :func:`get_act_patch_attn_head_all_pos_every`,
            which also says what the result holds if there are fewer key/value heads.

    Returns:
        ``[patch_type, layer, pos, head]``; a pattern's position is that of the query.
    """

    pattern = get_act_patch_attn_head_pattern_by_pos
    if kwargs.get("index_df") is None:
        pattern = functools.partial(pattern, index_axis_names=("layer", "dest_pos", "head_index"))
    functions = {
        "out": get_act_patch_attn_head_out_by_pos,
        "q": get_act_patch_attn_head_q_by_pos,
        "k": get_act_patch_attn_head_k_by_pos,
        "v": get_act_patch_attn_head_v_by_pos,
        "pattern": pattern,
    }
    return _every(functions, (model, corrupted_tokens, clean_cache, metric), kwargs)


@functools.partial(typed, receiver=generic_activation_patch)
def get_act_patch_block_every(
    model: HookedTransformer, corrupted_tokens: Any, clean_cache: Any, metric: Metrics, **kwargs: Unpack[PatchOptions]
) -> Any:
    """Patches the residual stream, attention's and the MLP's output at each position: ``[patch_type, layer, pos]``.

    Args:
        model, corrupted_tokens, clean_cache, metric, **kwargs: as in :func:`get_act_patch_attn_head_all_pos_every`.
    """
    functions = {
        "resid_pre": get_act_patch_resid_pre,
        "attn_out": get_act_patch_attn_out,
        "mlp_out": get_act_patch_mlp_out,
    }
    return _every(functions, (model, corrupted_tokens, clean_cache, metric), kwargs)


def _every(
    functions: Mapping[str, Callable[..., PatchingResult]],
    arguments: tuple[HookedTransformer, Any, Any, Metrics],
    options: Mapping[str, Any],
) -> Any:
    """Stacks several sweeps along a leading axis ``patch_type``, filling up the grids of fewer heads."""
    if options.get("return_index_df"):
        raise InputError(
            "return_index_df goes with one kind of activation; for several pass baseline=True and take the result's "
            ".index_df, which has a patch_type column."
        )
    results = [function(*arguments, **{**options, "baseline": True}) for function in functions.values()]
    plain = is_plain(arguments[3], options.get("reduce", "scalar"), options.get("baseline", False))
    first = results[0]
    at = int(first.has_metric_axis)
    largest = tuple(max(sizes) for sizes in zip(*(result.shape for result in results), strict=True))
    values = jnp.stack([_padded(result.values, largest, 0.0 if plain else jnp.nan) for result in results], axis=at)
    if plain:
        return values
    return dataclasses.replace(
        first,
        values=values,
        axis_names=(*first.axis_names[:at], "patch_type", *first.axis_names[at:]),
        activation_name="",
        labels={**first.labels, "patch_type": tuple(functions)},
        report=join_reports([result.report for result in results]),
    )


def _padded(values: jax.Array, shape: tuple[int, ...], fill: float) -> jax.Array:
    for axis, size in enumerate(shape):
        values = pad_axis(values, size, axis, fill)
    return values
