"""What is done to activations before training, and undone in the weights after it: scale and whitening."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax import checks
from tljax.dictionaries.training.batches import pairs
from tljax.dictionaries.training.config import TrainingConfig
from tljax.errors import InputError

_EPS = 1e-3
"""Added to the eigenvalues of a covariance, as SAELens does."""


class Whitening(NamedTuple):
    """A map to mean zero and unit covariance, ``(x - mean) @ whiten``.

    Attributes:
        mean: ``[d_in]``.
        whiten: ``[d_in, d_in]``.
        colour: its inverse.
    """

    mean: jax.Array
    whiten: jax.Array
    colour: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Preparation:
    """An affine map of activations, the same for all members of a stack.

    Attributes:
        scale_in: factor of what is encoded; for crosscoders one for each source, ``[n]``. ``None`` for none.
        scale_out: factor of what is reconstructed.
        whitening: applied after the scale; ``None`` for none.
    """

    scale_in: jax.Array | None = None
    scale_out: jax.Array | None = None
    whitening: Whitening | None = None

    def apply(self, x: jax.Array, y: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Returns what is encoded and what is reconstructed; the same array if ``y`` is ``None``."""
        x = _scaled(x.astype(jnp.float32), self.scale_in)
        if self.whitening is not None:
            x = (x - self.whitening.mean[None]) @ self.whitening.whiten
        return x, x if y is None else _scaled(y.astype(jnp.float32), self.scale_out)

    def undo(self, output: jax.Array) -> jax.Array:
        """Returns a reconstruction ``[tokens, d_out]`` for raw activations; not of crosscoders."""
        if self.whitening is not None:
            output = output @ self.whitening.colour + self.whitening.mean[None]
        return output if self.scale_out is None else output / self.scale_out


def _scaled(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    if scale is None:
        return x
    if scale.ndim == 0:
        return x * scale
    return x * jnp.repeat(scale, x.shape[-1] // scale.shape[0])[None]


@checks.typed
def prepare(cfg: TrainingConfig, batches: Callable[[int], Any]) -> Preparation:
    """Estimates what a config does to activations before training, from the first batches.

    Args:
        cfg: the settings; ``normalize_activations`` says what is estimated.
        batches: as for :func:`~tljax.dictionaries.training.train_dictionary`, as a function of the step.

    Raises:
        InputError: the activations are all zero or not finite.
    """
    batch = pairs(batches, cfg)
    if cfg.normalize_activations == "expected_average_only_in":
        inputs, outputs = [], []
        for step in range(cfg.n_batches_for_norm_estimate):
            x, y = batch(step)
            inputs.append(_norms(x, cfg.n_sources or 1))
            outputs.append(inputs[-1] if y is None else _norms(y, 1))
        scale_in = _scale(inputs, cfg.d_in)
        scale_in = scale_in if cfg.n_sources else scale_in[0]
        scale_out = _scale(outputs, cfg.width_out)[0] if cfg.transcoder else scale_in
        return Preparation(jnp.asarray(scale_in, jnp.float32), jnp.asarray(scale_out, jnp.float32))
    if cfg.normalize_activations == "covariance_whitening":
        return _whitening([np.asarray(batch(step)[0], np.float64) for step in range(cfg.n_batches_for_norm_estimate)])
    return Preparation()


def _norms(x: jax.Array | np.ndarray, n_sources: int) -> np.ndarray:
    """Returns the norm of each token in each source, ``[tokens, n]``."""
    rows = np.asarray(x, np.float32)
    return np.linalg.norm(rows.reshape(len(rows), n_sources, -1).astype(np.float64), axis=-1)


def _scale(norms: Sequence[np.ndarray], width: int) -> np.ndarray:
    mean = np.concatenate(norms).mean(axis=0)
    if not (np.isfinite(mean).all() and (mean > 0).all()):
        raise InputError(
            f"The first {len(norms)} batches have mean norms {mean}, from which no scale can be estimated: they hold "
            "NaN, infinities, or only zeros."
        )
    return width**0.5 / mean


def _whitening(batches: Sequence[np.ndarray]) -> Preparation:
    rows = np.concatenate(batches)
    if not np.isfinite(rows).all():
        raise InputError(f"The first {len(batches)} batches hold NaN or infinities: no covariance can be estimated.")
    mean = rows.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(rows, rowvar=False).reshape(rows.shape[1], -1))
    values = np.maximum(values, 0) + _EPS
    arrays = (mean, vectors / np.sqrt(values), np.sqrt(values)[:, None] * vectors.T)
    return Preparation(whitening=Whitening(*(jnp.asarray(array, jnp.float32) for array in arrays)))
