"""From the residual stream to logits: the attribution of a logit to its parts, and the logit lens."""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tljax.cache import access, residual
from tljax.cache.slices import SliceInput
from tljax.checks import take
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.modules.activations import scaled
from tljax.modules.embedding import Unembed, final_norm, finish_logits
from tljax.modules.norm import norm_gain
from tljax.numerics import matmul_precision, widened
from tljax.typing import Params

if TYPE_CHECKING:
    from tljax.cache.activation_cache import ActivationCache
    from tljax.model.hooked_transformer import HookedTransformer


@access.checked
def logit_attrs(
    cache: "ActivationCache",
    residual_stack: Any,
    tokens: Any,
    incorrect_tokens: Any = None,
    pos_slice: SliceInput = None,
    batch_slice: SliceInput = None,
    has_batch_dim: bool = True,
    *,
    final_norm_weight: bool = True,
) -> jax.Array:
    """Computes what each part of the final residual stream adds to a token's logit, or to a difference of two logits.

    The parts of the whole stream add up: ``logit_attrs(get_full_resid_decomposition(), t).sum(0) + logit_bias(t)``
    is the logit of ``t``, before any soft cap.

    Args:
        residual_stack: ``[component, batch, pos, d_model]``, positions cut by ``pos_slice`` already.
        tokens: a string that is one token, an id, or ids ``[batch]`` or ``[batch, pos]``.
        incorrect_tokens: as many tokens, whose logits are subtracted.
        pos_slice: the positions that the stack was cut to.
        batch_slice: prompts to keep; the stack may be cut to them already.
        has_batch_dim: ``False`` if ``batch_slice`` has already removed the batch axis of the stack.
        final_norm_weight: multiply by the weight of ``ln_final`` where it is not folded into ``W_U``, as the model
            does. ``False`` leaves it out, as TransformerLens does: the attributions then do not add up.

    Returns:
        ``[component, batch, pos]``.
    """
    cfg, model = cache.cfg, cache.model
    access.refuse_norms_of_the_stream(cfg, "logit_attrs")
    ids, wrong = token_ids(model, tokens, incorrect_tokens)
    name = access.scale_name(cfg, cfg.n_layers)
    end = access.stream_name(cache, cfg.n_layers)
    access.require(cache, [end if name is None else name], "logit_attrs")
    scale = access.norm_scale(cache, name) if name else jnp.ones_like(cache[end][..., :1])
    stack, scale = residual.aligned(cache, residual_stack, scale, pos_slice, batch_slice, has_batch_dim)
    for given in (ids, wrong):
        _check_shape(given, scale.shape[:-1])
    gain = norm_gain(cfg, model.params.get("ln_final", {})) if final_norm_weight else None
    return _attributed(
        stack, scale, model.W_U, gain, ids, wrong, cfg=cfg.computation, centred=access.centres(cfg, cfg.n_layers)
    )


@access.checked
def logit_bias(cache: "ActivationCache", tokens: Any, incorrect_tokens: Any = None) -> jax.Array:
    """Computes the part of a logit, or of a difference of two, that comes from biases and not from the residual stream.

    Returns:
        ``logits_multiplier * (b_U + ln_final.b @ W_U)`` at the tokens, in their shape.
    """
    cfg, model = cache.cfg, cache.model
    ids, wrong = token_ids(model, tokens, incorrect_tokens)
    bias = model.b_U
    if (offset := model.params.get("ln_final", {}).get("b")) is not None:
        with matmul_precision(cfg):
            bias = bias + offset @ model.W_U
    own = take(bias, ids)
    return scaled(own if wrong is None else own - take(bias, wrong), cfg.logits_multiplier)


@access.checked
def logit_lens(
    cache: "ActivationCache",
    layer: int | None = None,
    incl_mid: bool = False,
    pos_slice: SliceInput = None,
    mlp_input: bool = False,
    return_labels: bool = False,
) -> Any:
    """Computes the logits that each depth of the residual stream would give (nostalgebraist 2020, the logit lens).

    Each row of :meth:`accumulated_resid` goes through the model's own final norm, unembedding, multiplier and soft
    cap, so that the last row is the model's output.

    Args:
        layer, incl_mid, pos_slice, mlp_input, return_labels: as for :meth:`accumulated_resid`.

    Returns:
        ``[component, batch, pos, d_vocab_out]``, and the labels if asked for.
    """
    cfg, model = cache.cfg, cache.model
    stack, labels = residual.accumulated_resid(cache, layer, incl_mid, False, pos_slice, mlp_input, True)
    logits = read_out(stack, end_params(model), cfg=cfg.computation)
    return (logits, labels) if return_labels else logits


def token_ids(model: "HookedTransformer", tokens: Any, incorrect: Any) -> tuple[jax.Array, jax.Array | None]:
    """Returns the ids of ``tokens``, and of ``incorrect``, the tokens to subtract.

    Raises:
        InputError: they are not ids of the output vocabulary, or differ in shape.
        TokenizerError: a string is not exactly one token, or there is no tokenizer.
    """
    ids = _ids(model, tokens, "tokens")
    if incorrect is None:
        return ids, None
    wrong = _ids(model, incorrect, "incorrect_tokens")
    if wrong.shape != ids.shape:
        raise InputError(
            f"tokens have shape {ids.shape} and incorrect_tokens {wrong.shape}: give as many of one as of the other."
        )
    return ids, wrong


def _ids(model: "HookedTransformer", tokens: Any, what: str) -> jax.Array:
    if isinstance(tokens, str):
        tokens = model.to_single_token(tokens)
    elif isinstance(tokens, list | tuple) and tokens and all(isinstance(token, str) for token in tokens):
        tokens = [model.to_single_token(token) for token in tokens]
    ids: Any = tokens if isinstance(tokens, Tracer) else np.asarray(tokens)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise InputError(
            f"{what} must be a string that is one token, an id, or integer ids [batch] or [batch, pos], got "
            f"{type(tokens).__name__} of {ids.dtype}."
        )
    n = model.cfg.d_vocab_out
    if isinstance(ids, np.ndarray) and ids.size and (ids.min() < 0 or ids.max() >= n):
        outside = ids[(ids < 0) | (ids >= n)].flat[0]
        raise InputError(f"{what} holds {outside}, which is no id of the output vocabulary: ids are 0 to {n - 1}.")
    return jnp.asarray(ids)


def _check_shape(ids: jax.Array | None, lead: tuple[int, ...]) -> None:
    if ids is not None and ids.shape != lead[: ids.ndim]:
        options = " or ".join(str(lead[:n]) for n in range(len(lead) + 1))
        raise InputError(
            f"Tokens of shape {ids.shape} do not fit activations of [batch, pos] {lead}: give ids of shape {options}, "
            "cut by pos_slice and batch_slice as the activations are."
        )


def logit_directions(model: "HookedTransformer", ids: jax.Array, wrong: jax.Array | None = None) -> jax.Array:
    """Returns directions ``[..., d_model]`` whose dot products with normalised vectors are logits or their differences.

    They include the weight of ``ln_final`` where it is not folded into ``W_U``.
    """
    gain = norm_gain(model.cfg, model.params.get("ln_final", {}))
    return _directions(model.W_U, gain, ids, wrong, widened(model.W_U.dtype))


def _directions(
    W_U: jax.Array, gain: jax.Array | None, ids: jax.Array, wrong: jax.Array | None, wide: jnp.dtype
) -> jax.Array:
    direction = take(W_U, ids, axis=1)
    if wrong is not None:
        direction = direction - take(W_U, wrong, axis=1)
    direction = jnp.moveaxis(direction.astype(wide), 0, -1)
    return (
        direction if gain is None else direction * gain.astype(wide).reshape((1,) * (direction.ndim - 1) + gain.shape)
    )


@functools.partial(jax.jit, static_argnames=("cfg", "centred"))
def _attributed(
    stack: jax.Array,
    scale: jax.Array,
    W_U: jax.Array,
    gain: jax.Array | None,
    ids: jax.Array,
    wrong: jax.Array | None,
    *,
    cfg: HookedTransformerConfig,
    centred: bool,
) -> jax.Array:
    """Computes dot products with the tokens' directions, to which the norm's centring and weight are applied."""
    wide = widened(stack.dtype)
    direction = _directions(W_U, gain, ids, wrong, wide)
    if centred:
        direction = direction - direction.mean(axis=-1, keepdims=True)
    lead = (1,) * (scale.ndim - direction.ndim)  # one token a prompt serves all its positions
    direction = direction.reshape(1, *direction.shape[:-1], *lead, direction.shape[-1])
    products = (stack.astype(wide) * direction).sum(axis=-1)
    return scaled((products / scale[None, ..., 0].astype(wide)).astype(stack.dtype), cfg.logits_multiplier)


def end_params(model: "HookedTransformer") -> Params:
    """Returns the parameters of the final norm and the unembedding."""
    return {"ln_final": model.params.get("ln_final", {}), "unembed": model.params["unembed"]}


@functools.partial(jax.jit, static_argnames="cfg")
def read_out(stack: jax.Array, params: Params, *, cfg: HookedTransformerConfig) -> jax.Array:
    """Computes logits ``[..., d_vocab_out]`` of ``[..., d_model]``: final norm, unembedding, multiplier, soft cap.

    Args:
        stack: vectors of the residual stream.
        params: :func:`end_params` of the model.
        cfg: the model's config.
    """
    rows = stack.reshape(1, -1, stack.shape[-1])
    with matmul_precision(cfg):
        normalized: Any = final_norm(cfg).apply({"params": params["ln_final"]}, rows)
        unembedded: Any = Unembed(cfg).apply({"params": params["unembed"]}, normalized)
        logits = finish_logits(cfg, unembedded)
    return logits.reshape(*stack.shape[:-1], -1)
