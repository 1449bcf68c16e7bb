"""Reading the residual stream out of a cache: its value at each depth, what was added to it, the norm that reads it."""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from tljax.cache import access
from tljax.cache.slices import Cut, SliceInput, apply_slice, cut
from tljax.cache.writers import Pieces, read_parts
from tljax.errors import CacheError
from tljax.text.positions import TextCut

if TYPE_CHECKING:
    from tljax.cache.activation_cache import ActivationCache, ArraysByName

MODES = ("all", "attn", "mlp")


@access.checked
def stack_activation(
    cache: "ArraysByName", activation_name: str, layer: int = -1, sublayer_type: str | None = None
) -> jax.Array:
    """Stacks one activation over layers.

    Args:
        activation_name: short name, such as ``"resid_post"`` or ``"z"``.
        layer: stop before this layer; ``-1`` stacks every layer.
        sublayer_type: ``"ln1"``, ``"ln2"``, ``"attn"`` or ``"mlp"`` where the name alone is ambiguous.

    Returns:
        ``[layer, ...]``.
    """
    last = access.bounded_layer(cache.cfg, layer)
    if not last:
        raise CacheError(f"layer={layer} stacks nothing: give 1 to {cache.cfg.n_layers}, or -1 for all.")
    keys = [(activation_name, n, sublayer_type) if sublayer_type else (activation_name, n) for n in range(last)]
    return jnp.stack([cache[key] for key in keys])


@access.checked
def accumulated_resid(
    cache: "ActivationCache",
    layer: int | None = None,
    incl_mid: bool = False,
    apply_ln: bool = False,
    pos_slice: SliceInput = None,
    mlp_input: bool = False,
    return_labels: bool = False,
) -> Any:
    """Stacks the residual stream at each depth; :meth:`logit_lens` turns it into logits.

    Args:
        layer: up to the input of this layer; ``None`` or ``-1`` means the final residual stream too.
        incl_mid: also the stream between attention and MLP.
        apply_ln: normalise as the reader of the last row would: for the final layer each row goes through
            ``ln_final`` itself, otherwise the cached scale of that layer's norm is used for all rows.
        pos_slice: positions to keep, of each prompt's text; a number drops the axis.
        mlp_input: with ``layer``, also include the stream that enters its MLP.
        return_labels: also return ``["0_pre", "0_mid", …, "final_post"]``.

    Returns:
        ``[component, batch, pos, d_model]``, and the labels if asked for.
    """
    cfg = cache.cfg
    last = access.bounded_layer(cfg, layer, mlp_input)
    rows: list[tuple[str, str]] = []
    for n in range(last + 1):
        if n == cfg.n_layers:
            rows.append(("final_post", access.stream_name(cache, n)))
            continue
        rows.append((f"{n}_pre", f"blocks.{n}.hook_resid_pre"))
        if cfg.has_resid_mid and ((incl_mid and n < last) or (mlp_input and n == last)):
            rows.append((f"{n}_mid", f"blocks.{n}.hook_resid_mid"))
    names = [name for _, name in rows]
    access.require(cache, names, "accumulated_resid")
    taken = access.position_cut(cache, pos_slice, cache[names[0]])
    stack = jnp.stack([_sliced(cache[name], taken) for name in names])
    if apply_ln:
        at_end = last == cfg.n_layers
        stack = apply_ln_to_stack(cache, stack, last, mlp_input, pos_slice, recompute_ln=at_end)
    return (stack, [label for label, _ in rows]) if return_labels else stack


def layer_outputs(cfg: Any, last: int, mlp_input: bool, mode: str) -> list[tuple[str, str]]:
    """Returns label and hook name of every attention and MLP output in the stream before a layer (or its MLP)."""
    rows = []
    for n in range(last):
        if mode != "mlp":
            rows.append((f"{n}_attn_out", f"blocks.{n}.hook_attn_out"))
        if mode != "attn" and not cfg.attn_only:
            rows.append((f"{n}_mlp_out", f"blocks.{n}.hook_mlp_out"))
    if mlp_input and mode != "mlp" and not cfg.parallel_attn_mlp:
        rows.append((f"{last}_attn_out", f"blocks.{last}.hook_attn_out"))
    return rows


def embeddings(cfg: Any) -> list[tuple[str, str]]:
    """Returns label and hook name of each embedding that starts the stream."""
    rows = [("embed", "hook_embed")]
    return [*rows, ("pos_embed", "hook_pos_embed")] if cfg.positional_embedding_type == "standard" else rows


@access.checked
def decompose_resid(
    cache: "ActivationCache",
    layer: int | None = None,
    mlp_input: bool = False,
    mode: str = "all",
    apply_ln: bool = False,
    pos_slice: SliceInput = None,
    incl_embeds: bool = True,
    return_labels: bool = False,
) -> Any:
    """Stacks what embeddings, attentions and MLPs add to the residual stream; with ``mode="all"`` the rows sum to it.

    Args:
        layer: decompose the stream that enters this layer; ``None`` or ``-1`` means the final one.
        mlp_input: decompose the stream that enters the layer's MLP instead. This adds the layer's attention, unless
            attention and MLP run in parallel and read the same stream (TransformerLens adds it even then).
        mode: ``"all"`` (or ``"full"``), ``"attn"`` or ``"mlp"``.
        apply_ln: apply the norm that reads the stream there, with its cached scale (:meth:`apply_ln_to_stack`).
        pos_slice: positions to keep, of each prompt's text; a number drops the axis.
        incl_embeds: include the embeddings.
        return_labels: also return ``["embed", "pos_embed", "0_attn_out", "0_mlp_out", …]``.

    Returns:
        ``[component, batch, pos, d_model]``, and the labels if asked for.
    """
    cfg = cache.cfg
    access.refuse_norms_of_the_stream(cfg, "decompose_resid")
    access.refuse_dictionaries(cfg, "decompose_resid")
    mode = "all" if mode == "full" else mode
    if mode not in MODES:
        raise CacheError(f"mode={mode!r} is not one of {', '.join(map(repr, MODES))}.")
    last = access.bounded_layer(cfg, layer, mlp_input)
    rows = embeddings(cfg) if incl_embeds else []
    rows += layer_outputs(cfg, last, mlp_input, mode)
    if not rows:
        raise CacheError(
            f"decompose_resid(layer={layer}, mode={mode!r}, incl_embeds=False) has no parts in this model of "
            f"{cfg.n_layers} layers{', attention-only' if cfg.attn_only else ''}: include the embeddings."
        )
    names = [name for _, name in rows]
    scale = access.scale_name(cfg, last, mlp_input) if apply_ln else None
    access.require(cache, names if scale is None else [*names, scale], "decompose_resid")
    reader = access.reader_of(cache, last, mlp_input, apply_ln)
    values = tuple(cache[name] for name in names)
    taken = access.position_cut(cache, pos_slice, values[0])
    centred = apply_ln and access.centres(cfg, last)
    stack = read_parts((Pieces(values),), reader, taken, None, cfg=cfg.computation, centred=centred)
    return (stack, [label for label, _ in rows]) if return_labels else stack


@access.checked
def apply_ln_to_stack(
    cache: "ActivationCache",
    residual_stack: jax.Array,
    layer: int | None = None,
    mlp_input: bool = False,
    pos_slice: SliceInput = None,
    batch_slice: SliceInput = None,
    has_batch_dim: bool = True,
    recompute_ln: bool = False,
) -> jax.Array:
    """Normalises parts of the residual stream with the cached scale of the norm that reads the whole stream.

    Args:
        residual_stack: ``[component, batch, pos, d_model]``, positions cut by ``pos_slice`` already.
        layer: the norm before this layer; ``None``, ``-1`` or ``n_layers`` means ``ln_final``.
        mlp_input: ``ln2`` of that layer instead of ``ln1``.
        pos_slice: the positions that the stack was cut to.
        batch_slice: prompts to keep; the stack may be cut to them already.
        has_batch_dim: ``False`` if ``batch_slice`` has already removed the batch axis of the stack.
        recompute_ln: apply the model's ``ln_final`` to each row instead, with the row's own scale and with weight
            and bias. Only for the final layer.

    Returns:
        The stack, centred if the norm is a layer norm and divided by the scale; no weight and no bias is applied.
    """
    cfg = cache.cfg
    last = access.bounded_layer(cfg, layer, mlp_input)
    name = access.scale_name(cfg, last, mlp_input)
    if name is None:
        return residual_stack
    if last == cfg.n_layers and recompute_ln:
        if batch_slice is not None and access.has_batch_axis(cache) and has_batch_dim:
            residual_stack = apply_slice(residual_stack, batch_slice, 1)
        return cache.model.ln_final(residual_stack)
    access.require(cache, [name], "apply_ln_to_stack")
    stack, scale = aligned(cache, residual_stack, access.norm_scale(cache, name), pos_slice, batch_slice, has_batch_dim)
    return _normalised(stack, scale, access.centres(cfg, last))


def aligned(
    cache: "ActivationCache",
    stack: jax.Array,
    scale: jax.Array,
    pos_slice: SliceInput,
    batch_slice: SliceInput,
    has_batch_dim: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Slices a stack ``[component, batch, pos, d_model]`` and the scale ``[batch, pos, 1]`` of its norm alike.

    The stack's positions are cut already; its batch is cut here, unless it is already.

    Raises:
        CacheError: their shapes do not match.
    """
    stack = jnp.asarray(stack)
    batch = cut(batch_slice, scale.shape[0], "the cache has {} prompts") if access.has_batch_axis(cache) else None
    taken = access.position_cut(cache, pos_slice, scale)
    if batch is not None:
        whole_ndim = 1 + scale.ndim - (taken is not None and taken.drops_axis)
        if has_batch_dim and stack.ndim == whole_ndim and stack.shape[1] == scale.shape[0]:
            stack = batch(stack, 1)
    scale = _sliced(scale, taken)
    scale = scale if batch is None else batch(scale, 0)
    fits = stack.ndim == scale.ndim + 1 and stack.shape[-1] == cache.cfg.d_model
    if not fits or any(n not in (1, m) for n, m in zip(stack.shape[1:-1], scale.shape[:-1], strict=True)):
        wanted = ", ".join(map(str, (*scale.shape[:-1], cache.cfg.d_model)))
        raise CacheError(
            f"The stack has shape {stack.shape}, but this cache, with pos_slice={pos_slice!r} and "
            f"batch_slice={batch_slice!r}, takes [component, {wanted}]. Pass the slices that the stack was made with; "
            "a single piece is stack[None]."
        )
    return stack, scale


def _sliced(array: jax.Array, taken: Cut | TextCut | None) -> jax.Array:
    return array if taken is None else taken(array, -2)


@functools.partial(jax.jit, static_argnums=2)
def _normalised(stack: jax.Array, scale: jax.Array, centred: bool) -> jax.Array:
    if centred:
        stack = stack - stack.mean(axis=-1, keepdims=True)
    return stack / scale[None].astype(stack.dtype)
