"""Programs lower for CPUs, GPUs and TPUs alike: nothing in them needs a device at hand.

``jax.export`` refuses custom calls that it cannot promise to keep stable; none is needed, on any platform.
"""

import re
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import tljax
from tljax.forward.forward import run_forward
from tljax.generation.decoding import Rules, State, decode_tokens
from tljax.generation.key_values import KeyValueCache
from tljax.generation.sampling import read_sampling
from tljax.hooks.dictionary import HookDictionary
from tljax.modules.context import AttentionContext
from tljax.modules.packing import Packing
from tljax.modules.stack import init_params

PLATFORMS = ("cpu", "cuda", "tpu")
CFG = tljax.HookedTransformerConfig(
    d_model=16, n_layers=2, n_heads=4, n_key_value_heads=2, d_head=8, d_mlp=32, n_ctx=32, d_vocab=24, act_fn="silu",
    gated_mlp=True, positional_embedding_type="rotary", normalization_type="RMS", dtype="bfloat16",
)  # fmt: skip
STREAM = jax.ShapeDtypeStruct((2, 16, 16), jnp.bfloat16)


@pytest.fixture(scope="module")
def params() -> Any:
    return jax.eval_shape(lambda: init_params(CFG))


def lowered(function: Any, *args: Any) -> str:
    """The program for all platforms; how jax exports it, it must also compile here."""
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    exported = jax.export.export(jitted, platforms=PLATFORMS)(*args)
    assert exported.platforms == PLATFORMS
    text = exported.mlir_module()
    calls = set(re.findall(r"stablehlo\.custom_call @(\w+)", text))
    assert calls <= {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}, calls
    return text


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.mark.parametrize("names", [(), ("blocks.0.attn.hook_pattern", "blocks.0.attn.hook_z")])
def test_a_block(params: Any, names: tuple[str, ...]) -> None:
    """With the attention's matrix, which is named, and without."""

    def block(params: Any, value: Any) -> Any:
        return run_forward(CFG, params, value, AttentionContext(), hooks=HookDictionary(), names=names, start=0, stop=1)

    lowered(block, params, STREAM)


def test_the_embedding_and_the_unembedding(params: Any) -> None:
    def ends(params: Any, tokens: Any, value: Any) -> Any:
        hooks, context = HookDictionary(), AttentionContext()
        first = run_forward(CFG, params, tokens, context, hooks=hooks, stop=0)
        return first, run_forward(CFG, params, value, context, hooks=hooks, start=2)

    lowered(ends, params, integers(2, 16), STREAM)


def test_a_decoding_step(params: Any) -> None:
    def decode(params: Any, cache: Any, tokens: Any, seed: Any) -> Any:
        keys, nothing = jax.random.split(jax.random.key(seed), 2), jnp.zeros(2, jnp.int32)
        state = State(cache, tokens, nothing > 0, jnp.int32(1), nothing - 1, keys, None, None)
        rules = Rules(read_sampling(24, top_k=5), None, np.zeros(2, np.int32))
        return decode_tokens(CFG.computation, False, (params, {}), HookDictionary(), rules, state, np.int32(4)).tokens

    cache = jax.eval_shape(lambda: KeyValueCache.init_cache(CFG, 2, 32))
    assert "stablehlo.while" in lowered(decode, params, cache, integers(2, 32), integers())


def test_a_page_of_a_sweep(params: Any) -> None:
    lanes, rows, tokens, length = 2, 6, 32, 16

    def page(params: Any, value: Any, past: Any, source: Any, positions: Any, mask: Any, slot: Any) -> Any:
        packing = Packing(past, past, source, source, jnp.arange(length, dtype=jnp.int32), slot)
        context = AttentionContext(positions, mask, lengths=positions, packing=packing)
        return run_forward(CFG, params, value, context, hooks=HookDictionary(), start=1, stop=2)[0]

    past = jax.ShapeDtypeStruct((2, length, 2, 8), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((lanes * rows, length), jnp.bool_)
    value = jax.ShapeDtypeStruct((lanes, tokens, 16), jnp.bfloat16)
    source, positions, slot = integers(lanes, rows, length), integers(lanes, tokens), integers(lanes, tokens)
    lowered(page, params, value, past, source, positions, mask, slot)


@pytest.mark.parametrize("remat", [False, True])
def test_a_gradient(params: Any, remat: bool) -> None:
    def gradient(params: Any, tokens: Any) -> Any:
        model = tljax.HookedTransformer(CFG, params=params)
        found = model.run_with_grads(tokens, tljax.patching.LogitDiff(3, 4), [("resid_post", 0), "z1"], remat=remat)
        return found.value, dict(found.grads)

    lowered(gradient, params, integers(2, 16))
