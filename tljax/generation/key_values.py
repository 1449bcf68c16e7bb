"""The key-value cache of generation: every attention layer's keys and values of the text so far, as one pytree."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tljax.config import HookedTransformerConfig
from tljax.hooks.point import Window
from tljax.modules.context import AttentionContext
from tljax.modules.past import PAST, Past, slot_positions
from tljax.text.padding import pad_axis


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of a text, for every layer, with room for more.

    Keys are kept as attention reads them: rotated, where the model rotates (TransformerLens keeps them unrotated), and
    one for each key-value head. A layer that sees only a window of the text keeps that window.

    Attributes:
        keys, values: one array a layer, ``[batch, kv_head, slot, d_head]``, values ``d_value`` wide; position ``p`` is
            in slot ``p`` modulo the number of slots.
        mask: ``[batch, pos]`` boolean, which positions hold a token to attend to; ``pos`` is the capacity.
        length: how many positions are filled, an int32 scalar.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    mask: jax.Array
    length: jax.Array

    @classmethod
    def init_cache(
        cls, cfg: HookedTransformerConfig, batch_size: int = 1, capacity: int | None = None, whole_text: bool = False
    ) -> "KeyValueCache":
        """Returns an empty cache.

        Args:
            cfg: the model's config.
            batch_size: number of texts.
            capacity: most tokens of a text; ``None`` means ``n_ctx``.
            whole_text: keep every position even in layers that see only a window.
        """
        capacity = cfg.n_ctx if capacity is None else capacity
        n_slots = [capacity if whole_text else slots(cfg, layer, capacity) for layer in range(cfg.n_layers)]
        keys, values = (
            tuple(jnp.zeros((batch_size, cfg.kv_heads, n, width), cfg.jnp_dtype) for n in n_slots)
            for width in (cfg.d_head, cfg.value_width)
        )
        return cls(keys, values, jnp.zeros((batch_size, capacity), bool), jnp.zeros((), jnp.int32))

    @property
    def capacity(self) -> int:
        """Most tokens of a text."""
        return self.mask.shape[1]

    def next_context(self, n_tokens: int = 1) -> tuple[AttentionContext, jax.Array]:
        """Returns the context to run the next ``n_tokens`` tokens of every text, and ``mask`` extended by them."""
        position = jnp.arange(self.capacity, dtype=jnp.int32)
        mask = self.mask | ((position >= self.length) & (position < self.length + n_tokens))[None]
        seen = self.mask.sum(axis=1, dtype=jnp.int32)[:, None]
        pasts = tuple(Past(k, v, mask, self.length) for k, v in zip(self.keys, self.values, strict=True))
        window, text = Window(self.length, self.capacity), jnp.cumsum(mask, axis=1) > 0  # from the first token on
        positions = seen + jnp.arange(n_tokens, dtype=jnp.int32)[None]
        return AttentionContext(positions, pasts=pasts, window=window, text=text), mask

    def after(self, recorded: Mapping[str, Any], mask: jax.Array, n_tokens: int = 1) -> "KeyValueCache":
        """Returns the cache after that run, which recorded the activations of :func:`past_names`."""
        keys, values = (
            tuple(recorded[f"blocks.{layer}.attn.{name}"] for layer in range(len(self.keys))) for name in PAST
        )
        return KeyValueCache(keys, values, mask, self.length + n_tokens)

    def filled(
        self, keys: Sequence[jax.Array], values: Sequence[jax.Array], mask: jax.Array, length: jax.Array
    ) -> "KeyValueCache":
        """Fills an empty cache with a prompt.

        Args:
            keys, values: one array a layer, ``[batch, prompt_pos, kv_head, d_head]``.
            mask: ``[batch, prompt_pos]``, ``False`` at padding.
            length: how many positions of them are the prompt; the rest is not kept.
        """
        new_keys = tuple(_into_slots(k, old, length) for k, old in zip(keys, self.keys, strict=True))
        new_values = tuple(_into_slots(v, old, length) for v, old in zip(values, self.values, strict=True))
        mask = mask & (jnp.arange(mask.shape[1]) < length)[None]
        return KeyValueCache(new_keys, new_values, pad_axis(mask, self.capacity), length)


HookedTransformerKeyValueCache = KeyValueCache


def slots(cfg: HookedTransformerConfig, layer: int, capacity: int) -> int:
    """Returns how many positions a layer must keep of a text of ``capacity`` tokens."""
    window = cfg.window_size if cfg.layer_kind(layer).local else None
    return capacity if window is None else min(window, capacity)


def past_names(cfg: HookedTransformerConfig) -> tuple[str, ...]:
    """Returns the names of the activations that a run must record for :meth:`KeyValueCache.after`."""
    return tuple(f"blocks.{layer}.attn.{name}" for layer in range(cfg.n_layers) for name in PAST)


def _into_slots(prompt: jax.Array, old: jax.Array, length: jax.Array) -> jax.Array:
    n_slots, n_pos = old.shape[2], prompt.shape[1]
    by_head = prompt.swapaxes(1, 2)
    position = slot_positions(length - 1, n_slots)
    fits = n_pos <= n_slots  # every position is in the slot of its number: no gather
    taken = pad_axis(by_head, n_slots, axis=2) if fits else by_head[:, :, jnp.clip(position, 0, n_pos - 1)]
    return jnp.where((position >= 0)[None, None, :, None], taken, old).astype(old.dtype)
