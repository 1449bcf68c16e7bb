"""The stages of a model (embedding, blocks, head), and their parameters: initial values, axes and counts."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from tljax.config import HookedTransformerConfig, LayerKind
from tljax.modules.block import TransformerBlock, make_attention
from tljax.modules.context import AttentionContext
from tljax.modules.embedding import EmbeddingStage, HeadStage
from tljax.modules.parameters import axis_sizes
from tljax.typing import Params


@functools.lru_cache(maxsize=256)
def _module(make: Callable[..., Any], computation: HookedTransformerConfig, *static: Any) -> Any:
    """Returns one object for all equal modules, by which compiled programs are cached."""
    return make(computation, *static)


@functools.lru_cache(maxsize=256)
def _blocks(cfg: HookedTransformerConfig) -> tuple[TransformerBlock, ...]:
    alike = cfg.without_splices.computation
    return tuple(_module(TransformerBlock, alike, kind) for kind in cfg.layer_kinds)


def block_module(cfg: HookedTransformerConfig, layer: int) -> TransformerBlock:
    """Returns a layer's block: one object for all layers of a kind, and for all models that compute the same."""
    return _blocks(cfg)[layer]


def embedding_module(cfg: HookedTransformerConfig) -> EmbeddingStage:
    """Returns the embedding stage of a config."""
    return _module(EmbeddingStage, cfg.without_splices.computation, cfg.embedding_splices)


def head_module(cfg: HookedTransformerConfig) -> HeadStage:
    """Returns the final norm and unembedding of a config."""
    return _module(HeadStage, cfg.without_splices.computation)


def init_params(cfg: HookedTransformerConfig, seed: int = 0) -> Params:
    """Draws fresh parameters.

    Args:
        cfg: shapes and init mode; ``d_vocab`` must be known. Without ``init_weights`` everything is zero.
        seed: the random seed.

    Returns:
        The parameter tree.
    """
    drawn = dataclasses.replace(cfg.computation, init_mode=cfg.init_mode, initializer_range=cfg.initializer_range)
    made = _draw if cfg.init_weights else _zeros

    def stage(key: jax.Array, make: Callable[..., Any], *static: Any) -> Params:
        module = _module(make, drawn, *static)
        return made(module, key, *_one_token(module))

    embedding, head, *keys = jax.random.split(jax.random.key(seed), cfg.n_layers + 2)
    blocks = tuple(stage(key, TransformerBlock, kind) for kind, key in zip(cfg.layer_kinds, keys, strict=True))
    return {**stage(embedding, EmbeddingStage), "blocks": blocks, **stage(head, HeadStage)}


def _one_token(stage: Any) -> tuple[Any, ...]:
    """Returns inputs of one token, the smallest that a stage runs on."""
    cfg = stage.cfg
    if isinstance(stage, EmbeddingStage):
        return np.zeros((1, 1), np.int32), AttentionContext()
    residual = np.zeros((1, 1, cfg.d_model), cfg.jnp_dtype)
    if isinstance(stage, HeadStage):
        return (residual,)
    places = jnp.zeros_like(residual) if cfg.positional_embedding_type == "shortformer" else None
    return residual, AttentionContext(pos_embed=places)


@functools.partial(jax.jit, static_argnums=0)
def _draw(module: nn.Module, key: jax.Array, *inputs: Any) -> Params:
    drawn = dict(module.init(key, *inputs)).get("params", {})
    return jax.tree.map(lambda made: made.value, drawn, is_leaf=lambda node: isinstance(node, nn.Partitioned))


def _zeros(module: nn.Module, key: jax.Array, *inputs: Any) -> Params:
    shapes = jax.eval_shape(functools.partial(_draw, module), key, *inputs)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def stage_axes(make: Callable[..., Any], cfg: HookedTransformerConfig, *static: Any) -> Mapping[str, tuple[str, ...]]:
    """Returns the axes of a stage's parameters, as its modules declare them and in their order; nothing is computed.

    Args:
        make: the stage: ``EmbeddingStage``, ``HeadStage``, or ``TransformerBlock``.
        cfg: the model's config; neither its dtype nor the size of its vocabulary matters.
        *static: further arguments of ``make``; for a block its kind.

    Returns:
        Axes by path within the stage, such as ``"attn.W_Q"``.
    """
    return _axes(make, _alike(cfg), *static)


@functools.lru_cache(maxsize=256)
def _alike(cfg: HookedTransformerConfig) -> HookedTransformerConfig:
    """Returns one config for all whose parameters have the same axes."""
    return dataclasses.replace(cfg.without_splices.computation, dtype="float32", d_vocab=1, d_vocab_out=1)


@functools.lru_cache(maxsize=256)
def _axes(make: Callable[..., Any], cfg: HookedTransformerConfig, *static: Any) -> Mapping[str, tuple[str, ...]]:
    stage, axes = make(cfg, *static), {}

    def declare(*inputs: Any) -> None:
        declared: dict[str, Any] = flatten_dict(dict(stage.init(*inputs)).get("params", {}), sep=".")
        axes.update({path: made.names for path, made in declared.items()})

    jax.eval_shape(declare, jax.eval_shape(lambda: jax.random.key(0)), *_one_token(stage))
    return axes


@dataclasses.dataclass(frozen=True)
class BlockWeights:
    """Numbers of weights in the matrices of a block.

    Attributes:
        stored: all of them.
        read_later: those that make a token's keys and values, which later tokens read.
        others: the others that a token's own output needs; of the experts, only those it is sent to.
        queries, heads: those of ``others`` that make queries, and that combine heads.
    """

    stored: int
    read_later: int
    others: int
    queries: int
    heads: int


@functools.lru_cache(maxsize=256)
def block_weights(cfg: HookedTransformerConfig, kind: LayerKind) -> BlockWeights:
    """Counts the weights of a block's matrices, by the axes they declare."""
    sizes = axis_sizes(cfg)
    read_later = {f"attn.{name}" for name in make_attention(cfg, kind).read_later}
    stored, met, queries, heads = 0, {True: 0, False: 0}, 0, 0
    for path, axes in stage_axes(TransformerBlock, cfg, kind).items():
        if path.rpartition(".")[2].startswith("W_"):
            size = math.prod(sizes[axis] for axis in axes)
            stored += size
            each = size // sizes["n_experts"] * (cfg.experts_per_token or 0) if axes[0] == "n_experts" else size
            met[path in read_later] += each
            if path == "attn.W_O":
                heads = each
            elif path.startswith("attn.") and path not in read_later:
                queries += each
    return BlockWeights(stored, met[True], met[False], queries, heads)
