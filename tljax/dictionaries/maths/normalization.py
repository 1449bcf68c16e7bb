"""Normalisation of activations before they are encoded, and its inverse on the reconstruction."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tljax.dictionaries.maths.config import DictionaryConfig

_EPS = 1e-5


class Factors(NamedTuple):
    """What undoes a normalisation: ``output * scale + shift``; each broadcasts to the activations."""

    scale: jax.Array | float = 1.0
    shift: jax.Array | float = 0.0

    def undo(self, output: jax.Array) -> jax.Array:
        """Returns the reconstruction in the units of the input."""
        return output * self.scale + self.shift


UNCHANGED = Factors()


def depends_on_input(cfg: DictionaryConfig) -> bool:
    """Whether decoding needs the activations that were encoded."""
    return cfg.normalize_activations in ("constant_norm_rescale", "layer_norm", "center") and not cfg.transcoder


def normalize(x: jax.Array, cfg: DictionaryConfig) -> tuple[jax.Array, Factors]:
    """Normalises activations ``[..., d_in]``.

    ``layer_norm`` divides by the unbiased standard deviation plus 1e-5; ``constant_norm_rescale`` gives each token the
    norm ``sqrt(d_in)``; ``constant_scalar_rescale`` multiplies by ``cfg.scale``; ``center`` takes off the mean over
    ``d_in`` (tljax's own: for dictionaries of a model with centred weights, on the same model without). The remaining
    modes are folded into the weights when training ends and do nothing here.
    """
    match cfg.normalize_activations:
        case "constant_norm_rescale":
            factor = jnp.sqrt(jnp.asarray(x.shape[-1], x.dtype)) / jnp.linalg.norm(x, axis=-1, keepdims=True)
            return x * factor, Factors(1 / factor)
        case "layer_norm":
            mean = x.mean(axis=-1, keepdims=True)
            centred = x - mean
            deviation = jnp.std(centred, axis=-1, keepdims=True, ddof=1)
            return centred / (deviation + _EPS), Factors(deviation, mean)
        case "center":
            mean = x.mean(axis=-1, keepdims=True)
            return x - mean, Factors(1.0, mean)
        case "constant_scalar_rescale":
            return x * cfg.scale, Factors(1 / cfg.scale)
        case _:
            return x, UNCHANGED
