"""Derivatives at hook points, with respect to a zero added at each of them: gradients and directional derivatives."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.config import HookedTransformerConfig
from tljax.forward.forward import rows_of_run
from tljax.hooks.dictionary import HookDictionary, HookEntry
from tljax.hooks.interventions import Add
from tljax.numerics import widened

Run = Callable[[HookDictionary], tuple[Any, dict[str, Any]]]
"""A forward pass for a hook dictionary, returning its output and its cache."""


def zero_offsets(
    cfg: HookedTransformerConfig, names: Sequence[str], hooks: HookDictionary, batch: int, pos: int
) -> dict[str, jax.Array]:
    """Returns a zero to add at each point that has one gradient, in float32 or wider; equal shapes share one array.

    Args:
        cfg: the model's config.
        names: the points, which the run also records.
        hooks: the hooks of the run.
        batch: the number of prompts.
        pos: their length.
    """
    rows = rows_of_run(cfg, names, hooks)
    kinds = {name: (row.shape(batch, pos), widened(row.dtype)) for name, row in rows.items()}
    zeros = {kind: jnp.zeros(*kind) for kind in set(kinds.values())}
    return {name: zeros[kind] for name, kind in kinds.items()}


def pull_back(
    run: Run, hooks: HookDictionary, offsets: Mapping[str, jax.Array]
) -> tuple[Any, dict[str, Any], Callable[[Any], dict[str, jax.Array]]]:
    """Runs a forward pass once, for any number of gradients at hook points.

    Args:
        run: the forward pass; its output is an array or a pytree of arrays.
        hooks: the hooks of the run.
        offsets: a zero to add at each point to differentiate at.

    Returns:
        The output, the cache, and a function from the gradient with respect to the output to the gradient at each point
        (with respect to the activation after its hooks), in backward order.
    """
    order: list[str] = []

    def moved(offsets: dict[str, jax.Array]) -> tuple[Any, Any]:
        added = tuple(HookEntry(name, Add(offset)) for name, offset in offsets.items())
        output, cache = run(dataclasses.replace(hooks, entries=(*hooks.entries, *added)))
        order[:] = cache
        return output, cache

    output, pull, cache = jax.vjp(moved, dict(offsets), has_aux=True)

    def gradients(slope: Any) -> dict[str, jax.Array]:
        pulled = pull(slope)[0]
        return {name: pulled[name] for name in reversed(list(offsets))}

    return output, {name: cache[name] for name in order}, gradients  # jax hands dicts back sorted by key


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
        The loss, the cache, and the gradient at each point in float32 (with respect to the activation after its
        hooks), in backward order. :func:`pull_back` differentiates several outputs of one run, and in other dtypes.
    """
    offsets = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
    loss, cache, gradients = pull_back(run, hooks, offsets)
    return loss, cache, gradients(jnp.ones_like(loss))


@dataclasses.dataclass(frozen=True)
class Moves:
    """Directions along which activations move: ``Add`` interventions whose values are the tangents.

    Attributes:
        entries: the interventions by full name of their points.
        tangents: their values, in the dtype of the derivative.
    """

    entries: tuple[tuple[str, Add], ...]
    tangents: tuple[jax.Array, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The points that move."""
        return tuple(name for name, _ in self.entries)

    @classmethod
    def of(cls, hooks: HookDictionary, cfg: HookedTransformerConfig) -> "Moves":
        """Returns the directions that a dictionary of ``Add`` interventions gives."""
        wide = widened(np.dtype(cfg.jnp_dtype))
        entries = [(entry.name, entry.function) for entry in hooks.entries if isinstance(entry.function, Add)]
        return cls(tuple(entries), tuple(jnp.asarray(add.value).astype(wide) for _, add in entries))

    def added(self, hooks: HookDictionary, values: Sequence[jax.Array]) -> HookDictionary:
        """Returns the hooks with other values in the interventions, after the hooks already there."""
        pairs = zip(self.entries, values, strict=True)
        moved = (
            HookEntry(name, Add.stored({"value": value, "mask": add.mask}, add.at)) for (name, add), value in pairs
        )
        return dataclasses.replace(hooks, entries=(*hooks.entries, *moved))

    def derivative(self, function: Callable[[Sequence[jax.Array]], Any]) -> tuple[Any, Any]:
        """Returns a function of the interventions' values at zero, and its derivative along the tangents."""
        zeros = tuple(map(jnp.zeros_like, self.tangents))
        return jax.jvp(function, (zeros,), (self.tangents,))


def push_forward(run: Run, hooks: HookDictionary, moves: Moves) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Runs a forward pass with its derivative as activations move.

    Args:
        run: the forward pass.
        hooks: the hooks of the run.
        moves: the directions at hook points; activations move after the hooks there.

    Returns:
        ``(output, cache)``, and the change of both to first order.
    """
    order: list[str] = []

    def moved(values: Sequence[jax.Array]) -> tuple[Any, Any]:
        output, cache = run(moves.added(hooks, values))
        order[:] = cache
        return output, cache

    (output, cache), (change, changes) = moves.derivative(moved)
    return (output, {name: cache[name] for name in order}), (change, {name: changes[name] for name in order})
