"""Circuits of heads as matrices: what a head attends to (QK), what it moves (OV), how heads feed each other."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from tljax.config import HookedTransformerConfig
from tljax.errors import ConfigError, InputError
from tljax.weights.factored_matrix import FactoredMatrix, composition_scores

CIRCUITS = ("QK", "OV")


def head_circuit(weights: Any, cfg: HookedTransformerConfig, name: str) -> FactoredMatrix:
    """Returns the ``QK`` or ``OV`` matrix of each head, ``[..., head, d_model, d_model]``.

    Args:
        weights: an object with ``W_Q``, ``W_K``, ``W_V``, ``W_O``: a model, or a view of one block's attention.
        cfg: the model's config.
        name: one of :data:`CIRCUITS`.

    Raises:
        ConfigError: a nonlinear operation stands between the two factors.
    """
    if (reason := why_no_matrix(cfg, name)) is not None:
        raise ConfigError(f"This model's heads have no {name} matrix: {reason}.")
    if name == "QK":
        return FactoredMatrix(weights.W_Q, jnp.swapaxes(weights.W_K, -1, -2))
    return FactoredMatrix(weights.W_V, weights.W_O)


def why_no_matrix(cfg: HookedTransformerConfig, name: str) -> str | None:
    """Returns the reason why a head's ``QK`` or ``OV`` is not one matrix, or ``None`` if it is."""
    if cfg.kv_lora_rank is not None:
        return (
            f"a normalised latent (kv_lora_rank={cfg.kv_lora_rank}) stands between the residual stream and its "
            "keys and values. Their factors are in model.blocks[layer].attn"
        )
    if cfg.clip_qkv is not None:
        return f"queries, keys and values are clipped to ±{cfg.clip_qkv:g} (clip_qkv) between the two factors"
    if name == "QK" and cfg.use_qk_norm:
        return (
            "queries and keys are normalised between W_Q and W_K (use_qk_norm), by lengths that depend on the input. "
            "The product of the weights alone is FactoredMatrix(model.W_Q, jnp.swapaxes(model.W_K, -1, -2))"
        )
    return None


def all_composition_scores(model: Any, mode: str) -> Float[Array, "layer head layer head"]:
    """Scores the composition of every head with every later one: see ``WeightProperties.all_composition_scores``."""
    if mode not in ("Q", "K", "V"):
        raise InputError(f"mode says what the later head reads through: 'Q', 'K' or 'V'; got {mode!r}.")
    left = model.OV
    right = left if mode == "V" else model.QK if mode == "Q" else model.QK.T
    scores = composition_scores(left, right)
    layer = jnp.arange(model.cfg.n_layers)
    return jnp.where(layer[:, None, None, None] < layer[None, None, :, None], scores, 0)


def accumulated_bias(
    cfg: HookedTransformerConfig, params: Mapping[str, Any], layer: int, mlp_input: bool, include_mlp_biases: bool
) -> Float[Array, " d_model"]:
    """Sums the biases written to the residual stream: see ``WeightProperties.accumulated_bias``."""
    if not 0 <= layer <= cfg.n_layers:
        raise InputError(f"layer={layer} is out of range: 0 (no layer) to {cfg.n_layers} (all layers).")
    if mlp_input and (layer == cfg.n_layers or cfg.attn_only):
        what = "This model is attention-only" if cfg.attn_only else f"There is no layer {layer}"
        raise InputError(f"{what}, so no input of an MLP there: leave mlp_input out.")
    if cfg.has_norms_after or cfg.use_normalization_of_residual:
        raise ConfigError(
            "Biases of this model pass a norm on their way into the residual stream, whose scale depends on the "
            "input, so their sum is no constant vector. Read model.b_O and model.b_out."
        )
    total = jnp.zeros(cfg.d_model, cfg.jnp_dtype)
    for number, block in enumerate(params["blocks"][: layer + mlp_input]):
        own_input_only = number == layer
        if not (own_input_only and cfg.parallel_attn_mlp):  # parallel: the MLP reads what attention reads
            total = total + block["attn"]["b_O"]
        if include_mlp_biases and not own_input_only and not cfg.attn_only:
            total = total + _mlp_bias(block["mlp"], total)
    return total if cfg.residual_multiplier == 1.0 else total * jnp.asarray(cfg.residual_multiplier, total.dtype)


def _mlp_bias(mlp: Mapping[str, Any], like: jax.Array) -> jax.Array:
    if "experts" not in mlp:
        return mlp["b_out"]
    shared = mlp.get("shared", {}).get("b_out")
    gated_shared = shared is not None and "W_shared_gate" in mlp and not _is_zero(shared)
    if "b_out" in mlp["experts"] or gated_shared:
        raise ConfigError(
            "Which expert's bias this model adds, and how much of it, depends on the token, so their sum is no "
            "constant vector. Pass include_mlp_biases=False, or read model.blocks[layer].mlp."
        )
    return jnp.zeros_like(like) if shared is None else shared


def _is_zero(x: jax.Array) -> bool:
    return not isinstance(x, Tracer) and not bool(jnp.any(x))
