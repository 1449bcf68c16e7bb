"""Attention by kernels of jax: cuDNN's on GPUs, splash attention on TPUs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tljax.attention_kernels import CUDNN, KERNELS, SPLASH
from tljax.config import HookedTransformerConfig, LayerKind
from tljax.modules.blockwise import Heads, attend_by_blocks
from tljax.modules.scores import Places
from tljax.numerics import widened

LANES = 128
"""The splash kernel's lengths and widths are multiples of this."""
BLOCKS = (512, 256, 128)
"""Its blocks of queries and keys, the best first."""
OLDEST_CARD = (8, 0)
"""Compute capability from which on cuDNN has the kernel."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def attend_by_kernel(
    name: str,
    cfg: HookedTransformerConfig,
    kind: LayerKind,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    places: Places,
) -> jax.Array:
    """Computes pattern-weighted values ``[batch, pos, head, d_head]`` by a kernel, and by blocks on other devices.

    Which of the two is settled when the program is compiled for a device, so one program can be exported for several.
    Derivatives are those of :func:`attend_by_blocks`, of any order, forward and backward: the kernels have derivatives
    of first order alone, backward alone, and what is recorded for them is larger.

    Args:
        name: the kernel's.
        cfg: the model's config.
        kind: the layer's kind.
        q: ``[batch, pos, head, d_head]``; query and key ``n`` are at position ``n``.
        k: ``[batch, pos, kv_head, d_head]``.
        v: as ``k``.
        places: where these are in the text.
    """

    def by_kernel(q: jax.Array, k: jax.Array, v: jax.Array, places: Places) -> jax.Array:
        return FUNCTIONS[name](cfg, kind, q, k, v, places.token_mask)

    branches: dict[str, Any] = {KERNELS[name].platform: by_kernel, "default": functools.partial(_blocks, cfg, kind)}
    return jax.lax.platform_dependent(q, k, v, places, **branches)


@attend_by_kernel.defjvp
def _derivative(
    name: str,
    cfg: HookedTransformerConfig,
    kind: LayerKind,
    primals: tuple[jax.Array, jax.Array, jax.Array, Places],
    tangents: tuple[Any, ...],
) -> tuple[jax.Array, jax.Array]:
    q, k, v, places = primals
    _, tangent = jax.jvp(lambda q, k, v: _blocks(cfg, kind, q, k, v, places), (q, k, v), tangents[:3])
    return attend_by_kernel(name, cfg, kind, q, k, v, places), tangent


def _blocks(
    cfg: HookedTransformerConfig, kind: LayerKind, q: jax.Array, k: jax.Array, v: jax.Array, places: Places
) -> jax.Array:
    return attend_by_blocks(cfg, kind, Heads.of(q, k, v, "bske", None, None), places, None, in_order=True)


def cudnn_attention(
    cfg: HookedTransformerConfig,
    kind: LayerKind,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    token_mask: jax.Array | None,
    implementation: Any = "cudnn",
) -> jax.Array:
    """Computes pattern-weighted values ``[batch, pos, head, d_head]`` by ``jax.nn.dot_product_attention``.

    ``implementation`` is jax's argument; ``token_mask`` must be ``None``.
    """
    assert token_mask is None
    attend = jax.custom_batching.custom_vmap(
        functools.partial(
            jax.nn.dot_product_attention,
            scale=1 / cfg.attn_scale,
            is_causal=cfg.attention_dir == "causal",
            local_window_size=_window(cfg, kind),
            implementation=implementation,
        )
    )

    # jax's own rule for this call wants a mapped axis at all of its arguments (0.10), and vmap over a hook at the
    # queries maps these alone.
    @attend.def_vmap
    def over_more_prompts(size: int, mapped: Any, *arrays: jax.Array) -> tuple[jax.Array, bool]:
        every = [
            x if here else jnp.broadcast_to(x[None], (size, *x.shape)) for x, here in zip(arrays, mapped, strict=True)
        ]
        z = attend(*(x.reshape(-1, *x.shape[2:]) for x in every))
        return z.reshape(size, -1, *z.shape[1:]), True

    return attend(q, k, v)


@functools.cache
def cudnn_refusal(dtype: str, d_head: int) -> str | None:
    """Returns why cuDNN's kernel cannot run in this process, as jax's own checks and the card say, or ``None``."""
    like = jax.ShapeDtypeStruct((1, LANES, 1, d_head), dtype)
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    try:
        jax.eval_shape(attend, like, like, like)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"jax says {error}"
    if jax.default_backend() == "gpu":
        card = jax.local_devices()[0]
        capability = tuple(int(part) for part in str(card.compute_capability).split("."))
        if capability < OLDEST_CARD:
            return f"{card.device_kind} has compute capability {card.compute_capability}, and it needs 8.0"
    return None


def splash_attention(
    cfg: HookedTransformerConfig,
    kind: LayerKind,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    token_mask: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """Computes pattern-weighted values ``[batch, pos, head, d_head]`` by jax's splash attention.

    Lengths and widths are filled up with zeros, which change nothing: keys that are filled in come after every query,
    and are thus out of sight. ``interpret`` runs the kernel's own program on any device, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads, width = q.shape[1:]
    filled = -(-length // LANES) * LANES
    block = next(size for size in BLOCKS if filled % size == 0)
    square, window = (filled, filled), _window(cfg, kind)
    mask = splash.CausalMask(square) if window is None else splash.LocalMask(square, window, 0)
    attend = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block),
        attn_logits_soft_cap=cfg.attn_scores_soft_cap if cfg.attn_scores_soft_cap > 0 else None,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    q = (q.astype(widened(q.dtype)) / cfg.attn_scale).astype(q.dtype)
    arrays = tuple(_filled(x, filled) for x in (q, k, v))
    attend_all: Any = jax.vmap(attend)
    if token_mask is None:
        z = attend_all(*arrays)
    else:
        text = jnp.pad(token_mask, ((0, 0), (0, filled - length))).astype(jnp.int32)
        z = attend_all(*arrays, splash.SegmentIds(q=jnp.ones_like(text), kv=text))
    z = jnp.moveaxis(z, 1, 2)[:, :length, :, :width]
    if token_mask is None:
        return z
    # The kernel averages all values for a query that sees no key; attention gives it zeros.
    return jnp.where(_sees_any(cfg, kind, token_mask)[:, :, None, None], z, 0)


def _window(cfg: HookedTransformerConfig, kind: LayerKind) -> tuple[int, int] | None:
    """Returns how many keys before and after a query a layer's window holds, or ``None`` if it has none."""
    if not kind.local:
        return None
    assert cfg.window_size is not None
    return cfg.window_size - 1, 0


def _filled(x: jax.Array, length: int) -> jax.Array:
    """Lays ``[batch, pos, head, width]`` out as ``[batch, head, pos, width]`` and fills the last two up with zeros."""
    x = jnp.moveaxis(x, 2, 1)
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, -x.shape[3] % LANES)))


def _sees_any(cfg: HookedTransformerConfig, kind: LayerKind, token_mask: jax.Array) -> jax.Array:
    """Returns which queries see some key, ``[batch, pos]``."""
    seen = jnp.cumsum(token_mask, axis=1, dtype=jnp.int32)
    if kind.local and cfg.window_size is not None and cfg.window_size < seen.shape[1]:
        seen = seen.at[:, cfg.window_size :].add(-seen[:, : -cfg.window_size])
    return seen > 0


FUNCTIONS: dict[str, Callable[..., jax.Array]] = {CUDNN: cudnn_attention, SPLASH: splash_attention}
"""What runs each kernel, from config, layer kind, queries, keys, values and ``token_mask``."""
