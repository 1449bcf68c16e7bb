"""The memory of a sweep: the base run, the run that values come from, and the largest page of patched runs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tljax.cache.memory import cache_bytes
from tljax.config import HookedTransformerConfig
from tljax.forward.forward import run_forward
from tljax.hooks.dictionary import HookDictionary
from tljax.hooks.points import ENTRY
from tljax.memory import BATCH_SHARE
from tljax.modules.attention import KEYS_AND_VALUES
from tljax.modules.context import AttentionContext
from tljax.modules.packing import Packing
from tljax.patching.engine.run import limits_within
from tljax.planning.programs import (
    Stage,
    Target,
    abstract_params,
    read_keys_bytes,
    size_of,
    stage_temporaries,
    stream,
    temporaries,
)
from tljax.planning.result import Moment
from tljax.sizes import packed_size, prompt_length


def sweep_moments(
    cfg: HookedTransformerConfig, batch: int, pos: int, names: tuple[str, ...], memory: int, target: Target
) -> list[Moment]:
    """Returns the moments of a sweep over every position of some points.

    Args:
        cfg: the config of what a device computes.
        batch, pos: the prompts on the device.
        names: full names of the points that are patched.
        memory: bytes that the device has, by which a sweep chooses how much it runs at once.
        target: the device.
    """
    cfg, length = cfg.computation, prompt_length(pos, cfg.n_ctx)
    entries = (f"blocks.{layer}.{ENTRY}" for layer in range(cfg.n_layers))
    base = cache_bytes(cfg, tuple(dict.fromkeys((*names, *entries))), batch, length)
    base += read_keys_bytes(cfg, batch, length)
    source = cache_bytes(cfg, names, batch, length)
    flowing, moments = size_of(stream(cfg, batch, length)), []
    limits = limits_within(cfg, length, int(memory * BATCH_SHARE), target.platform == "cpu")
    n_rows = batch * pos * max(1, len(names))
    rows = packed_size(min(limits.rows, n_rows))
    tokens = packed_size(min(limits.tokens, n_rows * (pos + 1) // 2))
    for kind in dict.fromkeys(cfg.layer_kinds):
        layer = len(cfg.layer_kinds) - 1 - cfg.layer_kinds[::-1].index(kind)
        own = tuple(f"blocks.{layer}.{part}" for part in (ENTRY, *KEYS_AND_VALUES))
        made = stage_temporaries(Stage(cfg, layer, layer + 1, own, batch, length), target)
        moments.append(Moment(f"in block {layer} of the base run", 2 * flowing, source + base, made))
        page, page_made = _page(cfg, layer, (batch, length), (tokens, rows), target)
        moments.append(Moment(f"in block {layer}, {tokens} tokens of patched runs", page, source + base, page_made))
    return moments


@functools.lru_cache(maxsize=64)
def _page(
    cfg: HookedTransformerConfig, layer: int, prompts: tuple[int, int], packed: tuple[int, int], target: Target
) -> tuple[int, int]:
    """Returns the bytes of a page's streams and the temporary bytes of a block on it."""
    (batch, length), (tokens, rows) = prompts, packed
    flowing, cfg = size_of(stream(cfg, 1, tokens)), target.widened(cfg)
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    past_k, past_v = (
        jax.ShapeDtypeStruct((batch, length, cfg.kv_heads, width), cfg.jnp_dtype)
        for width in (cfg.d_head, cfg.value_width)
    )
    mask = jax.ShapeDtypeStruct((rows, length), jnp.bool_)
    laid_out = integers((1, rows, length)), integers((1, rows, length)), integers((length,)), integers((1, tokens))

    def block(params: Any, value: Any, past: Any, laid_out: Any, positions: Any, mask: Any) -> Any:
        packing = Packing(*past, *laid_out)
        context = AttentionContext(positions, mask, lengths=positions, packing=packing)
        hooks = HookDictionary()
        return run_forward(cfg, params, value, context, hooks=hooks, start=layer, stop=layer + 1)[0]

    shapes = stream(cfg, 1, tokens), (past_k, past_v), laid_out, integers((1, tokens)), mask
    made = temporaries(block, abstract_params(cfg), *shapes, device=target.device)
    return 3 * flowing, made
