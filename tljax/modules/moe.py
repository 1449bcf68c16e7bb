"""A mixture of experts in place of the MLP: a router, the experts it chooses, and an expert that all tokens share."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tljax.config import HookedTransformerConfig
from tljax.hooks.point import hook, is_hooked
from tljax.modules import initializers
from tljax.modules.activations import activation, scaled
from tljax.modules.grouped import Times, grouped
from tljax.modules.mlp import MLP
from tljax.modules.parameters import parameter, stored_parameter
from tljax.numerics import widened

Projection = tuple[Any, jax.Array | None]
"""All experts' matrices ``[expert, in, out]``, quantised or not, and biases ``[expert, out]`` where they have any."""


class Experts(nn.Module):
    """The experts of a mixture: gated or plain MLPs. Each token goes through a few of them.

    Tokens are grouped by expert (:func:`~tljax.modules.grouped.grouped`) for the whole MLP, or if a hook point inside
    it is hooked for each product, whose result is put back in the order of the tokens.
    """

    cfg: HookedTransformerConfig

    def setup(self) -> None:
        cfg = self.cfg
        for name in ("in", "gate", "out") if cfg.gated_mlp else ("in", "out"):
            read, written = ("d_expert", "d_model") if name == "out" else ("d_model", "d_expert")
            drawn = initializers.weight(cfg, read, written)
            weight = stored_parameter(self, f"W_{name}", drawn, f"n_experts {read} {written}")
            bias = None
            if cfg.expert_biases:
                bias = parameter(self, f"b_{name}", initializers.zeros, f"n_experts {written}")
            setattr(self, f"projection_{name}", (weight, bias))

    def __call__(self, x: jax.Array, indices: jax.Array) -> jax.Array:
        """Returns each chosen expert's output ``[batch, pos, choice, d_model]``.

        Args:
            x: ``[batch, pos, d_model]``.
            indices: ``[batch, pos, choice]`` int32, the chosen experts.
        """
        assert self.cfg.num_experts is not None
        shape, n_experts = indices.shape, self.cfg.num_experts
        rows = jnp.broadcast_to(x[:, :, None], (*shape, x.shape[-1])).reshape(-1, x.shape[-1])
        group = indices.reshape(-1)
        if not is_hooked(self, "hook_pre", "hook_pre_linear", "hook_post"):
            return grouped(self._expert, rows, group, n_experts).reshape(*shape, -1)

        def product(rows: jax.Array, projection: Projection) -> jax.Array:
            return grouped(lambda x, times: times(x, *projection), rows, group, n_experts).reshape(*shape, -1)

        if self.cfg.gated_mlp:
            pre = hook(self, "hook_pre", product(rows, self.projection_gate))
            post = self._act(pre, hook(self, "hook_pre_linear", product(rows, self.projection_in)))
        else:
            post = self._act(hook(self, "hook_pre", product(rows, self.projection_in)))
        post = hook(self, "hook_post", post)
        return product(post.reshape(-1, post.shape[-1]), self.projection_out)

    def _expert(self, x: jax.Array, times: Times) -> jax.Array:
        if self.cfg.gated_mlp:
            inner = self._act(times(x, *self.projection_gate), times(x, *self.projection_in))
        else:
            inner = self._act(times(x, *self.projection_in))
        return times(inner, *self.projection_out)

    def _act(self, pre: jax.Array, linear: jax.Array | None = None) -> jax.Array:
        """Applies the activation, and in a gated expert multiplies by the linear branch."""
        cfg = self.cfg
        assert cfg.act_fn is not None
        act = activation(cfg.act_fn)
        if linear is None:
            return act(pre)
        if (limit := cfg.swiglu_limit) is None:
            return act(pre) * linear
        return act(jnp.minimum(pre, limit)) * (jnp.clip(linear, -limit, limit) + 1)


class MoE(nn.Module):
    """Mixture of experts: the weighted sum of the outputs of the experts that the router chooses for each token.

    Three hook points decide the result: ``hook_router_scores``; ``hook_expert_weights``, the weights of all experts,
    from which those of the chosen ones are taken; and ``hook_expert_indices``, the choice. The weights come first if
    they decide the choice, otherwise the choice comes first (``cfg.router``).
    """

    cfg: HookedTransformerConfig

    def setup(self) -> None:
        cfg = self.cfg
        inward = initializers.weight(cfg, "d_model", "n_experts")
        self.W_router = parameter(self, "W_router", inward, "d_model n_experts")
        if cfg.expert_biases:
            self.b_router = parameter(self, "b_router", initializers.zeros, "n_experts")
        if cfg.router == "sigmoid":
            self.b_choice = parameter(self, "b_choice", initializers.zeros, "n_experts")
        self.experts = Experts(cfg)
        if cfg.d_shared_expert is not None:
            self.shared = MLP(cfg, "d_shared")
            if cfg.gate_shared_expert:
                gate = initializers.weight(cfg, "d_model", "one")
                self.W_shared_gate = parameter(self, "W_shared_gate", gate, "d_model one")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, pos, d_model]`` to the same shape."""
        x = hook(self, "hook_in", x)
        indices, weights = self._route(x)
        chosen = self.experts(x, indices) * weights.astype(x.dtype)[..., None]
        if is_hooked(self, "hook_expert_result"):
            assert self.cfg.num_experts is not None
            of_expert = jax.nn.one_hot(indices, self.cfg.num_experts, dtype=chosen.dtype)
            out = hook(self, "hook_expert_result", jnp.einsum("bpcd,bpce->bped", chosen, of_expert)).sum(axis=2)
        else:
            out = chosen.sum(axis=2)
        if self.cfg.d_shared_expert is None:
            return out
        shared = self.shared(x)
        if self.cfg.gate_shared_expert:
            gate = jax.nn.sigmoid(jnp.einsum("bpd,do->bpo", x, self.W_shared_gate))
            shared = shared * hook(self, "hook_shared_gate", gate)
        return out + shared

    def _route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the chosen experts ``[batch, pos, choice]`` int32, and their weights."""
        cfg, wide = self.cfg, widened(x.dtype)
        precise = wide if cfg.router == "sigmoid" or cfg.expert_biases else x.dtype
        scores = jnp.einsum("bpd,de->bpe", x.astype(precise), self.W_router.astype(precise))
        if cfg.expert_biases:
            scores = scores + self.b_router.astype(precise)[None, None]
        scores = hook(self, "hook_router_scores", scores)
        if cfg.router in ("chosen_softmax", "sparsemixer"):
            indices = self._chosen(scores)
            weights = _weights_of_chosen(cfg, scores.astype(wide), indices)
            weights = jnp.take_along_axis(hook(self, "hook_expert_weights", weights), indices, axis=-1)
        else:
            by = jax.nn.softmax if cfg.router == "softmax" else jax.nn.sigmoid
            everyone = hook(self, "hook_expert_weights", by(scores.astype(wide)))
            bias = self.b_choice.astype(wide)[None, None] if cfg.router == "sigmoid" else None
            indices = self._chosen(in_best_groups(cfg, everyone if bias is None else everyone + bias))
            weights = jnp.take_along_axis(everyone, indices, axis=-1)
            if cfg.norm_topk_prob:
                total = weights.sum(axis=-1, keepdims=True)
                weights = weights / jnp.where(total == 0, 1, total)  # a hook may have switched all of them off
        if is_hooked(self, "hook_expert_indices"):
            assert cfg.num_experts is not None
            exists = (indices >= 0) & (indices < cfg.num_experts)
            weights, indices = jnp.where(exists, weights, jnp.nan), jnp.where(exists, indices, 0)
        return indices, scaled(weights, cfg.routed_scaling_factor)

    def _chosen(self, scores: jax.Array) -> jax.Array:
        assert self.cfg.experts_per_token is not None
        return hook(self, "hook_expert_indices", jax.lax.top_k(scores, self.cfg.experts_per_token)[1])


def in_best_groups(cfg: HookedTransformerConfig, scores: jax.Array) -> jax.Array:
    """Sets scores ``[batch, pos, expert]`` to ``-inf`` outside the best groups (DeepSeek-AI 2024, DeepSeek-V2, V3)."""
    if cfg.expert_groups is None or cfg.expert_groups_per_token is None:
        return scores
    in_groups = scores.reshape(*scores.shape[:2], cfg.expert_groups, -1)
    counted = min(2, in_groups.shape[-1]) if cfg.router == "sigmoid" else 1
    merit = jax.lax.top_k(in_groups, counted)[0].sum(axis=-1)
    best = jax.lax.top_k(merit, cfg.expert_groups_per_token)[1]
    kept = jax.nn.one_hot(best, cfg.expert_groups, dtype=jnp.bool_).any(axis=2)
    return jnp.where(kept[..., None], in_groups, -jnp.inf).reshape(scores.shape)


def _weights_of_chosen(cfg: HookedTransformerConfig, scores: jax.Array, indices: jax.Array) -> jax.Array:
    """Returns weights ``[batch, pos, expert]`` for routers that choose experts first; zero for experts not chosen."""
    if cfg.router == "sparsemixer":
        return _sparsemixer(cfg, scores, indices)
    chosen = jax.nn.one_hot(indices, scores.shape[-1], dtype=jnp.bool_).any(axis=2)
    return jax.nn.softmax(scores, axis=-1, where=chosen)


def _sparsemixer(cfg: HookedTransformerConfig, scores: jax.Array, indices: jax.Array) -> jax.Array:
    """Weighs each of two experts by a softmax over the experts whose score is close, the second without the first.

    This is how SparseMixer weighs experts outside training (Liu et al. 2024, GRIN: GRadient-INformed MoE).
    """
    left, weights = scores, jnp.zeros_like(scores)
    for choice in range(indices.shape[-1]):
        chosen = jax.nn.one_hot(indices[..., choice], scores.shape[-1], dtype=jnp.bool_)
        best = jax.lax.stop_gradient(left.max(axis=-1, keepdims=True))
        distance = (best - scores) / jnp.maximum(jnp.abs(scores), best)
        close = ~(jax.lax.stop_gradient(distance) > 2 * cfg.router_jitter)
        weights += jnp.where(chosen, jax.nn.softmax(left, axis=-1, where=close), 0)
        left = jnp.where(chosen, -jnp.inf, left)
    return weights
