"""Attention whose keys and values come from a latent that all heads share (DeepSeek-AI 2024, DeepSeek-V2)."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from tljax.hooks.point import hook
from tljax.modules import initializers
from tljax.modules.attention import Attention
from tljax.modules.norm import Norm
from tljax.modules.parameters import parameter


class LatentAttention(Attention):
    """Multi-head latent attention: :class:`Attention` whose queries, keys and values come from latents.

    ``W_KV_down`` projects the residual stream to a latent, which is normalised. From it ``W_V_up`` makes every head's
    values, and ``W_K_up`` its keys except their last ``rotary_dim`` dimensions. These alone rotate; ``W_K_rot`` makes
    them, the same for all heads. Queries go through a latent of their own (``W_Q_down``, ``W_Q_up``), or with
    ``q_lora_rank=None`` straight through ``W_Q``.

    ``hook_q_latent`` and ``hook_kv_latent`` are the latents as the up-projections read them, after the norm and its
    weight. If keys and values have separate inputs (``hook_k_input``, ``hook_v_input``), each has its own latent: the
    point then fires twice, first for the keys, and a run records the values' latent.

    Generation keeps the keys and values of every head, not the latent.
    """

    read_later: ClassVar[tuple[str, ...]] = ("W_KV_down", "W_K_rot", "W_K_up", "W_V_up")
    rotates_last: ClassVar[bool] = True

    def set_up_readers(self) -> None:
        cfg = self.cfg
        if cfg.q_lora_rank is None:
            self.projection_q = self.make_projection("Q", "n_heads", "d_head")
        else:
            self.down_q = self._make_down("Q_down", "q_rank")
            self.q_latent_norm = Norm(cfg, "RMS", "q_rank", eps=cfg.latent_norm_eps)
            self.W_Q_up = self._make_up("W_Q_up", "q_rank", "d_head")
        self.down_kv = self._make_down("KV_down", "kv_rank")
        self.rotary_k = self._make_down("K_rot", "d_rotary")
        self.kv_latent_norm = Norm(cfg, "RMS", "kv_rank", eps=cfg.latent_norm_eps)
        self.W_K_up = self._make_up("W_K_up", "kv_rank", "d_unrotated")
        self.W_V_up = self._make_up("W_V_up", "kv_rank", self.value_axis)

    def read_all(
        self, query_input: jax.Array, key_input: jax.Array, value_input: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        q = hook(self, "hook_q", self.read(query_input, "q"))
        latent = self._kv_latent(key_input)
        k = hook(self, "hook_k", self._keys(key_input, latent))
        if value_input is not key_input:
            latent = self._kv_latent(value_input)
        return q, k, hook(self, "hook_v", _up(latent, self.W_V_up))

    def read(self, normalized: jax.Array, letter: str) -> jax.Array:
        if letter == "q":
            if self.cfg.q_lora_rank is None:
                return super().read(normalized, "q")
            latent = self.q_latent_norm(_down(normalized, *self.down_q))
            return _up(hook(self, "hook_q_latent", latent), self.W_Q_up)
        latent = self._kv_latent(normalized)
        return self._keys(normalized, latent) if letter == "k" else _up(latent, self.W_V_up)

    def read_apart(self, normalized: jax.Array, letter: str) -> jax.Array:
        return self.read(jnp.moveaxis(normalized, 0, 2), letter)

    def _kv_latent(self, normalized: jax.Array) -> jax.Array:
        """Returns the latent ``[batch, pos, kv_lora_rank]``, with a head axis before the last if the input has one."""
        return hook(self, "hook_kv_latent", self.kv_latent_norm(_down(normalized, *self.down_kv)))

    def _keys(self, normalized: jax.Array, latent: jax.Array) -> jax.Array:
        own = _up(latent, self.W_K_up)
        rotating = _down(normalized, *self.rotary_k)
        if rotating.ndim == 3:
            rotating = jnp.broadcast_to(rotating[:, :, None], (*own.shape[:3], rotating.shape[-1]))
        return jnp.concatenate([own, rotating], axis=-1)

    def _make_down(self, name: str, width: str) -> tuple[jax.Array, jax.Array]:
        """Makes a weight ``[d_model, width]`` and a bias ``[width]``, with an axis of this name."""
        weight = parameter(self, f"W_{name}", initializers.weight(self.cfg, "d_model", width), f"d_model {width}")
        return weight, parameter(self, f"b_{name}", initializers.zeros, width)

    def _make_up(self, name: str, rank: str, width: str) -> jax.Array:
        """Makes a weight ``[rank, head, width]``, with axes of these names."""
        outward = initializers.weight(self.cfg, rank, f"n_heads {width}")
        return parameter(self, name, outward, f"{rank} n_heads {width}")


def _down(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """Projects a residual stream to ``[batch, pos, width]``, or ``[batch, pos, head, width]`` if it has a head axis."""
    return jnp.einsum("...d,dr->...r", x, weight) + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def _up(latent: jax.Array, weight: jax.Array) -> jax.Array:
    """Projects a latent, with or without a head axis, to ``[batch, pos, head, width]``."""
    return jnp.einsum("bphr,rhe->bphe" if latent.ndim == 4 else "bpr,rhe->bphe", latent, weight)
