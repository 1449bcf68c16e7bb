"""The forward pass of a circuit: all edges give the clean run, none the corrupted one, for every kind of block."""

import jax.numpy as jnp
import numpy as np
import pytest
from kinds import KINDS, model_of

from tljax.circuits.graph import ResidualGraph
from tljax.circuits.masked import masked_stream
from tljax.circuits.writers import writer_outputs, writer_points
from tljax.modules.context import AttentionContext
from tljax.patching.metrics.reads import unembed
from tljax.text.inputs import prepare


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
    alone = masked_stream(model.cfg, model.params, graph, prepared.value, context, masks[1:], replacement)
    np.testing.assert_allclose(alone[0][mask], stream[1][mask], atol=2e-5)  # layers that nothing reads are not run
    head = {name: model.params[name] for name in ("ln_final", "unembed")}
    logits = unembed(model.cfg, head, stream)[:, *last]
    for got, wanted in zip(logits, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)
