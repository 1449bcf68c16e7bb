"""Grouped-query attention with a key/value head for every query head: the same function with more parameters."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from tljax.config import HookedTransformerConfig
from tljax.modules.block import TransformerBlock
from tljax.modules.stack import stage_axes
from tljax.typing import Params


def ungroup_heads(cfg: HookedTransformerConfig, params: Params) -> tuple[HookedTransformerConfig, Params]:
    """Returns a model that computes the same with as many key/value heads as query heads.

    Args:
        cfg, params: the model; with as many key/value heads as query heads it is returned as it is.

    Returns:
        The config with ``n_key_value_heads=None``, and the parameters with each key/value head repeated for the query
        heads that read it.
    """
    if cfg.kv_heads == cfg.n_heads:
        return cfg, params
    copies, blocks = cfg.n_heads // cfg.kv_heads, []
    for layer, block in enumerate(params["blocks"]):
        axes = stage_axes(TransformerBlock, cfg, cfg.layer_kind(layer))
        flat: dict[str, Any] = flatten_dict(block, sep=".")
        for path, value in flat.items():
            if "n_kv" in axes[path]:
                flat[path] = jnp.repeat(value, copies, axis=axes[path].index("n_kv"))
            elif "kv_width" in axes[path]:
                axis = axes[path].index("kv_width")
                heads = value.reshape(*value.shape[:axis], cfg.kv_heads, cfg.d_head, *value.shape[axis + 1 :])
                repeated = jnp.repeat(heads, copies, axis=axis)
                flat[path] = repeated.reshape(*value.shape[:axis], -1, *value.shape[axis + 1 :])
        blocks.append(unflatten_dict(flat, sep="."))
    return dataclasses.replace(cfg, n_key_value_heads=None), {**params, "blocks": tuple(blocks)}
