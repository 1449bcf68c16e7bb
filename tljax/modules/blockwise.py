"""Attention over some queries at a time, so that no matrix of all queries and keys is ever made."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from tljax.config import HookedTransformerConfig, LayerKind
from tljax.memory import WORKING_BYTES
from tljax.modules.scores import Places, exponentials, finished_scores
from tljax.numerics import widened

MOST_BANDS = 8
"""Most stretches of queries that have a program part of their own: each reads only the keys that it can see."""
CPU_BYTES = 16 * 2**20
"""Most bytes of one block's scores on a CPU, where heads run one after another: what its caches serve well."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Heads:
    """What the heads of a layer read, with the query heads of one key head as a group.

    Attributes:
        q: ``[batch, kv_head, group, query_pos, d_head]``.
        k: ``[batch, kv_head, key_pos, d_head]``.
        v: ``[batch, kv_head, key_pos, d_value]``.
        slopes: ALiBi slopes ``[kv_head, group]``, or ``None``.
        sinks: ``[kv_head, group]``, or ``None``.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    slopes: jax.Array | None
    sinks: jax.Array | None

    @classmethod
    def of(
        cls,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        layout: str,
        slopes: jax.Array | None,
        sinks: jax.Array | None,
    ) -> "Heads":
        """Groups heads; the arguments are as attention has them, ``layout`` as in its products."""
        k, v = (jnp.einsum(f"{layout}->bkse", x) for x in (k, v))
        batch, queries, heads, width = q.shape
        groups = (k.shape[1], heads // k.shape[1])
        grouped = jnp.moveaxis(q.reshape(batch, queries, *groups, width), 1, 3)
        return cls(grouped, k, v, *(None if x is None else x.reshape(groups) for x in (slopes, sinks)))


def attend_by_blocks(
    cfg: HookedTransformerConfig, kind: LayerKind, heads: Heads, places: Places, score_divisor: Any, in_order: bool
) -> jax.Array:
    """Computes pattern-weighted values ``[batch, query_pos, head, d_value]``.

    The same numbers as softmax over the whole matrix, by blocks of queries with all the keys that these see. On a CPU
    heads run one after another (a block's scores then stay in its caches); elsewhere all heads run at once, and blocks
    are smaller where they must. A backward pass computes each block again: it keeps queries, keys and values alone.

    Args:
        cfg: the model's config.
        kind: the layer's kind.
        heads: queries, keys and values.
        places: where these are in the text.
        score_divisor: the layer's own divisor of scores, a scalar, or ``None``.
        in_order: whether query and key ``n`` are both at position ``n``: keys out of sight are then left out.
    """
    serial = in_turns()
    batch, kv_heads, group, queries, _ = heads.q.shape
    block = _block_size(cfg, group, heads.k.shape[2], 1 if serial else batch * kv_heads, serial)
    spans = [(band, _seen(cfg, kind, band, heads.k.shape[2], in_order)) for band in _bands(queries, block, in_order)]
    part = functools.partial(_attend_block, cfg, kind, score_divisor)
    part = jax.checkpoint(part, prevent_cse=not serial)

    def of_key_head(one: Heads, places: Places) -> jax.Array:
        return jnp.concatenate([_attend_band(part, one, places, *span) for span in spans], axis=1)

    of_key_head = jax.checkpoint(of_key_head, prevent_cse=not serial)

    def of_prompt(q: jax.Array, k: jax.Array, v: jax.Array, mask: Any, keys: Any) -> jax.Array:
        here = dataclasses.replace(places, token_mask=mask, keys=keys)
        return _each(serial, lambda one: of_key_head(one, here), Heads(q, k, v, heads.slopes, heads.sinks))

    keys = None if places.keys is None else jnp.broadcast_to(places.keys, (batch, heads.k.shape[2]))
    z = _each(serial, lambda xs: of_prompt(*xs), (heads.q, heads.k, heads.v, places.token_mask, keys))
    return jnp.moveaxis(z, 3, 1).reshape(batch, queries, kv_heads * group, -1)


def in_turns() -> bool:
    """Whether heads run one after another: on a CPU."""
    return jax.default_backend() == "cpu"


@dataclasses.dataclass(frozen=True)
class _Band:
    """A stretch of queries: ``count`` blocks of ``size``, from ``start`` on."""

    start: int
    size: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.size * self.count


def _each(serial: bool, function: Callable[[Any], jax.Array], xs: Any) -> jax.Array:
    """Applies a function to each entry of the leading axis: one after another, or all at once."""
    return jax.lax.map(function, xs) if serial else jax.vmap(function)(xs)


def _block_size(cfg: HookedTransformerConfig, group: int, keys: int, at_once: int, serial: bool) -> int:
    """Returns how many queries a block has: ``cfg.attention_block`` over a group's heads, fewer if memory is short."""
    fit = (CPU_BYTES if serial else WORKING_BYTES) // (4 * keys * at_once)
    return max(1, min(cfg.attention_block, fit) // group)


def _bands(queries: int, block: int, in_order: bool) -> Iterator[_Band]:
    """Yields few stretches of queries, equally long: each costs a part of the program."""
    blocks, rest = divmod(queries, block)
    together = -(-blocks // (MOST_BANDS if in_order else 1))
    start = 0
    while blocks:
        count = min(together, blocks)
        yield _Band(start, block, count)
        start, blocks = start + count * block, blocks - count
    if rest:
        yield _Band(start, rest, 1)


def _seen(cfg: HookedTransformerConfig, kind: LayerKind, band: _Band, keys: int, in_order: bool) -> slice:
    """Returns the keys that some query of a band may see."""
    if not in_order:
        return slice(0, keys)
    first, last = 0, keys
    if kind.local:
        assert cfg.window_size is not None
        first, last = max(0, band.start - cfg.window_size + 1), min(keys, band.stop + cfg.window_size - 1)
    return slice(first, min(last, band.stop) if cfg.attention_dir == "causal" else last)


def _attend_band(
    part: Callable[[Heads, Places], jax.Array], one: Heads, places: Places, band: _Band, seen: slice
) -> jax.Array:
    """Computes ``[group, query_pos, d_value]`` of a band's queries over the keys it sees, for one key head."""
    mask, keys = (None if x is None else x[seen] for x in (places.token_mask, places.keys))
    one = dataclasses.replace(one, k=one.k[seen], v=one.v[seen])
    places = Places(places.query_pos, places.key_pos[seen], mask, keys)

    def run(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        return part(dataclasses.replace(one, q=block[0]), dataclasses.replace(places, query_pos=block[1]))

    q, query_pos = one.q[:, band.start : band.stop], places.query_pos[band.start : band.stop]
    if band.count == 1:
        return run((q, query_pos))
    blocks = jnp.moveaxis(q.reshape(q.shape[0], band.count, band.size, q.shape[2]), 1, 0)
    z = jax.lax.map(run, (blocks, query_pos.reshape(band.count, band.size)))
    return jnp.moveaxis(z, 0, 1).reshape(q.shape[0], band.stop - band.start, -1)


def _attend_block(
    cfg: HookedTransformerConfig, kind: LayerKind, score_divisor: Any, one: Heads, places: Places
) -> jax.Array:
    """Computes ``[group, query_pos, d_value]`` of a block's queries, for one key head."""
    batched = dataclasses.replace(
        places,
        token_mask=None if places.token_mask is None else places.token_mask[None],
        keys=None if places.keys is None else places.keys[None],
    )
    products = jnp.einsum("gqe,se->gqs", one.q, one.k)[None]
    scores = finished_scores(products, cfg, kind, batched, score_divisor, one.slopes)
    weights, total = exponentials(scores, one.sinks)
    # Divided after the product with the values: one pass over the block less.
    wide = widened(one.v.dtype)
    z = jnp.einsum("gqs,se->gqe", weights[0].astype(one.v.dtype), one.v, preferred_element_type=wide)
    return (z / total[0].astype(wide)).astype(one.v.dtype)
