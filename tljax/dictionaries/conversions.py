"""Exact conversions of a dictionary to another form of the activations that it reads or writes.

Each returns a dictionary that gives on the new activations the features it gave on the old ones.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from tljax.dictionaries.maths.config import DictionaryConfig
from tljax.errors import DictionaryError

if TYPE_CHECKING:
    from tljax.dictionaries.dictionary import Dictionary

_LINEAR = ("none", "expected_average_only_in", "covariance_whitening")
"""Normalisations that leave the input alone."""


def with_gain(dictionary: "Dictionary", gain: jax.Array | None, bias: jax.Array | None) -> "Dictionary":
    """Returns a transcoder that reads a norm's quotient, from one that reads it after gain and bias.

    It read ``x * gain + bias``, and now reads ``x``: ``W_enc`` takes the gain, ``b_enc`` the bias.

    Raises:
        DictionaryError: the dictionary reconstructs what it reads, or its encoder is not linear in it.
    """
    cfg = dictionary.cfg
    if gain is None and bias is None:
        return dictionary
    _check_linear(cfg, "The gain of a norm")
    if not cfg.transcoder:
        raise DictionaryError(
            "A dictionary that reconstructs what it reads cannot move to before the norm's gain, only a transcoder "
            "can: use it where it was trained, at mlp.hook_in."
        )
    params = dict(dictionary.params)
    if bias is not None:
        params = _shifted(params, bias.astype(dictionary.dtype))
        if "W_skip" in params:
            params["b_dec"] = params["b_dec"] + params["W_skip"] @ bias.astype(dictionary.dtype)
    if gain is not None:
        gain = gain.astype(dictionary.dtype)
        params["W_enc"] = params["W_enc"] * gain[:, None]
        if "W_skip" in params:
            params["W_skip"] = params["W_skip"] * gain[None, :]
    return dictionary.replace(params=params)


def moved(dictionary: "Dictionary", offset: jax.Array) -> "Dictionary":
    """Returns a dictionary of activations ``x``, from one of ``x + offset``; the reconstruction moves with them.

    Args:
        dictionary: reconstructs what it reads.
        offset: ``[d_in]``.

    Raises:
        DictionaryError: the encoder is not linear.
    """
    cfg = dictionary.cfg
    _check_linear(cfg, "A shift of the activations", tied=not cfg.apply_b_dec_to_input)
    params, offset = dict(dictionary.params), offset.astype(dictionary.dtype)
    if not cfg.apply_b_dec_to_input:
        params = _shifted(params, offset)
    params["b_dec"] = params["b_dec"] - offset
    return dictionary.replace(params=params)


def reading_uncentred(dictionary: "Dictionary") -> "Dictionary":
    """Returns a dictionary of raw residual activations, from one of activations less their mean over ``d_model``.

    The mean passes by the dictionary: it is taken off before encoding, and put back on the reconstruction.

    Raises:
        DictionaryError: the dictionary normalises its input, and its norm would not be what it was.
    """
    cfg = dictionary.cfg
    if cfg.normalize_activations == "layer_norm":
        return dictionary  # takes the mean off and puts it back anyway
    if cfg.normalize_activations not in _LINEAR:
        raise DictionaryError(
            f'normalize_activations="{cfg.normalize_activations}" depends on the mean of activations.'
        )
    params = dict(dictionary.params)
    if "W_skip" in params:
        params["W_skip"] = params["W_skip"] - params["W_skip"].mean(axis=-1, keepdims=True)
    return dictionary.replace(params=params, cfg=cfg.replace(normalize_activations="center"))


def writing_centred(dictionary: "Dictionary") -> "Dictionary":
    """Returns a transcoder whose output is less its mean over ``d_model``, from one whose output is not."""
    params = dict(dictionary.params)
    for name, axis in {"W_dec": -1, "b_dec": -1, "W_skip": -2}.items():
        if name in params:
            params[name] = params[name] - params[name].mean(axis=axis, keepdims=True)
    return dictionary.replace(params=params)


def _check_linear(cfg: DictionaryConfig, what: str, tied: bool = True) -> None:
    """Checks that pre-activations are linear in the input, and with ``tied`` that the encoder is its own matrix."""
    if cfg.normalize_activations not in _LINEAR:
        raise DictionaryError(
            f'{what} cannot be folded into a dictionary with normalize_activations="{cfg.normalize_activations}", '
            "which is not linear in what it reads."
        )
    if tied and cfg.architecture in ("matching_pursuit", "temporal"):
        raise DictionaryError(
            f"{what} cannot be folded into a {cfg.architecture} dictionary: its encoder is its decoder."
        )


def _shifted(params: dict[str, jax.Array], offset: jax.Array) -> dict[str, jax.Array]:
    """Returns parameters whose pre-activations are those of an input with ``offset`` added."""
    shift = jnp.matmul(offset, params["W_enc"], precision="highest")
    if "b_gate" in params:
        moved = {"b_gate": params["b_gate"] + shift, "b_mag": params["b_mag"] + shift * jnp.exp(params["r_mag"])}
        return params | moved
    return params | {"b_enc": params["b_enc"] + shift}
