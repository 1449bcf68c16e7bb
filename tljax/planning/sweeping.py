"""The memory of a sweep: the base run, the run that values come from, and the largest page of patched runs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tljax.cache.memory import cache_bytes
from tljax.config import HookedTransformerConfig
from tljax.forward.forward import run_forward
from tljax.hooks.dictionary import HookDictionary
from tljax.hooks.points import ENTRY, EXIT, layer_of, stage_of
from tljax.memory import BATCH_SHARE
from tljax.modules.attention import KEYS_AND_VALUES
from tljax.modules.context import AttentionContext
from tljax.modules.packing import Packing
from tljax.patching.engine.packing import BatchLimits
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
    rows, tokens = _page_size(batch * pos * max(1, len(names)), pos, limits)
    for layer in _last_of_each_kind(cfg, range(cfg.n_layers)):
        own = tuple(f"blocks.{layer}.{part}" for part in (ENTRY, *KEYS_AND_VALUES))
        made = stage_temporaries(Stage(cfg, layer, layer + 1, own, batch, length), target)
        moments.append(Moment(f"in block {layer} of the base run", 2 * flowing, source + base, made))
    lowest = min((layer_of(name) or 0) + (stage_of(name)[1] == EXIT) for name in names)
    whole = range(lowest, cfg.n_layers - 1)  # the last block computes one token of each row
    for layer in _last_of_each_kind(cfg, whole or range(lowest, cfg.n_layers)):
        page, made = _page(cfg, layer, (batch, length), (tokens, rows), target)
        moments.append(Moment(f"in block {layer}, {tokens} tokens of patched runs", page, source + base, made))
    return moments


def _last_of_each_kind(cfg: HookedTransformerConfig, layers: range) -> list[int]:
    """Returns one layer of each kind among some, because layers of a kind take the same."""
    return list({cfg.layer_kinds[layer]: layer for layer in layers}.values())


def _page_size(n_rows: int, pos: int, limits: BatchLimits) -> tuple[int, int]:
    """Returns the rows and tokens of the largest page.

    A row that is patched at a position runs from there to the end, so rows have half a prompt on average, and pages mix
    long rows and short ones.
    """
    rows = min(limits.rows, n_rows, max(1, -(-2 * limits.tokens // (pos + 1))))
    return packed_size(rows), packed_size(max(pos, min(limits.tokens, rows * (pos + 1) // 2)))


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
