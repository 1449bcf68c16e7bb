"""What features write to the residual stream: their decoder directions, from whatever point they are written at."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.cache.access import centres
from tljax.dictionaries.dictionary import Dictionary
from tljax.errors import DictionaryError, InputError
from tljax.hooks.points import layer_of, point_table, stage_of
from tljax.model.hooked_transformer import HookedTransformer
from tljax.modules.activations import scaled
from tljax.modules.norm import norm_gain
from tljax.numerics import widened
from tljax.quantized_weight import as_floats

STREAM = ("hook_embed", "hook_pos_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post")
"""Points that hold the residual stream, or a part of it at its beginning."""
_WRITTEN = (*STREAM, "hook_attn_out", "hook_mlp_out")


def chosen_features(dictionary: Dictionary, features: Any) -> np.ndarray:
    """Returns numbers of features, ``[feature]``; ``None`` means all.

    Raises:
        InputError: they are no whole numbers, or the dictionary lacks one of them.
    """
    n = dictionary.cfg.d_sae
    if features is None:
        return np.arange(n)
    numbers = np.atleast_1d(np.asarray(features))
    if numbers.ndim != 1 or not numbers.size or numbers.dtype.kind not in "iu":
        raise InputError(f"features={features!r}: give numbers of features, 0 to {n - 1}, one or a list of them.")
    if len(wrong := numbers[(numbers < -n) | (numbers >= n)]):
        raise InputError(f"There is no feature {wrong[0]}: {dictionary!r} has features 0 to {n - 1}.")
    return numbers % n


def decoder_rows(dictionary: Dictionary, features: np.ndarray) -> jax.Array:
    """Returns what one unit of each feature adds where its dictionary writes, ``[feature, d_out]``.

    Normalisations that differ from token to token are left out: what they divide by multiplies the row again.
    """
    cfg, rows = dictionary.cfg, dictionary.W_dec[jnp.asarray(features)]
    if cfg.rescale_acts_by_decoder_norm:
        rows = rows / dictionary.decoder_norms[jnp.asarray(features)][:, None]
    if cfg.normalize_activations == "constant_scalar_rescale" and not cfg.transcoder:
        rows = rows / cfg.scale
    return rows.astype(widened(rows.dtype))


def written_at(dictionary: Dictionary) -> str | None:
    """Returns the full name of the point that a dictionary reconstructs; ``None`` if it does not say."""
    tap = dictionary.cfg.tap
    return tap.reads if tap.writes is None else tap.writes


def stream_directions(model: HookedTransformer, dictionary: Dictionary, features: Any = None) -> jax.Array:
    """Returns what one unit of each feature adds to the residual stream, ``[feature, d_model]``.

    That is the decoder's row where the dictionary writes to the stream (``hook_resid_*``, ``hook_attn_out``,
    ``hook_mlp_out``, also of transcoders). Features of ``attn.hook_z`` go through ``W_O``, those of ``mlp.hook_post``
    through ``W_out``. A dictionary that does not say where it belongs is taken to write to the stream.

    Args:
        model: the model.
        dictionary: the dictionary.
        features: numbers of features; all by default.

    Raises:
        DictionaryError: the dictionary is of another width, or writes where no fixed linear map leads to the stream.
        InputError: a feature that does not exist.
    """
    rows = decoder_rows(dictionary, chosen_features(dictionary, features))
    return through_to_stream(model, dictionary, rows)


def through_to_stream(model: HookedTransformer, dictionary: Dictionary, rows: jax.Array) -> jax.Array:
    """Maps vectors ``[n, d_out]`` from where a dictionary writes to the residual stream, ``[n, d_model]``."""
    cfg, name = model.cfg, written_at(dictionary)
    relative = "hook_resid_pre" if name is None else stage_of(name)[1]
    if name is not None and name not in point_table(cfg):
        raise DictionaryError(
            f"{dictionary!r} writes at {name}, which this model does not have: it belongs to another."
        )
    if relative in _WRITTEN:
        _check_width(dictionary, rows.shape[-1], cfg.d_model)
        return rows
    if relative not in ("attn.hook_z", "mlp.hook_post"):
        raise DictionaryError(
            f"{dictionary!r} writes at {name}, from where no fixed linear map leads to the residual stream. Directions "
            f"are known of dictionaries at {', '.join(_WRITTEN)}, attn.hook_z and mlp.hook_post."
        )
    if cfg.has_norms_after:
        raise DictionaryError(
            f"{name} reaches the residual stream through a norm in this model (ln1_post, ln2_post), which divides by "
            "what the prompt makes it: take the effects of features on a prompt, feature_effects(...)."
        )
    layer = layer_of(name or "") or 0
    block = model.params["blocks"][layer]
    if relative == "attn.hook_z":
        weight = as_floats(block["attn"]["W_O"])
        head = dictionary.cfg.tap.head
        weight = weight.reshape(-1, cfg.d_model) if head is None else weight[head]
    elif cfg.layer_kind(layer).experts:
        raise DictionaryError(f"{name} belongs to a mixture of experts, which has no one W_out.")
    else:
        weight = as_floats(block["mlp"]["W_out"])
    _check_width(dictionary, rows.shape[-1], weight.shape[0])
    out = jnp.matmul(rows, weight.astype(rows.dtype), precision="highest")
    return scaled(out, cfg.residual_multiplier)


def final_readout(model: HookedTransformer, columns: jax.Array | None = None) -> jax.Array:
    """Returns the linear part of the final norm and the unembedding, ``[d_model, d_vocab_out]``.

    ``x @ final_readout(model) / scale``, with the norm's scale of a run, is what ``x`` adds to its logits before any
    soft cap: the mean is taken out where the norm does so, and the norm's weight applies where it is not folded.

    Args:
        model: the model.
        columns: numbers of tokens; all by default.
    """
    cfg = model.cfg
    weight = model.W_U if columns is None else jnp.take(model.W_U, columns, axis=1)
    weight = weight.astype(widened(weight.dtype))
    gain = norm_gain(cfg, model.params.get("ln_final", {}))
    weight = weight if gain is None else weight * gain.astype(weight.dtype)[:, None]
    weight = weight - weight.mean(axis=0, keepdims=True) if centres(cfg, cfg.n_layers) else weight
    return scaled(weight, cfg.logits_multiplier)


def _check_width(dictionary: Dictionary, got: int, expected: int) -> None:
    if got != expected:
        raise DictionaryError(
            f"{dictionary!r} writes vectors of {got} numbers, and this model has {expected} there: it belongs to "
            "another model or another point."
        )
