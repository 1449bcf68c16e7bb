"""Fresh parameters."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tljax.config import HookedTransformerConfig
from tljax.modules.block import TransformerBlock
from tljax.modules.context import AttentionContext
from tljax.modules.embedding import EmbeddingStage, HeadStage
from tljax.typing import Params


def init_params(cfg: HookedTransformerConfig, seed: int = 0) -> Params:
    """Draws fresh parameters.

    Args:
        cfg: shapes and init mode; ``d_vocab`` must be known. Without ``init_weights`` everything is zero.
        seed: the random seed.

    Returns:
        The parameter tree.
    """
    keys = jax.random.split(jax.random.key(seed), cfg.n_layers + 2)
    tokens = np.zeros((1, 1), np.int32)
    residual = np.zeros((1, 1, cfg.d_model), cfg.jnp_dtype)
    context = AttentionContext()
    if cfg.positional_embedding_type == "shortformer":
        context = AttentionContext(pos_embed=jnp.zeros_like(residual))

    made = _draw if cfg.init_weights else _zeros
    drawn = dataclasses.replace(cfg.computation, init_mode=cfg.init_mode, initializer_range=cfg.initializer_range)
    blocks = tuple(
        made(TransformerBlock(drawn, kind), key, residual, context)
        for kind, key in zip(cfg.layer_kinds, keys[2:], strict=True)
    )
    embedding = made(EmbeddingStage(drawn), keys[0], tokens, context)
    head = made(HeadStage(drawn), keys[1], residual)
    return {**embedding, "blocks": blocks, **head}


@functools.partial(jax.jit, static_argnums=0)
def _draw(module: nn.Module, key: jax.Array, *inputs: Any) -> Params:
    return dict(module.init(key, *inputs)).get("params", {})


def _zeros(module: nn.Module, key: jax.Array, *inputs: Any) -> Params:
    shapes = jax.eval_shape(functools.partial(_draw, module), key, *inputs)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
