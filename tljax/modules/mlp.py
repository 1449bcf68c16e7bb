"""The MLP: plain, gated, and SoLU with its inner layer norm."""

import flax.linen as nn
import jax

from tljax.config import HookedTransformerConfig
from tljax.hooks.point import hook
from tljax.modules import initializers
from tljax.modules.activations import activation
from tljax.modules.few_rows import product
from tljax.modules.norm import make_norm


class MLP(nn.Module):
    """``act(x W_in + b_in) W_out + b_out``, or gated ``(act(x W_gate) * (x W_in) + b_in) W_out + b_out``."""

    cfg: HookedTransformerConfig

    def setup(self) -> None:
        cfg, dtype, width = self.cfg, self.cfg.jnp_dtype, self.cfg.d_mlp
        assert width is not None
        inward = initializers.weight(cfg, cfg.d_model, width)
        self.W_in = self.param("W_in", inward, (cfg.d_model, width), dtype)
        self.b_in = self.param("b_in", initializers.zeros, (width,), dtype)
        if cfg.gated_mlp:
            self.W_gate = self.param("W_gate", inward, (cfg.d_model, width), dtype)
        self.W_out = self.param("W_out", initializers.weight(cfg, width, cfg.d_model), (width, cfg.d_model), dtype)
        self.b_out = self.param("b_out", initializers.zeros, (cfg.d_model,), dtype)
        if cfg.act_fn == "solu_ln":
            self.ln = make_norm(cfg, "LN" if cfg.normalization_type == "LN" else "LNPre", width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[batch, pos, d_model]`` to the same shape."""
        x = hook(self, "hook_in", x)
        post = hook(self, "hook_post", self._gated(x) if self.cfg.gated_mlp else self._plain(x))
        return product(self, "W_out", post, self.W_out) + self.b_out[None, None]

    def _plain(self, x: jax.Array) -> jax.Array:
        assert self.cfg.act_fn is not None
        pre = hook(self, "hook_pre", product(self, "W_in", x, self.W_in) + self.b_in[None, None])
        post = activation(self.cfg.act_fn)(pre)
        return self.ln(hook(self, "hook_mid", post)) if self.cfg.act_fn == "solu_ln" else post

    def _gated(self, x: jax.Array) -> jax.Array:
        assert self.cfg.act_fn is not None
        gate = hook(self, "hook_pre", product(self, "W_gate", x, self.W_gate))
        linear = hook(self, "hook_pre_linear", product(self, "W_in", x, self.W_in))
        return activation(self.cfg.act_fn)(gate) * linear + self.b_in[None, None]
