"""What the writers of a residual graph add to the stream in a run."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tljax.circuits.graph import ResidualGraph
from tljax.config import HookedTransformerConfig
from tljax.modules.activations import scaled
from tljax.numerics import matmul_precision
from tljax.quantized_weight import as_floats
from tljax.typing import Params

HEADS, MLP, EXPERTS, EMBED = "attn.hook_z", "hook_mlp_out", "mlp.hook_expert_result", "hook_embed"


def writer_points(graph: ResidualGraph, layers: Sequence[int] | None = None) -> tuple[str, ...]:
    """Returns full names of the hook points whose activations :func:`outputs_of` needs.

    Args:
        graph: the graph.
        layers: the layers (-1 for the token embedding); all by default.
    """
    names = []
    for layer in range(-1, graph.n_layers) if layers is None else layers:
        if layer < 0:
            names.append(EMBED)
            continue
        names.append(f"blocks.{layer}.{HEADS}")
        if not graph.attn_only:
            names.append(f"blocks.{layer}.{MLP}")
        if graph.experts and graph.experts[layer]:
            names.append(f"blocks.{layer}.{EXPERTS}")
    return tuple(names)


def outputs_of(
    cfg: HookedTransformerConfig,
    params: Params,
    graph: ResidualGraph,
    activations: Mapping[str, Any],
    layer: int,
) -> jax.Array:
    """Computes what a layer's writers write, ``[batch, pos, writer, d_model]``, from the activations of a run.

    It is linear in the activations, so a difference of two runs' activations gives the difference of what is written.
    In a model with norms after attention (Gemma 2) heads write before that norm, and otherwise what is added to the
    residual stream.

    Args:
        cfg, params: the model.
        graph: its graph.
        activations: activations by full name, those of :func:`writer_points`.
        layer: the layer, -1 for the token embedding.
    """
    if layer < 0:
        return jnp.asarray(activations[EMBED])[:, :, None]
    prefix = f"blocks.{layer}."
    heads = head_outputs(cfg, as_floats(params["blocks"][layer]["attn"]["W_O"]), activations[prefix + HEADS])
    parts = [heads]
    if not graph.attn_only:
        n_experts = graph.experts[layer] if graph.experts else 0
        experts = activations[prefix + EXPERTS] if n_experts else None
        parts.append(mlp_outputs(cfg, n_experts, jnp.asarray(activations[prefix + MLP]), experts))
    return jnp.concatenate(parts, axis=2)


def head_outputs(cfg: HookedTransformerConfig, W_O: jax.Array, z: Any) -> jax.Array:
    """Computes what heads write, ``[batch, pos, head, d_model]``, from ``z`` ``[batch, pos, head, d_head]``."""
    return jnp.moveaxis(outputs_by_head(cfg, W_O, z), 0, 2)


def outputs_by_head(cfg: HookedTransformerConfig, W_O: jax.Array, z: Any) -> jax.Array:
    """Computes what heads write, with the heads first, ``[head, batch, pos, d_model]``."""
    with matmul_precision(cfg):
        result = jnp.einsum("bphe,hed->hbpd", z, W_O)
    return result if cfg.has_norms_after else scaled(result, cfg.residual_multiplier)


def mlp_outputs(cfg: HookedTransformerConfig, n_experts: int, mlp: jax.Array, experts: jax.Array | None) -> jax.Array:
    """Returns what the MLP of a layer writes, ``[batch, pos, writer, d_model]``: as a whole, or by expert.

    Args:
        cfg: the model's config.
        n_experts: how many experts of the layer are writers.
        mlp: the layer's MLP output, ``[batch, pos, d_model]``.
        experts: each routed expert's output, ``[batch, pos, expert, d_model]``; ``None`` if the MLP is one writer.
    """
    if experts is None:
        return mlp[:, :, None]
    routed = scaled(experts, cfg.residual_multiplier)
    if n_experts == routed.shape[2]:
        return routed
    return jnp.concatenate([routed, mlp[:, :, None] - routed.sum(axis=2, keepdims=True)], axis=2)


def writer_outputs(
    cfg: HookedTransformerConfig, params: Params, graph: ResidualGraph, activations: Mapping[str, Any]
) -> jax.Array:
    """Computes what every writer writes, ``[batch, pos, writer, d_model]``. It is large: see :func:`outputs_of`."""
    layers = range(-1, graph.n_layers)
    return jnp.concatenate([outputs_of(cfg, params, graph, activations, layer) for layer in layers], axis=2)
