"""The forward pass of a circuit: all edges give the clean run, none the corrupted one, for every kind of block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import HookedTransformer, HookedTransformerConfig
from tljax.circuits.graph import ResidualGraph
from tljax.circuits.masked import masked_stream
from tljax.circuits.writers import writer_outputs, writer_points
from tljax.modules.context import AttentionContext
from tljax.patching.metrics.reads import unembed
from tljax.text.inputs import prepare

ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 8, "gated_mlp": True, "normalization_type": "RMS"}
KINDS = {
    "gpt2": {"normalization_type": "LN"},
    "neox": {"normalization_type": "LN", "parallel_attn_mlp": True, "positional_embedding_type": "rotary"},
    "llama": {**ROTARY, "n_key_value_heads": 2},
    "gemma2": {**ROTARY, "n_key_value_heads": 2, "use_normalization_before_and_after": True},
    "mixtral": {**ROTARY, "num_experts": 4, "experts_per_token": 2, "residual_multiplier": 0.5},
}


def model_of(kind: str) -> HookedTransformer:
    fields = {"rotary_dim": 4 if kind == "neox" else None} | KINDS[kind]
    cfg = HookedTransformerConfig(
        d_model=32, n_heads=4, d_head=8, n_layers=2, n_ctx=8, d_vocab=50, act_fn="gelu", d_mlp=48, **fields
    )
    model, keys = HookedTransformer(cfg), iter(jax.random.split(jax.random.key(0), 200))
    spread = jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(next(keys), leaf.shape), model.params)
    return model.replace(params=spread)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_all_edges_are_the_clean_run_and_none_the_corrupted_one(kind: str, padding: str) -> None:
    model, rng = model_of(kind), np.random.default_rng(0)
    graph = ResidualGraph.of(model, experts=kind == "mixtral")
    clean = rng.integers(1, 50, (3, 7))
    corrupted = np.where(np.arange(7) == 3, rng.integers(1, 50, (3, 1)), clean)
    mask = np.ones((3, 7), bool)
    mask[0] = {"none": True, "left": np.arange(7) >= 2, "right": np.arange(7) < 5}[padding]
    last = (np.arange(3), (mask * np.arange(7)).max(axis=1))
    expected = [model(tokens, attention_mask=mask)[last] for tokens in (clean, corrupted)]
    assert jnp.abs(expected[0] - expected[1]).max() > 0.5
    _, cache = model.run_with_cache(corrupted, names_filter=list(writer_points(graph)), attention_mask=mask)
    replacement = writer_outputs(model.cfg, model.params, graph, cache.cache_dict)
    prepared = prepare(model.cfg, None, clean, attention_mask=mask)
    masks = np.stack([np.ones(graph.shape), np.zeros(graph.shape)])[:, None, None]
    context = AttentionContext.of(prepared)
    stream = masked_stream(model.cfg, model.params, graph, prepared.value, context, masks, replacement)
    head = {name: model.params[name] for name in ("ln_final", "unembed")}
    logits = unembed(model.cfg, head, stream)[:, *last]
    for got, wanted in zip(logits, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)
