"""Random gates between 0 and 1 whose chance of being open is learned, and what they are once training ends."""

import jax
import jax.numpy as jnp
import numpy as np

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
"""Hard concrete's temperature, and the interval that its values are stretched to before they are cut to 0 to 1."""

_SHARPENING = 0.8
_SMALLEST = 1e-6


def hard_concrete(log_alpha: jax.Array, uniform: jax.Array) -> jax.Array:
    """Draws hard concrete gates (Louizos et al. 2018): exactly 0 or 1 with some chance, otherwise in between.

    Args:
        log_alpha: the larger, the more often a gate is open.
        uniform: numbers from 0 to 1, of the same shape.
    """
    u = jnp.clip(uniform, _SMALLEST, 1 - _SMALLEST)
    s = jax.nn.sigmoid((jnp.log(u) - jnp.log1p(-u) + log_alpha) / TEMPERATURE)
    return jnp.clip(s * (HIGH - LOW) + LOW, 0, 1)


def open_chance(log_alpha: jax.Array) -> jax.Array:
    """Returns the chance that a hard concrete gate is above zero."""
    return jax.nn.sigmoid(log_alpha - TEMPERATURE * np.log(-LOW / HIGH))


def without_noise(log_alpha: jax.Array) -> jax.Array:
    """Returns how open hard concrete gates are without noise, before they become 0 or 1."""
    return jax.nn.sigmoid(log_alpha / TEMPERATURE * _SHARPENING)


def uniform_gradient(theta: jax.Array, uniform: jax.Array) -> jax.Array:
    """Draws gates by uniform gradient sampling (Li and Janson 2024).

    A gate is 1 with chance about ``sigmoid(theta)``, 0 otherwise, and in between in a window of width
    ``w = sigmoid(theta) (1 - sigmoid(theta))``, where alone it has a gradient, ``1 / w``: one on average.

    Args:
        theta: the larger, the more often a gate is open.
        uniform: numbers from 0 to 1, of a shape that broadcasts with ``theta``.
    """
    chance = jax.nn.sigmoid(theta)
    width = jax.lax.stop_gradient(jnp.maximum(chance * (1 - chance), _SMALLEST))
    return 1 - jnp.clip((uniform - chance) / width + 0.5, 0, 1)


def most_open(openness: np.ndarray, edges: np.ndarray, n: int) -> np.ndarray:
    """Returns a mask ``[writer, reader]`` of the ``n`` most open edges; of equally open ones the first.

    Args:
        openness: ``[writer, reader]``.
        edges: which of them are edges, ``[writer, reader]``.
        n: how many to take.
    """
    order = np.argsort(-np.where(edges, openness, -np.inf), axis=None, kind="stable")
    mask = np.zeros(edges.size, bool)
    mask[order[: min(n, int(edges.sum()))]] = True
    return mask.reshape(edges.shape)
