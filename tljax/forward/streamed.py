"""A block on the host inside a derivative: its parameters are placed for the forward pass, and again for the backward.

What ``jax.checkpoint`` keeps of a block are its inputs, and parameters are among them. Here they are not: the backward
pass keeps the residual stream alone, and asks the host for the block once more.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tljax.errors import OffloadError
from tljax.offload import HostBlock

Apply = Callable[..., tuple[Any, dict[str, Any]]]
"""Runs a module: ``(module, captured, variables, slots, inputs)`` to its output and the captured activations."""


def run_streamed(
    apply: tuple[Apply, Apply],
    module: Any,
    captured: tuple[str, ...],
    held: HostBlock,
    variables: Mapping[str, Any],
    slots: Any,
    inputs: tuple[Any, ...],
) -> tuple[Any, dict[str, Any]]:
    """Runs a block so that it can be differentiated with respect to all but its own parameters.

    Args:
        apply: the function that runs a module, as it is and compiled.
        module, captured, slots, inputs: its arguments.
        held: the block's parameters.
        variables: what else the module reads.

    Raises:
        OffloadError: this is differentiated in forward mode.
    """
    plain, compiled = apply
    leaves, structure = jax.tree.flatten((held.beside, dict(variables), slots, inputs))
    moving = tuple(_moves(leaf) for leaf in leaves)

    def run(floats: list[Any], fixed: list[Any]) -> tuple[Any, dict[str, Any]]:
        jax.block_until_ready(floats)  # so that the block before has run, and its parameters are free
        own = held.blocks.place(held.layer, alone=True)
        beside, rest, slots, inputs = jax.tree.unflatten(structure, _joined(moving, floats, fixed))
        return compiled(module, captured, {**rest, "params": {**own, **beside}}, slots, inputs)

    def forward(floats: list[Any], fixed: list[Any]) -> tuple[Any, Any]:
        return run(floats, fixed), (floats, fixed)

    def backward(kept: tuple[list[Any], list[Any]], slopes: Any) -> tuple[Any, None]:
        real = [slope for slope in jax.tree.leaves(slopes) if slope.dtype != jax.dtypes.float0]
        jax.block_until_ready(real)
        own = held.blocks.place(held.layer, alone=True)
        return _pull(plain, module, captured, structure, moving, own, *kept, real), None

    block = jax.custom_vjp(run)
    block.defvjp(forward, backward)
    floats, fixed = (
        [leaf for leaf, is_it in zip(leaves, moving, strict=True) if is_it is side] for side in (True, False)
    )
    try:
        return block(floats, fixed)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise OffloadError(
            "A model whose blocks stay on the host (offload='host') is differentiated in forward mode (jax.jvp, "
            "jax.jacfwd, jax.linearize, jax.hessian). Use model.run_with_jvp, or bring all blocks to the device: "
            "model = model.offload(None)."
        ) from error


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _pull(
    apply: Apply,
    module: Any,
    captured: tuple[str, ...],
    structure: Any,
    moving: tuple[bool, ...],
    own: Any,
    floats: list[Any],
    fixed: list[Any],
    slopes: list[jax.Array],
) -> list[jax.Array]:
    """Runs a block again and returns the gradient with respect to what moves, from that of its real outputs."""

    def run(floats: list[Any]) -> list[Any]:
        beside, rest, slots, inputs = jax.tree.unflatten(structure, _joined(moving, floats, fixed))
        outputs = apply(module, captured, {**rest, "params": {**own, **beside}}, slots, inputs)
        return [leaf for leaf in jax.tree.leaves(outputs) if _moves(leaf)]

    return jax.vjp(run, floats)[1](slopes)[0]


def _moves(leaf: Any) -> bool:
    """Whether a leaf is an array of real numbers, or one number."""
    return bool(jnp.issubdtype(leaf.dtype if isinstance(leaf, jax.Array) else jnp.result_type(leaf), jnp.inexact))


def _joined(moving: tuple[bool, ...], floats: list[Any], fixed: list[Any]) -> list[Any]:
    one, other = iter(floats), iter(fixed)
    return [next(one) if is_it else next(other) for is_it in moving]
