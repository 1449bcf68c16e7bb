"""The MLP activations TransformerLens names, as plain functions of an array."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tljax.config import ACTIVATIONS


def solu(x: jax.Array) -> jax.Array:
    """``x * softmax(x)`` over the last axis (Elhage et al. 2022, Softmax Linear Units)."""
    return x * jax.nn.softmax(x, axis=-1)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """Computes the tanh approximation of GELU, which GPT-2 uses."""
    return jax.nn.gelu(x, approximate=True)


def gelu_exact(x: jax.Array) -> jax.Array:
    """Computes GELU with the error function."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: jax.Array) -> jax.Array:
    """``x * sigmoid(1.702 x)``, an approximation of GELU (Hendrycks and Gimpel 2016)."""
    return x * jax.nn.sigmoid(1.702 * x)


def relu2(x: jax.Array) -> jax.Array:
    """Computes the squared ReLU."""
    return jnp.square(jax.nn.relu(x))


def xielu(x: jax.Array, alpha_p: jax.Array, alpha_n: jax.Array, beta: jax.Array, eps: jax.Array) -> jax.Array:
    """``a x² + b x`` above zero and ``c (exp(x) - 1 - x) + b x`` below it (Huang and Schlag 2024, xIELU).

    Here ``a = softplus(alpha_p)``, ``b = beta`` and ``c = beta + softplus(alpha_n)``; ``eps``, just below zero, is the
    largest number whose exponential is taken.
    """
    above = jax.nn.softplus(alpha_p) * x * x
    below = (beta + jax.nn.softplus(alpha_n)) * (jnp.expm1(jnp.minimum(x, eps)) - x)
    return jnp.where(x > 0, above, below) + beta * x


_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "relu2": relu2,
    "gelu": gelu_exact,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "silu": jax.nn.silu,
    "quick_gelu": quick_gelu,
    "solu": solu,
    "solu_ln": solu,
}
assert set(_FUNCTIONS) == set(ACTIVATIONS) - {"xielu"}, "xIELU has parameters: a module applies it"


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Returns the activation function of a config's ``act_fn``."""
    return _FUNCTIONS[name]


def scaled(x: jax.Array, multiplier: float) -> jax.Array:
    """``multiplier * x``, or ``x`` itself when that is the same."""
    return x if multiplier == 1.0 else x * jnp.asarray(multiplier, x.dtype)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """``cap * tanh(x / cap)``, or ``x`` when ``cap`` is not positive."""
    return cap * jnp.tanh(x / cap) if cap > 0 else x
