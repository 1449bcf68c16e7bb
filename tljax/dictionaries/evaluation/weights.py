"""What a dictionary's weights say by themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import typed
from tljax.dictionaries.cross_layer import CrossLayerTranscoder
from tljax.dictionaries.crosscoder import Crosscoder
from tljax.dictionaries.dictionary import Dictionary
from tljax.dictionaries.evaluation.sites import AnyDictionary

_ROWS = 1024
"""Features whose cosines with all others are computed at once."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WeightFigures:
    """Numbers of each feature's weights, ``[d_sae]``.

    Attributes:
        encoder_norm, decoder_norm: norms of its encoder column and decoder row, over all sources of a crosscoder.
        encoder_bias: its ``b_enc``; zero where the architecture has none.
        encoder_decoder_cosine_sim: cosine of the two; NaN where they live in spaces of different widths.
        max_decoder_cosine_sim: largest cosine of its decoder row with another feature's; NaN for a row of zeros.
    """

    encoder_norm: np.ndarray
    decoder_norm: np.ndarray
    encoder_bias: np.ndarray
    encoder_decoder_cosine_sim: np.ndarray
    max_decoder_cosine_sim: np.ndarray


@typed
def weight_figures(dictionary: AnyDictionary) -> WeightFigures:
    """Computes norms and cosines of a dictionary's features, without any data.

    Args:
        dictionary: a dictionary; of a cross-layer transcoder the layers' features follow one another.
    """
    encoder, decoder, bias = _matrices(dictionary)
    encoder_norm, decoder_norm = (np.linalg.norm(one, axis=-1) for one in (encoder, decoder))
    with np.errstate(invalid="ignore", divide="ignore"):
        same = encoder.shape == decoder.shape
        cosine = (encoder * decoder).sum(-1) / (encoder_norm * decoder_norm) if same else np.full(len(decoder), np.nan)
    return WeightFigures(
        encoder_norm=encoder_norm,
        decoder_norm=decoder_norm,
        encoder_bias=bias,
        encoder_decoder_cosine_sim=cosine,
        max_decoder_cosine_sim=_nearest_cosines(decoder),
    )


def decoder_rows(dictionary: AnyDictionary) -> np.ndarray:
    """Returns each feature's decoder direction, ``[d_sae, width]``, all sources or layers side by side."""
    return _matrices(dictionary)[1]


def _matrices(dictionary: AnyDictionary) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns encoders ``[d_sae, width]``, decoders ``[d_sae, width]`` and biases ``[d_sae]``, in float64."""
    match dictionary:
        case Dictionary():
            encoder, decoder, bias = dictionary.W_enc.T, dictionary.W_dec, dictionary.b_enc
        case Crosscoder():
            params = dictionary.params
            encoder = jnp.moveaxis(params["W_enc"], -1, 0).reshape(dictionary.cfg.d_sae, -1)
            decoder, bias = params["W_dec"].reshape(dictionary.cfg.d_sae, -1), params["b_enc"]
        case CrossLayerTranscoder():
            layers, (n, d) = dictionary.layers, (dictionary.cfg.n_layers, dictionary.cfg.d_in)
            encoder = jnp.concatenate([layer["W_enc"].T for layer in layers])
            bias = jnp.concatenate([layer["b_enc"] for layer in layers])
            written = [jnp.pad(layer["W_dec"], ((0, 0), (own, 0), (0, 0))) for own, layer in enumerate(layers)]
            decoder = jnp.concatenate([one.reshape(-1, n * d) for one in written])
    zeros = np.zeros(decoder.shape[0])
    return np.asarray(encoder, np.float64), np.asarray(decoder, np.float64), zeros if bias is None else np.asarray(bias)


@jax.jit
def _cosines_with_all(rows: jax.Array, all_rows: jax.Array, start: jax.Array) -> jax.Array:
    cosines = jnp.matmul(rows, all_rows.T, precision="highest")
    own = jnp.arange(rows.shape[0])[:, None] + start == jnp.arange(all_rows.shape[0])[None]
    return jnp.max(jnp.where(own, -jnp.inf, cosines), axis=-1)


def _nearest_cosines(decoder: np.ndarray) -> np.ndarray:
    """Returns the largest cosine of each row with another, ``_ROWS`` rows at a time; NaN for zeros, or one row."""
    norms = np.linalg.norm(decoder, axis=-1, keepdims=True)
    if len(decoder) == 1:
        return np.full(1, np.nan)
    unit = jnp.asarray(decoder / np.where(norms == 0, 1, norms), jnp.float32)
    nearest = [_cosines_with_all(unit[at : at + _ROWS], unit, jnp.asarray(at)) for at in range(0, len(decoder), _ROWS)]
    return np.where(norms[:, 0] == 0, np.nan, np.concatenate([np.asarray(one) for one in nearest]))
