"""The two ends of the model: tokens to residual stream, residual stream to logits."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tljax.checks import take
from tljax.config import HookedTransformerConfig
from tljax.hooks.point import hook
from tljax.modules import initializers
from tljax.modules.activations import scaled, soft_cap
from tljax.modules.context import AttentionContext
from tljax.modules.norm import make_norm, norm_kind
from tljax.modules.parameters import parameter
from tljax.modules.products import product
from tljax.splice import Splice


def _width(cfg: HookedTransformerConfig) -> str:
    """Returns the name of the axis of token embedding and unembedding."""
    return "d_model" if cfg.d_embed is None else "d_embed"


class Embed(nn.Module):
    """Token embedding: rows of ``W_E``, times ``embedding_multiplier``, projected or normalised in some models.

    Under trace an id that does not exist gives NaN.
    """

    cfg: HookedTransformerConfig

    def setup(self) -> None:
        cfg = self.cfg
        width = _width(cfg)
        initializer = initializers.weight(cfg, "d_vocab", width, embedding=True)
        self.W_E = parameter(self, "W_E", initializer, f"d_vocab {width}")
        if cfg.d_embed is not None:
            widening = initializers.weight(cfg, "d_embed", "d_model")
            self.W_proj = parameter(self, "W_proj", widening, "d_embed d_model")
        self.ln = make_norm(cfg, "LN" if cfg.post_embedding_ln else None)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps token ids ``[batch, pos]`` to ``[batch, pos, d_model]``."""
        rows = scaled(take(self.W_E, tokens), self.cfg.embedding_multiplier)
        return self.ln(rows if self.cfg.d_embed is None else rows @ self.W_proj)


class PosEmbed(nn.Module):
    """Learned position embedding: rows of ``W_pos``, and zeros at padding."""

    cfg: HookedTransformerConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, context: AttentionContext) -> jax.Array:
        """Maps ``[batch, pos]`` to ``[batch, pos, d_model]``."""
        cfg = self.cfg
        initializer = initializers.weight(cfg, "n_ctx", "d_model", embedding=True)
        rows = parameter(self, "W_pos", initializer, "n_ctx d_model")
        embedded = take(rows, context.positions_for(tokens.shape[1]))
        embedded = jnp.broadcast_to(embedded, (*tokens.shape, cfg.d_model))
        if context.token_mask is not None:
            embedded = jnp.where(context.token_mask[..., None], embedded, 0)
        return embedded


class EmbeddingStage(nn.Module):
    """Token ids to the first residual stream, with the dictionaries spliced in before the first block."""

    cfg: HookedTransformerConfig
    splices: tuple[Splice, ...] = ()

    def setup(self) -> None:
        self.embed = Embed(self.cfg)
        if self.cfg.learns_positions:
            self.pos_embed = PosEmbed(self.cfg)

    def __call__(self, tokens: jax.Array, context: AttentionContext) -> jax.Array:
        """Maps ``[batch, pos]`` to ``[batch, pos, d_model]``."""
        tokens = hook(self, "hook_tokens", jnp.asarray(tokens))
        residual = hook(self, "hook_embed", self.embed(tokens))
        if self.cfg.learns_positions:
            positions = hook(self, "hook_pos_embed", self.pos_embed(tokens, context))
            residual = residual + positions if self.cfg.positional_embedding_type == "standard" else residual
        return residual

    def embed_positions(self, tokens: jax.Array, context: AttentionContext) -> jax.Array:
        """Returns position embeddings alone, ``[batch, pos, d_model]``, for ``[batch, pos]`` of any values."""
        return self.pos_embed(tokens, context)


class Unembed(nn.Module):
    """``x W_U + b_U``, or ``x W_proj W_U + b_U``."""

    cfg: HookedTransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, pos, d_model]`` to ``[batch, pos, d_vocab_out]``."""
        cfg, width = self.cfg, _width(self.cfg)
        initializer = initializers.weight(cfg, width, "d_vocab_out", embedding=True)
        weight = parameter(self, "W_U", initializer, f"{width} d_vocab_out")
        bias = parameter(self, "b_U", initializers.zeros, "d_vocab_out")
        x = hook(self, "hook_in", x)
        if cfg.d_embed is not None:
            x = x @ parameter(self, "W_proj", initializers.weight(cfg, "d_model", "d_embed"), "d_model d_embed")
        return hook(self, "hook_out", product(self, "W_U", x, weight) + bias[None, None])


def final_norm(cfg: HookedTransformerConfig) -> nn.Module:
    """Returns the norm before the unembedding."""
    return make_norm(cfg, norm_kind(cfg, "ln_final"))


class HeadStage(nn.Module):
    """Final residual stream to logits: last norm, unembedding, multiplier, soft cap."""

    cfg: HookedTransformerConfig

    def setup(self) -> None:
        self.ln_final = final_norm(self.cfg)
        self.unembed = Unembed(self.cfg)

    def __call__(self, residual: jax.Array) -> jax.Array:
        """Maps ``[batch, pos, d_model]`` to ``[batch, pos, d_vocab_out]``."""
        return finish_logits(self.cfg, self.unembed(self.ln_final(residual)))


def finish_logits(cfg: HookedTransformerConfig, logits: jax.Array) -> jax.Array:
    """Applies multiplier and soft cap to the output of the unembedding."""
    return soft_cap(scaled(logits, cfg.logits_multiplier), cfg.output_logits_soft_cap)
