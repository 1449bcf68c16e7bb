"""Helpers shared by the analyses of a cache: layer bounds, required activations, position slices, norms, directions."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.cache.slices import Cut, SliceInput, cut, is_full, read_slice
from tljax.cache.writers import Reader
from tljax.checks import typed
from tljax.config import HookedTransformerConfig
from tljax.errors import CacheError, InputError, UnknownHookError
from tljax.hooks.points import point_table, stage_of
from tljax.hooks.splices import refuse_splices, value_after
from tljax.text import positions

if TYPE_CHECKING:
    from tljax.cache.activation_cache import ActivationCache

checked = functools.partial(typed, error=CacheError)
"""Decorator that checks the arguments of a cache's method and raises CacheError if they do not fit."""


def bounded_layer(cfg: HookedTransformerConfig, layer: int | None, mlp_input: bool = False) -> int:
    """Returns the layer whose input an analysis stops at; ``None`` and ``-1`` mean ``n_layers``, the end of the model.

    Raises:
        CacheError: the layer is out of range, or ``mlp_input`` is set and there is no MLP.
    """
    last = cfg.n_layers if layer is None or layer == -1 else layer
    if isinstance(last, bool) or not isinstance(last, int | np.integer) or not 0 <= last <= cfg.n_layers:
        raise CacheError(
            f"layer={layer!r} is out of range: the model has {cfg.n_layers} layers (None means all of them)."
        )
    if mlp_input and (cfg.attn_only or last == cfg.n_layers):
        lacks = "this model is attention-only" if cfg.attn_only else f"layer={layer!r} means the end of the model"
        raise CacheError(
            f"mlp_input=True asks for what the MLP of a layer reads, but {lacks}. Leave it off, or give a layer that "
            "has one."
        )
    return int(last)


def one_layer(cfg: HookedTransformerConfig, layer: int) -> int:
    """Returns the number of a layer; negative numbers count from the end.

    Raises:
        CacheError: the layer is out of range.
    """
    if isinstance(layer, bool) or not isinstance(layer, int | np.integer) or not -cfg.n_layers <= layer < cfg.n_layers:
        raise CacheError(f"layer={layer!r} is out of range: the model has layers 0 to {cfg.n_layers - 1}.")
    return int(layer) % cfg.n_layers


def refuse_norms_of_the_stream(cfg: HookedTransformerConfig, what: str) -> None:
    """Refuses models that normalise the residual stream itself, which is then not a sum of its parts.

    Raises:
        InputError: the model does (``use_normalization_of_residual``).
    """
    if cfg.use_normalization_of_residual:
        raise InputError(
            f"{what} takes the residual stream for a sum, but this model normalises the stream itself after each "
            "addition (use_normalization_of_residual), so that no part stays what it was. Read single activations, "
            "cache['attn_out', layer], or change them and see: model.run_with_hooks, tljax.patching."
        )


def refuse_dictionaries(cfg: HookedTransformerConfig, what: str) -> None:
    """Refuses models with dictionaries spliced in: what a part computes is then not what reaches the stream.

    Raises:
        InputError: the model has some.
    """
    refuse_splices(
        cfg.splices,
        f"{what} takes the residual stream for a sum of what heads and MLPs put out",
        "Decompose a run without them, of model.without_dictionaries(), or take the dictionary's own parts: its "
        "features in the cache (….hook_sae_acts_post) times their rows of W_dec, and ….hook_sae_error.",
    )


def require(cache: "ActivationCache", names: Sequence[str], what: str) -> None:
    """Checks that a cache holds every activation that an analysis needs.

    Raises:
        UnknownHookError: some are missing; the message names the first, and the ``names_filter`` that keeps all.
    """
    if missing := [name for name in names if name not in cache.cache_dict]:
        others = f" and {len(missing) - 1} more activations" if len(missing) > 1 else ""
        ends = sorted({stage_of(name)[1] for name in names})
        wanted = f"name.endswith({tuple(ends)})" if len(ends) > 1 else f"name.endswith({stage_of(missing[0])[1]!r})"
        raise UnknownHookError(
            f"{what} needs {missing[0]!r}{others}, not kept in this cache. Keep what it needs: "
            f"run_with_cache(..., names_filter=lambda name: {wanted})."
        )


def stream_name(cache: "ActivationCache", layer: int, mlp_input: bool = False) -> str:
    """Returns the hook name of the stream that enters a layer (or its MLP); ``layer=n_layers`` means its end."""
    cfg = cache.cfg
    if mlp_input and not cfg.parallel_attn_mlp:
        return f"blocks.{layer}.hook_resid_mid"
    before, after = f"blocks.{layer}.hook_resid_pre", value_after(f"blocks.{layer - 1}.hook_resid_post", cfg.splices)
    return after if layer == cfg.n_layers or (before not in cache.cache_dict and after in cache.cache_dict) else before


def scale_name(cfg: HookedTransformerConfig, layer: int, mlp_input: bool = False) -> str | None:
    """Returns the hook name of the scale of the norm before a layer (or its MLP); ``None`` without norms.

    Raises:
        InputError: the model has norms, but none before this layer.
    """
    if cfg.normalization_type is None:
        return None
    if cfg.use_normalization_of_residual:
        raise InputError(
            "This model has norms on the residual stream itself (use_normalization_of_residual) and none between it "
            "and what reads it, so there is no norm to apply to a part of the stream. Pass apply_ln=False."
        )
    if layer == cfg.n_layers:
        return "ln_final.hook_scale"
    if not cfg.has_norms_before:
        raise InputError(
            f"Layer {layer} of this model reads the residual stream as it is (use_normalization_after_only): there is "
            "no norm to apply. Pass apply_ln=False, or layer=None for the final norm."
        )
    return f"blocks.{layer}.{'ln2' if mlp_input else 'ln1'}.hook_scale"


def norm_scale(cache: "ActivationCache", name: str) -> jax.Array:
    """Returns a norm's cached scale ``[batch, pos, 1]``; of a scale per head, the first: heads read the same stream."""
    scale = cache[name]
    return scale[..., 0, :] if scale.ndim == 3 + has_batch_axis(cache) else scale


def centres(cfg: HookedTransformerConfig, layer: int) -> bool:
    """Whether the norm before a layer subtracts the mean; ``layer=n_layers`` means the final norm."""
    kind = cfg.normalization_type or ""
    return kind.startswith("LN") and not (layer == cfg.n_layers and cfg.final_rms)


def has_batch_axis(cache: "ActivationCache") -> bool:
    """Whether the arrays have a batch axis now: inside ``jax.vmap`` over prompts they do not."""
    table = point_table(cache.cfg)
    for name, value in cache.items():
        if name in table and not table[name].read_by:
            return value.ndim == len(table[name].axes)
    return cache.has_batch_dim


def reader_of(
    cache: "ActivationCache", layer: int, mlp_input: bool, apply_ln: bool, projection: jax.Array | None = None
) -> Reader:
    """Returns the reader of the stream at a layer: its norm if ``apply_ln``, then the projection if there is one."""
    name = scale_name(cache.cfg, layer, mlp_input) if apply_ln else None
    return Reader(None if name is None else norm_scale(cache, name), projection)


def position_cut(
    cache: "ActivationCache", slice_input: SliceInput, like: jax.Array, axis: int = -2
) -> Cut | positions.TextCut | None:
    """Checks a slice of the position axis (``axis`` of ``like``); where padding is known, it cuts each prompt's text.

    Raises:
        CacheError: a prompt lacks a position, or the slice keeps nothing or has no known form.
    """
    length, mask = like.shape[axis], cache.token_mask
    if is_full(slice_input) or mask is None or not positions.may_pad(mask):
        return cut(slice_input, length, "the cache has {} positions")
    if mask.shape[-1] != length:
        raise CacheError(
            f"The activations have {length} positions, the padding marks of their cache {mask.shape[-1]}: they were "
            "cut after the run. Keep fewer positions with run_with_cache(pos_slice=...) instead."
        )
    return text_cut(mask, slice_input, length)


def text_cut(mask: jax.Array, slice_input: SliceInput, length: int) -> positions.TextCut:
    """Returns a slice that counts positions in each prompt's own text, without padding.

    Raises:
        CacheError: as :func:`position_cut`.
    """
    try:
        return positions.text_cut(mask, read_slice(slice_input, length))
    except positions.NoPosition as error:
        raise CacheError(str(error)) from None


def directions(cfg: HookedTransformerConfig, project_output_onto: Any) -> jax.Array | None:
    """Returns directions as columns ``[d_model, direction]``, or ``None`` if none are given.

    Raises:
        CacheError: they are not a floating-point vector or matrix with ``d_model`` rows.
    """
    if project_output_onto is None:
        return None
    given = jnp.asarray(project_output_onto)
    if given.ndim not in (1, 2) or given.shape[0] != cfg.d_model or not jnp.issubdtype(given.dtype, jnp.floating):
        raise CacheError(
            f"project_output_onto has shape {given.shape} and dtype {given.dtype}: give one direction "
            f"[d_model={cfg.d_model}] or several as columns [{cfg.d_model}, n], such as model.W_U[:, tokens]."
        )
    return given.astype(cfg.jnp_dtype).reshape(cfg.d_model, -1)


def unprojected_axis(rows: jax.Array, project_output_onto: Any) -> jax.Array:
    """Drops the last axis if ``project_output_onto`` is a single direction."""
    return rows[..., 0] if project_output_onto is not None and jnp.ndim(project_output_onto) == 1 else rows
