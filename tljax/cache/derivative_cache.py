"""``DerivativeCache``: gradients or other derivatives at hook points, by the names that activations have."""

import jax

from tljax.cache.activation_cache import ArraysByName


@jax.tree_util.register_pytree_with_keys_class
class DerivativeCache(ArraysByName):
    """An immutable mapping from hook name to a derivative there, with the names and shapes of an ``ActivationCache``.

    ``cache["z", 3] * grads["z", 3]`` is each entry's first-order contribution to the metric. The analyses of
    activations are not here: a gradient is no residual stream to decompose. Slicing, ``unpad`` and
    ``stack_activation`` are, and it is a pytree: ``jax.tree.map(jnp.subtract, a, b)``.
    """

    _kept_by = (
        "include it in names_filter. Points that hold whole numbers have no derivative, nor has ln1 in a block that "
        "calls it three times"
    )
