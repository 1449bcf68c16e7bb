"""Products with weights that may stand in another layout too."""

import flax.linen as nn
import jax
import jax.numpy as jnp

OTHER_LAYOUT = "_few_rows"


def product(module: nn.Module, name: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """``x [batch, pos, in]`` times a weight ``[in, out]``, which is parameter ``name`` of ``module``."""
    if not module.has_variable("params", name + OTHER_LAYOUT):
        return jnp.einsum("bpi,io->bpo", x, weight)
    laid_out = module.get_variable("params", name + OTHER_LAYOUT)
    if laid_out.ndim == 3:
        pieces = x.reshape(*x.shape[:2], *laid_out.shape[:2])
        return jnp.einsum("bpsi,sio->bpso", pieces, laid_out).sum(axis=2)
    rows = x.reshape(-1, x.shape[-1])
    # Without the barrier XLA turns the product round again.
    return jax.lax.optimization_barrier(laid_out @ rows.T).T.reshape(*x.shape[:2], -1)
