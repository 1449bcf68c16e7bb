"""The MLP: plain, gated, and SoLU with its inner layer norm."""

import math

import flax.linen as nn
import jax

from tljax.config import HookedTransformerConfig
from tljax.hooks.point import hook
from tljax.modules import initializers
from tljax.modules.activations import activation, xielu
from tljax.modules.norm import make_norm
from tljax.modules.parameters import parameter
from tljax.modules.products import product


class MLP(nn.Module):
    """``act(x W_in + b_in) W_out + b_out``, or gated ``(act(x W_gate) * (x W_in) + b_in) W_out + b_out``.

    Under ``cfg.gated_mlp_bias`` the gated form is ``(act(x W_gate + b_gate) * (x W_in + b_in)) W_out + b_out``.
    """

    cfg: HookedTransformerConfig
    width: str = "d_mlp"
    """Name of the axis of neurons."""

    def setup(self) -> None:
        cfg, width = self.cfg, self.width
        inward = initializers.weight(cfg, "d_model", width)
        self.W_in = parameter(self, "W_in", inward, f"d_model {width}")
        self.b_in = parameter(self, "b_in", initializers.zeros, width)
        if cfg.gated_mlp:
            self.W_gate = parameter(self, "W_gate", inward, f"d_model {width}")
        if cfg.gated_mlp_bias:
            self.b_gate = parameter(self, "b_gate", initializers.zeros, width)
        self.W_out = parameter(self, "W_out", initializers.weight(cfg, width, "d_model"), f"{width} d_model")
        self.b_out = parameter(self, "b_out", initializers.zeros, "d_model")
        if cfg.act_fn == "solu_ln":
            self.ln = make_norm(cfg, "LN" if cfg.normalization_type == "LN" else "LNPre", width)
        self.act = XIELU(cfg) if cfg.act_fn == "xielu" else activation(cfg.act_fn or "")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, pos, d_model]`` to the same shape."""
        x = hook(self, "hook_in", x)
        post = hook(self, "hook_post", self._gated(x) if self.cfg.gated_mlp else self._plain(x))
        return product(self, "W_out", post, self.W_out) + self.b_out[None, None]

    def _plain(self, x: jax.Array) -> jax.Array:
        pre = hook(self, "hook_pre", product(self, "W_in", x, self.W_in) + self.b_in[None, None])
        post = self.act(pre)
        return self.ln(hook(self, "hook_mid", post)) if self.cfg.act_fn == "solu_ln" else post

    def _gated(self, x: jax.Array) -> jax.Array:
        gate, linear = product(self, "W_gate", x, self.W_gate), product(self, "W_in", x, self.W_in)
        if self.cfg.gated_mlp_bias:
            gate, linear = gate + self.b_gate[None, None], linear + self.b_in[None, None]
        gate, linear = hook(self, "hook_pre", gate), hook(self, "hook_pre_linear", linear)
        post = self.act(gate) * linear
        return post if self.cfg.gated_mlp_bias else post + self.b_in[None, None]


class XIELU(nn.Module):
    """The activation of Apertus, with two learned numbers a layer; ``beta`` and ``eps`` are stored but not learned."""

    cfg: HookedTransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps an array of any shape to the same shape."""
        alpha_p, alpha_n = (
            parameter(self, name, initializers.constant(math.log(math.expm1(start))), "one").reshape([1] * x.ndim)
            for name, start in (("alpha_p", 0.8), ("alpha_n", 0.3))
        )
        beta, eps = (
            jax.lax.stop_gradient(parameter(self, name, initializers.constant(value), ""))
            for name, value in (("beta", 0.5), ("eps", -1e-6))
        )
        return xielu(x, alpha_p, alpha_n, beta, eps)
