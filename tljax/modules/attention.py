"""Multi-head, grouped-query and multi-query attention."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from tljax.attention_kernels import KERNELS
from tljax.config import HookedTransformerConfig, LayerKind
from tljax.hooks.point import hook, is_hooked
from tljax.modules import initializers
from tljax.modules.attention_path import MATERIALISED, MATRICES, attention_path, spliced_at_matrix
from tljax.modules.blockwise import Heads, attend_by_blocks
from tljax.modules.context import AttentionContext
from tljax.modules.kernels import attend_by_kernel
from tljax.modules.norm import head_norm
from tljax.modules.parameters import parameter
from tljax.modules.past import PAST
from tljax.modules.products import product
from tljax.modules.rotary import rotate
from tljax.modules.scores import Places, finished_scores, head_slopes, numbered_keys, softmax

KEYS_READ, VALUES_READ = "read_k", "read_v"
KEYS_AND_VALUES = (f"attn.{KEYS_READ}", f"attn.{VALUES_READ}")
"""Names, in a block, under which a run can record keys and values as attention reads them: after norm and rotation."""


class Attention(nn.Module):
    """Attention with a hook at every step: q, k, v, rotated q and k, scores, pattern, z, and each head's result.

    Attributes:
        cfg: the model's config.
        kind: the layer's kind (:meth:`~tljax.config.HookedTransformerConfig.layer_kind`).
    """

    read_later: ClassVar[tuple[str, ...]] = ("W_K", "W_V")
    """Matrices that make a token's keys and values: later tokens read these even if its own output is not needed."""

    rotates_last: ClassVar[bool] = False
    """Whether the last dimensions of a head rotate, not the leading ones."""

    cfg: HookedTransformerConfig
    kind: LayerKind

    def setup(self) -> None:
        cfg, value = self.cfg, self.value_axis
        self.set_up_readers()
        out_of_heads = initializers.weight(cfg, value, "n_heads d_model")
        self.W_O = parameter(self, "W_O", out_of_heads, f"n_heads {value} d_model")
        self.b_O = parameter(self, "b_O", initializers.zeros, "d_model")
        if cfg.use_qk_norm:
            self.q_norm, self.k_norm = head_norm(cfg, "n_heads"), head_norm(cfg, "n_kv")
        if cfg.use_attention_sinks:
            self.sinks = parameter(self, "sinks", initializers.zeros, "n_heads")

    @property
    def value_axis(self) -> str:
        """Name of the axis of a head's values."""
        return "d_head" if self.cfg.d_value is None else "d_value"

    def set_up_readers(self) -> None:
        """Makes the parameters of queries, keys and values."""
        self.projection_q = self.make_projection("Q", "n_heads", "d_head")
        self.projection_k = self.make_projection("K", "n_kv", "d_head")
        self.projection_v = self.make_projection("V", "n_kv", self.value_axis)

    def make_projection(self, letter: str, heads: str, width: str) -> tuple[jax.Array, jax.Array]:
        """Makes a weight ``[d_model, heads, width]`` and a bias ``[heads, width]``, with axes of these names."""
        inward = initializers.weight(self.cfg, "d_model", f"n_heads {width}")
        weight = parameter(self, f"W_{letter}", inward, f"d_model {heads} {width}")
        return weight, parameter(self, f"b_{letter}", initializers.zeros, f"{heads} {width}")

    def __call__(
        self, query_input: jax.Array, key_input: jax.Array, value_input: jax.Array, context: AttentionContext
    ) -> jax.Array:
        """Returns the attention output ``[batch, pos, d_model]``.

        The inputs are ``[batch, pos, d_model]``, or ``[batch, pos, head, d_model]`` if separate by head; the query
        input and the output hold only the tokens that :meth:`AttentionContext.computed` keeps.
        """
        q, k, v = self._prepare(*self.read_all(query_input, key_input, value_input), context)
        k, v = hook(self, KEYS_READ, k), hook(self, VALUES_READ, v)
        if context.packing is not None:
            q = context.packing.lay_out_queries(q)
            k, v = context.packing.lay_out_keys(k, v)
        if context.past is not None:
            k, v = (hook(self, name, array) for name, array in zip(PAST, context.past.extend(k, v), strict=True))
        layout = "bske" if context.past is None else "bkse"
        z = self._attend(q, k, v, layout, context)
        if context.packing is not None:
            z = context.packing.pack(z)
        z = hook(self, "hook_z", z)
        return self._combine_heads(z)

    def read_all(
        self, query_input: jax.Array, key_input: jax.Array, value_input: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries, keys and values, each :meth:`read` from its input and passed through its hook point."""
        q = hook(self, "hook_q", self.read(query_input, "q"))
        k = hook(self, "hook_k", self.read(key_input, "k"))
        return q, k, hook(self, "hook_v", self.read(value_input, "v"))

    def read(self, normalized: jax.Array, letter: str) -> jax.Array:
        """Computes queries, keys or values ``[batch, pos, head, d_head]`` of a normalised input, before rotation."""
        weight, bias = getattr(self, f"projection_{letter}")
        if normalized.ndim == 4:
            return jnp.einsum("bphd,dhe->bphe", normalized, weight) + bias[None, None]
        heads = product(self, f"W_{letter.upper()}", normalized, weight.reshape(weight.shape[0], -1))
        return heads.reshape(*normalized.shape[:2], *bias.shape) + bias[None, None]

    def read_apart(self, normalized: jax.Array, letter: str) -> jax.Array:
        """Computes what :meth:`read` does from an input for each head, ``[head, batch, pos, d_model]``.

        As one matrix product for each head, which is four times as fast as with the head axis inside.
        """
        weight, bias = getattr(self, f"projection_{letter}")
        by_head = jnp.einsum("hbpd,dhe->hbpe", normalized, weight)
        return jnp.moveaxis(by_head, 0, 2) + bias[None, None]

    def _prepare(
        self, q: jax.Array, k: jax.Array, v: jax.Array, context: AttentionContext
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Applies norm, clip and rotation to queries, keys and values."""
        cfg = self.cfg
        if cfg.use_qk_norm and not cfg.qk_norm_after_rotary:
            q, k = self._normalize(q, k)
        if (limit := cfg.clip_qkv) is not None:
            q, k, v = (jnp.clip(x, -limit, limit) for x in (q, k, v))
        if cfg.positional_embedding_type == "rotary":
            positions = context.positions_for(k.shape[1])
            lengths = context.lengths_for(positions)
            places = (context.computed(positions), context.computed(lengths))
            q = hook(self, "hook_rot_q", rotate(q, *places, cfg, self.kind, self.rotates_last))
            k = hook(self, "hook_rot_k", rotate(k, positions, lengths, cfg, self.kind, self.rotates_last))
        if cfg.use_qk_norm and cfg.qk_norm_after_rotary:
            q, k = self._normalize(q, k)
        return q, k, v

    def _normalize(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.cfg.qk_norm_span != "joint":
            return self.q_norm(q), self.k_norm(k)
        joined_q, joined_k = (x.reshape(*x.shape[:2], -1) for x in (q, k))
        return self.q_norm(joined_q).reshape(q.shape), self.k_norm(joined_k).reshape(k.shape)

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, layout: str, context: AttentionContext) -> jax.Array:
        """Computes pattern-weighted values ``[batch, query_pos, head, d_value]``, by the path of this run."""
        cfg, sinks = self.cfg, self.sinks if self.cfg.use_attention_sinks else None
        keys = k.shape[layout.index("s")]
        places, slopes = self._places(q.shape[1], keys, context), head_slopes(cfg)
        named = is_hooked(self, *MATRICES) or spliced_at_matrix(self.kind)
        plain = context.packing is None and context.past is None
        path = attention_path(cfg, self.kind, q.shape[1], keys, named, plain, context.token_mask is not None)
        if path.name == MATERIALISED:
            scores = finished_scores(_score(q, k, layout), cfg, self.kind, places, context.score_divisor, slopes)
            scores = hook(self, "hook_attn_scores", scores)
            return _weigh(hook(self, "hook_pattern", softmax(scores, sinks)), v, layout)
        if path.name in KERNELS:
            return attend_by_kernel(path.name, cfg, self.kind, q, k, v, places)
        heads = Heads.of(q, k, v, layout, slopes, sinks)
        return attend_by_blocks(cfg, self.kind, heads, places, context.score_divisor, in_order=plain)

    def _places(self, queries: int, keys: int, context: AttentionContext) -> Places:
        key_pos, token_mask = jnp.arange(keys, dtype=jnp.int32), context.token_mask
        query_pos = key_pos if context.packing is None else context.packing.query_pos
        if context.past is not None:
            query_pos = context.past.start + jnp.arange(queries, dtype=jnp.int32)
            key_pos, token_mask = context.past.keys_seen(queries)
        return Places(query_pos, key_pos, token_mask, numbered_keys(self.cfg, key_pos, token_mask))

    def _combine_heads(self, z: jax.Array) -> jax.Array:
        if is_hooked(self, "hook_result"):
            result = hook(self, "hook_result", jnp.einsum("bphe,hed->bphd", z, self.W_O))
            return result.sum(axis=2) + self.b_O[None, None]
        # As one matrix product: an einsum over both axes lets XLA pick their order, and it copied W_O on every call.
        joined, weight = z.reshape(*z.shape[:2], -1), self.W_O.reshape(-1, self.W_O.shape[-1])
        return product(self, "W_O", joined, weight) + self.b_O[None, None]


def _score(q: jax.Array, k: jax.Array, layout: str) -> jax.Array:
    """Computes dot products ``[batch, head, query_pos, key_pos]``; a key head serves consecutive query heads.

    ``layout`` names the axes of ``k``: b batch, s key position, k key head, e dimension of a head.
    """
    batch, length, heads, width = q.shape
    kv_heads = k.shape[layout.index("k")]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum(f"bqkge,{layout}->bkgqs", grouped, k)
    return scores.reshape(batch, heads, length, scores.shape[-1])


def _weigh(pattern: jax.Array, v: jax.Array, layout: str) -> jax.Array:
    """Computes pattern-weighted values ``[batch, query_pos, head, d_value]``; ``layout`` names the axes of ``v``."""
    batch, heads, queries, keys = pattern.shape
    kv_heads = v.shape[layout.index("k")]
    grouped = pattern.reshape(batch, kv_heads, heads // kv_heads, queries, keys)
    return jnp.einsum(f"bkgqs,{layout}->bqkge", grouped, v).reshape(batch, queries, heads, v.shape[3])
