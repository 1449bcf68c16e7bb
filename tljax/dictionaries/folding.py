"""Folds: the same reconstruction from rescaled parameters."""

from typing import TYPE_CHECKING

import jax.numpy as jnp

from tljax.errors import DictionaryError

if TYPE_CHECKING:
    from tljax.dictionaries.dictionary import Dictionary

_SMALLEST = 1e-8
"""Decoder norms below it count as it, so that a dead row gives no NaN."""


def fold_W_dec_norm(dictionary: "Dictionary") -> "Dictionary":
    """Returns the dictionary with decoder rows of unit norm and features multiplied by the norms they had.

    The reconstruction is the same. Features whose selection would change are refused: a ``topk`` dictionary can be
    folded only if it selects by rescaled features.

    Raises:
        DictionaryError: the fold would change which features are selected.
    """
    cfg = dictionary.cfg
    selects = cfg.architecture in ("topk", "abstopk", "batchtopk", "groupmax")
    if (selects and not cfg.rescale_acts_by_decoder_norm) or cfg.architecture in ("matching_pursuit", "temporal"):
        raise DictionaryError(
            f"Folding decoder norms into a {cfg.architecture} dictionary would change which features it selects"
            + (" (rescale_acts_by_decoder_norm is off)." if selects else ".")
        )
    norms = jnp.maximum(dictionary.decoder_norms, _SMALLEST)
    params = dict(dictionary.params)
    params["W_dec"] = params["W_dec"] / norms[..., :, None]
    params["W_enc"] = params["W_enc"] * norms[..., None, :]
    for name in ("b_enc", "threshold", "b_gate", "b_mag"):
        if name in params:
            params[name] = params[name] * norms
    return dictionary.replace(params=params, cfg=cfg.replace(rescale_acts_by_decoder_norm=False))


def fold_activation_norm(dictionary: "Dictionary", scale: float) -> "Dictionary":
    """Returns a dictionary that takes raw activations, from one that was trained on activations times ``scale``.

    Raises:
        DictionaryError: the dictionary normalises its input in another way than by one number.
    """
    cfg = dictionary.cfg
    if cfg.normalize_activations not in ("none", "expected_average_only_in"):
        raise DictionaryError(
            f'A scale cannot be folded under normalize_activations="{cfg.normalize_activations}", only under '
            '"expected_average_only_in".'
        )
    if not 0 < scale < float("inf"):
        raise DictionaryError(f"The scale {scale} must be positive and finite.")
    params = dict(dictionary.params)
    params["W_enc"] = params["W_enc"] * scale
    params["W_dec"] = params["W_dec"] / scale
    params["b_dec"] = params["b_dec"] / scale
    return dictionary.replace(params=params, cfg=cfg.replace(normalize_activations="none"))


def scale_biases(dictionary: "Dictionary", scale: float) -> "Dictionary":
    """Returns a dictionary of activations times ``scale``, whose features are those of the given one times ``scale``.

    dictionary_learning's function of that name, for its dictionaries: with biases and thresholds times ``scale``,
    ``f(scale * x) = scale * f(x)``.

    Raises:
        DictionaryError: the dictionary normalises its input, or selects features by more than their values.
    """
    cfg = dictionary.cfg
    if cfg.normalize_activations != "none" or cfg.architecture in ("matching_pursuit", "temporal"):
        raise DictionaryError(
            f'Biases cannot be scaled under normalize_activations="{cfg.normalize_activations}" and '
            f"architecture={cfg.architecture!r}."
        )
    if not 0 < scale < float("inf"):
        raise DictionaryError(f"The scale {scale} must be positive and finite.")
    scaled = ("b_enc", "b_dec", "threshold", "b_gate", "b_mag")
    params = {name: array * scale if name in scaled else array for name, array in dictionary.params.items()}
    return dictionary.replace(params=params)
