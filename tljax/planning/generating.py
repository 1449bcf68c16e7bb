"""The memory of a generation: the prompts, the filling of the key-value cache, and the program that decodes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.config import HookedTransformerConfig
from tljax.config_checks import PER_LAYER
from tljax.generation.decoding import Rules, State, copies_pay, decode_tokens
from tljax.generation.few_rows import TransposedWeights
from tljax.generation.key_values import KeyValueCache
from tljax.generation.sampling import read_sampling
from tljax.hooks.dictionary import HookDictionary
from tljax.memory import is_large
from tljax.modules.attention import KEYS_AND_VALUES
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
from tljax.sizes import prompt_length, text_capacity


def key_value_bytes(cfg: HookedTransformerConfig, batch: int, capacity: int) -> int:
    """Returns the bytes of a key-value cache, its mask and length included."""
    return size_of(_key_values(cfg, batch, capacity))


def generation_moments(
    cfg: HookedTransformerConfig, batch: int, pos: int, n_new: int, target: Target, memory: int
) -> list[Moment]:
    """Returns the moments of a generation.

    Args:
        cfg: the config of what a device computes.
        batch, pos: the prompts on the device.
        n_new: most tokens of an answer.
        target: the device.
        memory: bytes that the device has.
    """
    cfg, capacity = cfg.computation, text_capacity(pos + n_new, cfg.n_ctx)
    framed = prompt_length(pos, capacity, whole_steps_to=8)
    recorded, whole = read_keys_bytes(cfg, batch, framed), key_value_bytes(cfg, batch, capacity)
    flowing, moments = size_of(stream(cfg, batch, framed)), []
    for kind in dict.fromkeys(cfg.layer_kinds):
        layer = len(cfg.layer_kinds) - 1 - cfg.layer_kinds[::-1].index(kind)
        own = tuple(f"blocks.{layer}.{name}" for name in KEYS_AND_VALUES)
        made = stage_temporaries(Stage(cfg, layer, layer + 1, own, batch, framed), target)
        share = recorded * (layer + 1) // cfg.n_layers
        moments.append(Moment(f"in block {layer}, of the prompts", 2 * flowing, share, made))
    moments.append(Moment("filling the key-value cache", flowing, recorded + whole, 0))
    logits = batch * cfg.d_vocab_out * cfg.jnp_dtype.itemsize
    moments.append(Moment("decoding", logits, whole, _decoding(cfg, batch, capacity, target)))
    copies = _copies(cfg, batch, n_new, target, memory)
    return [dataclasses.replace(moment, temporaries=moment.temporaries + copies) for moment in moments]


def _key_values(cfg: HookedTransformerConfig, batch: int, capacity: int) -> KeyValueCache:
    return jax.eval_shape(lambda: KeyValueCache.init_cache(cfg, batch, capacity))


def _copies(cfg: HookedTransformerConfig, batch: int, n_new: int, target: Target, memory: int) -> int:
    """Returns the bytes of the transposed weights that decoding several texts on a CPU makes; the model keeps them."""
    if not copies_pay(batch, n_new, target.platform == "cpu"):
        return 0
    size = size_of(jax.eval_shape(TransposedWeights().of, abstract_params(cfg)))
    return 0 if is_large(size, memory) else size


def _decoding(cfg: HookedTransformerConfig, batch: int, capacity: int, target: Target) -> int:
    """Returns the temporary bytes of the program that decodes.

    It holds all layers, and each adds the same as another of its kind; so models of one layer of a kind and of two are
    compiled in its place.
    """
    kinds = list(dict.fromkeys(cfg.layer_kinds))
    ends, total = 0, 0
    for kind in kinds:
        layer = cfg.layer_kinds.index(kind)
        one, two = (_decoding_of(_only(cfg, layer, n), batch, capacity, target) for n in (1, 2))
        ends = max(ends, 2 * one - two)
        total += (two - one) * cfg.layer_kinds.count(kind)
    return max(0, ends) + max(0, total)


def _only(cfg: HookedTransformerConfig, layer: int, count: int) -> HookedTransformerConfig:
    """Returns the config of a model of ``count`` layers that are all like one."""
    own = {
        name: entries[layer : layer + 1] * count for name in PER_LAYER if (entries := getattr(cfg, name)) is not None
    }
    return cfg.replace(n_layers=count, **own).computation


@functools.lru_cache(maxsize=64)
def _decoding_of(cfg: HookedTransformerConfig, batch: int, capacity: int, target: Target) -> int:
    cfg = target.widened(cfg)

    def shape(*sizes: int, dtype: type = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    state = State(
        _key_values(cfg, batch, capacity), shape(batch, capacity), shape(batch, dtype=jnp.bool_), shape(),
        shape(batch), keys, None, None,
    )  # fmt: skip
    rules = Rules(read_sampling(cfg.d_vocab_out, do_sample=False), None, shape(batch))
    pieces = batch == 1 and target.platform == "cpu"
    weights = abstract_params(cfg), {}
    return temporaries(
        decode_tokens, cfg, pieces, weights, HookDictionary(), rules, state, np.int32(1), device=target.device
    )
