"""Parameters with named axes, from which their shapes, counts and placement follow."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tljax.config import HookedTransformerConfig
from tljax.numerics import widened
from tljax.quantized_weight import QuantizedWeight, as_floats

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def axis_sizes(cfg: HookedTransformerConfig) -> dict[str, int]:
    """Returns the length of every axis that a parameter may have; 0 where a config has no such axis.

    >>> cfg = HookedTransformerConfig(d_model=8, n_heads=4, n_key_value_heads=2, n_layers=1, n_ctx=5)
    >>> axis_sizes(cfg)["n_kv"], axis_sizes(cfg)["d_head"]
    (2, 2)
    """
    return {
        "d_model": cfg.d_model,
        "n_ctx": cfg.n_ctx,
        "n_heads": cfg.n_heads,
        "n_kv": cfg.kv_heads,
        "d_head": cfg.d_head,
        "d_value": cfg.value_width,
        "d_rotary": cfg.rotary_dim or 0,
        "d_unrotated": cfg.d_head - (cfg.rotary_dim or 0),
        "q_rank": cfg.q_lora_rank or 0,
        "kv_rank": cfg.kv_lora_rank or 0,
        "q_width": cfg.n_heads * cfg.d_head,
        "kv_width": cfg.kv_heads * cfg.d_head,
        "d_mlp": cfg.d_mlp or 0,
        "n_experts": cfg.num_experts or 0,
        "d_expert": cfg.d_expert or 0,
        "d_shared": cfg.d_shared_expert or 0,
        "one": 1,
        "d_embed": cfg.d_embed or 0,
        "d_vocab": cfg.d_vocab,
        "d_vocab_out": cfg.d_vocab_out,
    }


def stored_dtype(name: str, dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype a parameter is stored in: the model's, or at least float32 for the bias of expert choice."""
    return widened(dtype) if name == "b_choice" else dtype


def parameter(module: Any, name: str, initializer: Initializer, axes: str) -> jax.Array:
    """Makes or reads a parameter of a module, in the dtype of the model's config.

    ``module.init`` returns it as an ``nn.Partitioned``, whose ``names`` are the axes; ``apply`` takes plain arrays, and
    quantised weights, of which floats are made here: inside the compiled block, so only while it runs.

    Args:
        module: a Flax module with the model's config as ``cfg``.
        name: the parameter's name.
        initializer: how it is drawn.
        axes: names of its axes, such as ``"d_model n_heads d_head"``: see :func:`axis_sizes`.

    Returns:
        The array.
    """
    return as_floats(stored_parameter(module, name, initializer, axes))


def stored_parameter(module: Any, name: str, initializer: Initializer, axes: str) -> Any:
    """Makes or reads a parameter as :func:`parameter` does; a quantised weight is returned as it is."""
    if isinstance(stored := module.get_variable("params", name), QuantizedWeight):
        return stored
    names, sizes = tuple(axes.split()), axis_sizes(module.cfg)
    shape, dtype = tuple(sizes[axis] for axis in names), stored_dtype(name, module.cfg.jnp_dtype)
    # Not unboxed by Flax, which would take the names for those of a mesh's axes.
    value = module.param(name, nn.with_partitioning(initializer, names), shape, dtype, unbox=False)
    return value.value if isinstance(value, nn.Partitioned) else value


def contracted_axes(path: str, axes: Sequence[str]) -> tuple[int, ...]:
    """Returns which axes of a matrix the activations it multiplies have too, outermost first.

    Args:
        path: its dotted path, or its name.
        axes: its axes; those of experts come first, and a matrix product leaves them alone.

    >>> contracted_axes("attn.W_O", ("n_heads", "d_head", "d_model"))
    (0, 1)
    """
    first = 1 if axes[0] == "n_experts" else 0
    return tuple(range(len(axes) - 1)) if path.rpartition(".")[2] == "W_O" else (first,)
