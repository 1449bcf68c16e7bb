"""Straight-through estimators of JumpReLU and of the step function, for training thresholds.

Rajamanoharan et al. 2024, "Jumping ahead: improving reconstruction fidelity with JumpReLU sparse autoencoders"
(arXiv:2407.14435).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tljax.dictionaries.training.rows import column_sums

_Saved = tuple[jax.Array, jax.Array, jax.Array]


def rectangle(h: jax.Array, threshold: jax.Array, bandwidth: jax.Array) -> jax.Array:
    """Returns 1 where ``h`` lies strictly within half a bandwidth of the threshold, else 0."""
    return (jnp.abs((h - threshold[None]) / bandwidth) < 0.5).astype(h.dtype)


def step(h: jax.Array, threshold: jax.Array, bandwidth: jax.Array, to_input: bool = False) -> jax.Array:
    """Returns 1 where ``h > threshold``, else 0; its derivative is that of a kernel of width ``bandwidth``.

    The derivative with respect to the threshold is ``-rect((h - threshold) / bandwidth) / bandwidth``.

    Args:
        h: pre-activations, ``[tokens, d_sae]``.
        threshold: ``[d_sae]``.
        bandwidth: scalar.
        to_input: whether ``h`` receives the negative of that derivative, or none.
    """
    return _step(h, threshold, bandwidth, to_input)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _step(h: jax.Array, threshold: jax.Array, bandwidth: jax.Array, to_input: bool) -> Any:
    return (h > threshold[None]).astype(h.dtype)


def _step_forward(h: jax.Array, threshold: jax.Array, bandwidth: jax.Array, to_input: bool) -> tuple[jax.Array, _Saved]:
    return _step(h, threshold, bandwidth, to_input), (h, threshold, bandwidth)


def _step_backward(to_input: bool, saved: _Saved, gradient: jax.Array) -> _Saved:
    h, threshold, bandwidth = saved
    estimate = rectangle(h, threshold, bandwidth) / bandwidth * gradient
    to_h = estimate if to_input else jnp.zeros_like(h)
    return to_h, -column_sums(estimate), jnp.zeros_like(bandwidth)


_step.defvjp(_step_forward, _step_backward)


def jumprelu(h: jax.Array, threshold: jax.Array, bandwidth: jax.Array, to_input: bool = False) -> jax.Array:
    """Returns ``ReLU(h)`` where ``h > threshold``, else 0.

    The derivative with respect to the threshold is ``-threshold / bandwidth * rect((h - threshold) / bandwidth)``, with
    respect to ``h`` 1 where ``h > threshold``.

    Args:
        h: pre-activations, ``[tokens, d_sae]``.
        threshold: ``[d_sae]``.
        bandwidth: scalar.
        to_input: whether ``h`` also receives the negative of the threshold's derivative.
    """
    return _jumprelu(h, threshold, bandwidth, to_input)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _jumprelu(h: jax.Array, threshold: jax.Array, bandwidth: jax.Array, to_input: bool) -> Any:
    return jnp.where(h > threshold[None], jax.nn.relu(h), 0)


def _jumprelu_forward(
    h: jax.Array, threshold: jax.Array, bandwidth: jax.Array, to_input: bool
) -> tuple[jax.Array, _Saved]:
    return _jumprelu(h, threshold, bandwidth, to_input), (h, threshold, bandwidth)


def _jumprelu_backward(to_input: bool, saved: _Saved, gradient: jax.Array) -> _Saved:
    h, threshold, bandwidth = saved
    estimate = (threshold / bandwidth)[None] * rectangle(h, threshold, bandwidth) * gradient
    to_h = jnp.where(h > jnp.maximum(threshold, 0)[None], gradient, 0)
    return to_h + estimate if to_input else to_h, -column_sums(estimate), jnp.zeros_like(bandwidth)


_jumprelu.defvjp(_jumprelu_forward, _jumprelu_backward)
