"""Matrix products with weights that may also be stored in another layout."""

import flax.linen as nn
import jax
import jax.numpy as jnp

LAYOUTS = "layouts"
"""Variable collection of weights in other layouts, by parameter name: in pieces ``[piece, in, out]``, or
transposed ``[out, in]``."""


def product(module: nn.Module, name: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiplies ``x`` ``[batch, pos, in]`` by a weight ``[in, out]``, which is parameter ``name`` of ``module``."""
    laid_out = module.get_variable(LAYOUTS, name)
    if laid_out is None:
        return jnp.einsum("bpi,io->bpo", x, weight)
    if laid_out.ndim == 3:
        pieces = x.reshape(*x.shape[:2], *laid_out.shape[:2])
        return jnp.einsum("bpsi,sio->bpso", pieces, laid_out).sum(axis=2)
    rows = x.reshape(-1, x.shape[-1])
    # Without the barrier XLA transposes the product back.
    return jax.lax.optimization_barrier(laid_out @ rows.T).T.reshape(*x.shape[:2], -1)
