"""Multi-head, grouped-query and multi-query attention."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tljax.config import HookedTransformerConfig
from tljax.hooks.point import Window, hook, is_hooked
from tljax.modules import initializers
from tljax.modules.activations import soft_cap
from tljax.modules.few_rows import product
from tljax.modules.norm import Norm, widened
from tljax.modules.packing import Packing
from tljax.modules.past import PAST, Past
from tljax.modules.rotary import rotate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionContext:
    """What attention needs to know of the run besides the residual stream.

    Attributes:
        positions: ``[batch, pos]`` position of each token; ``None`` means 0, 1, 2, …
        token_mask: ``[batch, pos]`` boolean, ``False`` at padding; ``None`` means no padding.
        score_divisor: scalar that divides the scores besides ``attn_scale`` (a layer's own); ``None`` means one.
        past: keys and values of earlier tokens; the run then holds only what follows them.
        pasts: those of every layer, before :func:`~tljax.forward.context_of_layer` picks one.
        window: which part of a longer text the run holds, for interventions.
        packing: how rows are laid out in a packed run (``[row, pos]`` is then the shape of ``token_mask``).
    """

    positions: jax.Array | None = None
    token_mask: jax.Array | None = None
    score_divisor: jax.Array | np.float32 | None = None
    packing: Packing | None = None
    past: Past | None = None
    pasts: tuple[Past, ...] | None = None
    window: Window | None = None

    def positions_for(self, length: int) -> jax.Array:
        """Positions ``[batch or 1, pos]``."""
        return jnp.arange(length, dtype=jnp.int32)[None] if self.positions is None else self.positions

    def computed(self, x: jax.Array) -> jax.Array:
        """The tokens ``[batch, pos, ...]`` whose output is wanted: all of them unless a packed run says otherwise."""
        return x if self.packing is None or self.packing.computed is None else x[:, self.packing.computed]


def visible(
    cfg: HookedTransformerConfig, kind: str, query_pos: jax.Array, key_pos: jax.Array, token_mask: jax.Array | None
) -> jax.Array | None:
    """Which keys each query may attend to, boolean ``[batch or 1, 1, query_pos, key_pos]``; ``None`` means all."""
    query, key = query_pos[:, None], key_pos[None, :]
    mask = None
    if cfg.attention_dir == "causal":
        mask = key <= query
    if kind.startswith("local"):
        assert cfg.window_size is not None
        window = (key > query - cfg.window_size) & (key < query + cfg.window_size)
        mask = window if mask is None else mask & window
    if mask is not None:
        mask = mask[None, None]
    if token_mask is not None:
        keys = token_mask[:, None, None, :]
        mask = keys if mask is None else mask & keys
    return mask


def softmax(scores: jax.Array) -> jax.Array:
    """Softmax over keys in float32; a row with every key masked is all zeros, and its gradient is zero, not NaN."""
    wide = scores.astype(widened(scores.dtype))
    peak = jax.lax.stop_gradient(wide.max(axis=-1, keepdims=True))
    weights = jnp.exp(wide - jnp.where(jnp.isfinite(peak), peak, 0))
    total = weights.sum(axis=-1, keepdims=True)
    return (weights / jnp.where(total == 0, 1, total)).astype(scores.dtype)


class Attention(nn.Module):
    """Attention with a hook at every step: q, k, v, rotated q and k, scores, pattern, z, and each head's result.

    Attributes:
        cfg: the model's config.
        kind: as :meth:`~tljax.config.HookedTransformerConfig.layer_kind` gives it.
    """

    cfg: HookedTransformerConfig
    kind: str = "global"

    def setup(self) -> None:
        cfg, dtype = self.cfg, self.cfg.jnp_dtype
        into_heads = initializers.weight(cfg, cfg.d_model, cfg.n_heads * cfg.d_head)
        out_of_heads = initializers.weight(cfg, cfg.d_head, cfg.n_heads * cfg.d_model)
        for letter, heads in (("Q", cfg.n_heads), ("K", cfg.kv_heads), ("V", cfg.kv_heads)):
            weight = self.param(f"W_{letter}", into_heads, (cfg.d_model, heads, cfg.d_head), dtype)
            bias = self.param(f"b_{letter}", initializers.zeros, (heads, cfg.d_head), dtype)
            setattr(self, f"projection_{letter.lower()}", (weight, bias))
        self.W_O = self.param("W_O", out_of_heads, (cfg.n_heads, cfg.d_head, cfg.d_model), dtype)
        self.b_O = self.param("b_O", initializers.zeros, (cfg.d_model,), dtype)
        if cfg.use_qk_norm:
            self.q_norm, self.k_norm = (Norm(cfg, "RMS", cfg.d_head) for _ in range(2))

    def __call__(
        self, query_input: jax.Array, key_input: jax.Array, value_input: jax.Array, context: AttentionContext
    ) -> jax.Array:
        """Returns the attention output ``[batch, pos, d_model]``.

        The inputs are ``[batch, pos, d_model]``, or ``[batch, pos, head, d_model]`` where heads read apart; the query
        input and the output hold only the tokens that :meth:`AttentionContext.computed` keeps.
        """
        q = hook(self, "hook_q", self.read(query_input, "q"))
        k = hook(self, "hook_k", self.read(key_input, "k"))
        v = hook(self, "hook_v", self.read(value_input, "v"))
        if self.cfg.use_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.cfg.positional_embedding_type == "rotary":
            positions = context.positions_for(k.shape[1])
            q = hook(self, "hook_rot_q", rotate(q, context.computed(positions), self.cfg, self.kind))
            k = hook(self, "hook_rot_k", rotate(k, positions, self.cfg, self.kind))
        if context.packing is not None:
            q = context.packing.lay_out_queries(q)
            k, v = context.packing.lay_out_keys(k, v)
        if context.past is not None:
            k, v = (hook(self, name, array) for name, array in zip(PAST, context.past.extend(k, v), strict=True))
        layout = "bske" if context.past is None else "bkse"
        z = _weigh(self._pattern(q, k, layout, context), v, layout)
        if context.packing is not None:
            z = context.packing.pack(z)
        z = hook(self, "hook_z", z)
        return self._combine_heads(z)

    def read(self, normalized: jax.Array, letter: str) -> jax.Array:
        """Queries, keys or values ``[batch, pos, head, d_head]`` of a normalised input, before any rotation."""
        weight, bias = getattr(self, f"projection_{letter}")
        if normalized.ndim == 4:
            return jnp.einsum("bphd,dhe->bphe", normalized, weight) + bias[None, None]
        heads = product(self, f"W_{letter.upper()}", normalized, weight.reshape(weight.shape[0], -1))
        return heads.reshape(*normalized.shape[:2], *bias.shape) + bias[None, None]

    def _pattern(self, q: jax.Array, k: jax.Array, layout: str, context: AttentionContext) -> jax.Array:
        scores = _score(q, k, layout) / jnp.asarray(self.cfg.attn_scale, q.dtype)
        if context.score_divisor is not None:
            scores = scores / jnp.asarray(context.score_divisor).astype(scores.dtype)
        scores = soft_cap(scores, self.cfg.attn_scores_soft_cap)
        key_pos, token_mask = jnp.arange(k.shape[layout.index("s")]), context.token_mask
        query_pos = key_pos if context.packing is None else context.packing.query_pos
        if context.past is not None:
            query_pos = context.past.start + jnp.arange(q.shape[1])
            key_pos, token_mask = context.past.keys_seen(q.shape[1])
        mask = visible(self.cfg, self.kind, query_pos, key_pos, token_mask)
        if mask is not None:
            scores = jnp.where(mask, scores, -jnp.inf)
        scores = hook(self, "hook_attn_scores", scores)
        return hook(self, "hook_pattern", softmax(scores))

    def _combine_heads(self, z: jax.Array) -> jax.Array:
        if is_hooked(self, "hook_result"):
            result = hook(self, "hook_result", jnp.einsum("bphe,hed->bphd", z, self.W_O))
            return result.sum(axis=2) + self.b_O[None, None]
        # As one matrix product: an einsum over both axes lets XLA pick their order, and it copied W_O on every call.
        joined, weight = z.reshape(*z.shape[:2], -1), self.W_O.reshape(-1, self.W_O.shape[-1])
        return product(self, "W_O", joined, weight) + self.b_O[None, None]


def _score(q: jax.Array, k: jax.Array, layout: str) -> jax.Array:
    """Dot products ``[batch, head, query_pos, key_pos]``; each key head serves a run of consecutive query heads.

    ``layout`` names the axes of ``k``: b batch, s key position, k key head, e within a head.
    """
    batch, length, heads, width = q.shape
    kv_heads = k.shape[layout.index("k")]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum(f"bqkge,{layout}->bkgqs", grouped, k)
    return scores.reshape(batch, heads, length, scores.shape[-1])


def _weigh(pattern: jax.Array, v: jax.Array, layout: str) -> jax.Array:
    """Pattern-weighted values ``[batch, query_pos, head, d_head]``; ``layout`` names the axes of ``v``."""
    batch, heads, queries, keys = pattern.shape
    kv_heads = v.shape[layout.index("k")]
    grouped = pattern.reshape(batch, kv_heads, heads // kv_heads, queries, keys)
    return jnp.einsum(f"bkgqs,{layout}->bqkge", grouped, v).reshape(batch, queries, heads, v.shape[3])
