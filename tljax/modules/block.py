"""One transformer block: the unit that is compiled. It does not know its own index."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tljax.config import HookedTransformerConfig, LayerKind
from tljax.hooks.point import hook, is_hooked
from tljax.modules.activations import scaled
from tljax.modules.attention import Attention
from tljax.modules.context import AttentionContext
from tljax.modules.latent_attention import LatentAttention
from tljax.modules.mlp import MLP
from tljax.modules.moe import MoE
from tljax.modules.norm import make_norm, norm_kind
from tljax.splice import Splice


class TransformerBlock(nn.Module):
    """Attention and MLP around the residual stream, in sequence or in parallel.

    Attributes:
        cfg: the model's config.
        kind: what differs between layers' programs (:meth:`~tljax.config.HookedTransformerConfig.layer_kind`).
    """

    cfg: HookedTransformerConfig
    kind: LayerKind

    @property
    def splices(self) -> tuple[Splice, ...]:
        """The dictionaries spliced into the block."""
        return self.kind.splices

    def setup(self) -> None:
        cfg = self.cfg
        self.ln1 = make_norm(cfg, norm_kind(cfg, "ln1"))
        self.attn = make_attention(cfg, self.kind)
        self.ln1_post = make_norm(cfg, norm_kind(cfg, "ln1_post"))
        if not cfg.attn_only:
            self.ln2 = make_norm(cfg, norm_kind(cfg, "ln2"))
            self.mlp = make_mlp(cfg, self.kind)
            self.ln2_post = make_norm(cfg, norm_kind(cfg, "ln2_post"))

    def __call__(self, resid_pre: jax.Array, context: AttentionContext) -> jax.Array:
        """Returns the residual stream ``[batch, pos, d_model]`` after the block, of tokens that are computed."""
        resid_pre = hook(self, "hook_resid_pre", resid_pre)
        attn_out = self.attention_branch(resid_pre, context)
        resid_pre = context.computed(resid_pre)
        if self.cfg.attn_only:
            return hook(self, "hook_resid_post", self._after(self.ln1, resid_pre + attn_out))
        if self.cfg.parallel_attn_mlp:
            return hook(self, "hook_resid_post", resid_pre + attn_out + self.mlp_branch(resid_pre))
        resid_mid = hook(self, "hook_resid_mid", self._after(self.ln1, resid_pre + attn_out))
        return hook(self, "hook_resid_post", self._after(self.ln2, resid_mid + self.mlp_branch(resid_mid)))

    def attention_branch(self, resid_pre: jax.Array, context: AttentionContext) -> jax.Array:
        """Returns what attention adds to the residual stream ``[batch, pos, d_model]``, of tokens that are computed."""
        query, key, value = self._attention_inputs(resid_pre, context)
        attn_out = self.attention_output(self.attn(context.computed(query), key, value, context))
        return hook(self, "hook_attn_out", attn_out)

    def mlp_branch(self, resid: jax.Array) -> jax.Array:
        """Returns what the MLP adds to the residual stream ``[batch, pos, d_model]`` that it reads."""
        mlp_out = self.ln2_post(self.mlp(self._before(self.ln2, hook(self, "hook_mlp_in", resid))))
        return hook(self, "hook_mlp_out", scaled(mlp_out, self.cfg.residual_multiplier))

    def read_heads(self, resid_pre: jax.Array, context: AttentionContext, letter: str) -> jax.Array:
        """Computes queries, keys or values (``letter`` ``"q"``, ``"k"``, ``"v"``) of the stream entering the block."""
        return self.attn.read(self.attention_input(resid_pre, context, letter), letter)

    def attention_input(self, resid_pre: jax.Array, context: AttentionContext, letter: str) -> jax.Array:
        """Returns what queries, keys or values are computed from: the normalised residual stream."""
        return self._read_by(letter, self._before(self.ln1, resid_pre), context)

    def read_apart(self, inputs: jax.Array, context: AttentionContext) -> dict[str, jax.Array]:
        """Computes queries, keys and values of heads that each read a stream of their own.

        Args:
            inputs: streams ``[reader, batch, pos, d_model]``: those of all query heads, then of all key/value heads for
                their keys, then for their values.
            context: as in :meth:`__call__`.

        Returns:
            ``"q"``, ``"k"`` and ``"v"``, each ``[batch, pos, head, d_head]``, before any rotation.
        """
        heads, kv_heads = self.cfg.n_heads, self.cfg.kv_heads
        normalized = self._before(self.ln1, inputs)
        read = {}
        for letter, first, count in (("q", 0, heads), ("k", heads, kv_heads), ("v", heads + kv_heads, kv_heads)):
            own = normalized[first : first + count]
            if letter != "v" and self.cfg.positional_embedding_type == "shortformer":
                assert context.pos_embed is not None
                own = own + context.pos_embed[None, :, : inputs.shape[2]]
            read[letter] = self.project_apart(own, letter)
        return read

    def project_apart(self, normalized: jax.Array, letter: str) -> jax.Array:
        """Computes queries, keys or values from an input for each head that is normalised already.

        Args:
            normalized: ``[head, batch, pos, d_model]``, with key/value heads for ``"k"`` and ``"v"``.
            letter: ``"q"``, ``"k"`` or ``"v"``.

        Returns:
            ``[batch, pos, head, d_head]``, before any rotation.
        """
        return self.attn.read_apart(normalized, letter)

    def attention_output(self, combined: jax.Array) -> jax.Array:
        """Returns what attention's combined heads ``[..., d_model]`` add to the residual stream."""
        return scaled(self.ln1_post(combined), self.cfg.residual_multiplier)

    def _before(self, norm: nn.Module, resid: jax.Array) -> jax.Array:
        """Returns the input of attention or MLP: the residual stream after ``norm``, if the norms come before."""
        return resid if self.cfg.use_normalization_of_residual else norm(resid)

    def _after(self, norm: nn.Module, resid: jax.Array) -> jax.Array:
        """Returns the residual stream after an addition, after ``norm`` if the model normalises the stream itself."""
        return norm(resid) if self.cfg.use_normalization_of_residual else resid

    def _read_by(self, letter: str, normalized: jax.Array, context: AttentionContext) -> jax.Array:
        """Returns the input of queries, keys or values; under ``shortformer``, queries and keys get positions added."""
        if letter == "v" or self.cfg.positional_embedding_type != "shortformer":
            return normalized
        assert context.pos_embed is not None, "a shortformer block runs with the embeddings of its positions"
        rows = context.pos_embed[:, : normalized.shape[1]]
        return normalized + (rows[:, :, None] if normalized.ndim == 4 else rows)

    def _attention_inputs(
        self, resid_pre: jax.Array, context: AttentionContext
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns normalised query, key and value inputs: one shared array unless a hook point needs separate ones."""
        cfg = self.cfg
        attn_in = resid_pre
        if is_hooked(self, "hook_attn_in"):
            attn_in = hook(self, "hook_attn_in", _per_head(resid_pre, cfg.n_heads))
        if not is_hooked(self, "hook_q_input", "hook_k_input", "hook_v_input"):
            normalized = self._before(self.ln1, attn_in)
            placed = self._read_by("q", normalized, context)
            return placed, placed, normalized
        inputs = (
            self._before(self.ln1, hook(self, name, attn_in if attn_in.ndim == 4 else _per_head(resid_pre, heads)))
            for name, heads in (
                ("hook_q_input", cfg.n_heads),
                ("hook_k_input", cfg.kv_heads),
                ("hook_v_input", cfg.kv_heads),
            )
        )
        query, key, value = (self._read_by(*pair, context) for pair in zip("qkv", inputs, strict=True))
        return query, key, value


def make_attention(cfg: HookedTransformerConfig, kind: LayerKind) -> Attention:
    """Returns the attention of layers of a kind."""
    return Attention(cfg, kind) if cfg.kv_lora_rank is None else LatentAttention(cfg, kind)


def make_mlp(cfg: HookedTransformerConfig, kind: LayerKind) -> MLP | MoE:
    """Returns the MLP of layers of a kind."""
    return MoE(cfg) if kind.experts else MLP(cfg)


def _per_head(x: jax.Array, heads: int) -> jax.Array:
    """Copies ``[batch, pos, d_model]`` to ``[batch, pos, head, d_model]``."""
    return jnp.broadcast_to(x[:, :, None, :], (*x.shape[:2], heads, x.shape[2]))
