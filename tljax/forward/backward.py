"""Gradients at hook points: the gradient with respect to a zero added at each of them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tljax.hooks.dictionary import HookDictionary, HookEntry
from tljax.hooks.interventions import Add


def with_gradients(
    run: Callable[[HookDictionary], tuple[jax.Array, dict[str, Any]]],
    hooks: HookDictionary,
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[jax.Array, dict[str, Any], dict[str, jax.Array]]:
    """Runs a scalar-valued forward pass and differentiates it at hook points.

    Args:
        run: forward pass for a hook dictionary, returning ``(loss, cache)``.
        hooks: the hooks of the run.
        shapes: shape of the activation at each point to differentiate at.

    Returns:
        The loss, the cache, and the gradient at each point (with respect to the activation after its hooks), in
        backward order.
    """

    def loss_of(offsets: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        added = tuple(HookEntry(name, Add(offset)) for name, offset in offsets.items())
        loss, cache = run(dataclasses.replace(hooks, entries=(*hooks.entries, *added)))
        return loss, (loss, cache)

    zeros = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
    gradients, (loss, cache) = jax.grad(loss_of, has_aux=True)(zeros)
    return loss, cache, {name: gradients[name] for name in reversed(list(shapes))}
