"""Generation on a CPU lays weights out for few rows; the numbers stay the same."""

import gc
from typing import Any

import jax
import numpy as np
import pytest

import tljax
from tljax.generation import decoding, few_rows
from tljax.generation.few_rows import in_pieces, size_of_copies, transposed


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "gated"])
def wide(request: pytest.FixtureRequest) -> tljax.HookedTransformer:
    """A model whose weights are large enough to be laid out anew."""
    cfg = tljax.HookedTransformerConfig(
        d_model=512, n_heads=8, d_head=64, n_layers=1, d_mlp=520, d_vocab=516, n_ctx=64, act_fn="silu", seed=3,
        gated_mlp=request.param,
    )  # fmt: skip
    return tljax.HookedTransformer(cfg)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_logits_are_those_of_the_plain_weights(wide: tljax.HookedTransformer, batch: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 516, (batch, 7))
    options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False, "output_logits": True}
    fast = wide.generate(tokens, 24, **options)
    plain = wide.generate(tokens, 24, use_past_kv_cache=False, **options)
    np.testing.assert_array_equal(fast.sequences, plain.sequences)
    np.testing.assert_allclose(np.stack(fast.logits), np.stack(plain.logits), atol=1e-5)


def test_layouts_hold_the_same_numbers(wide: tljax.HookedTransformer) -> None:
    block = wide.params["blocks"][0]
    pieces, turned = in_pieces(wide.params)["blocks"][0], transposed(wide.params)
    heads_last = np.asarray(block["attn"]["W_Q"]).reshape(512, 512)
    np.testing.assert_array_equal(np.asarray(pieces["attn"]["W_Q_few_rows"]).reshape(512, 512), heads_last)
    np.testing.assert_array_equal(turned["blocks"][0]["mlp"]["W_in_few_rows"], np.asarray(block["mlp"]["W_in"]).T)
    assert turned["unembed"]["W_U_few_rows"].shape == (516, 512)
    assert turned["unembed"]["W_U"] is wide.params["unembed"]["W_U"]
    added = [leaf.nbytes for leaf in jax.tree.leaves(turned)]
    assert size_of_copies(wide.params) == sum(added) - sum(leaf.nbytes for leaf in jax.tree.leaves(wide.params))


@pytest.mark.parametrize(("rows", "limit", "free"), [(3, 50, 2**40), (4, 19, 2**40), (4, 50, 2**20), (4, 50, None)])
def test_copies_are_made_only_where_they_pay(
    wide: tljax.HookedTransformer, monkeypatch: pytest.MonkeyPatch, rows: int, limit: int, free: int | None
) -> None:
    monkeypatch.setattr(decoding, "free_bytes", lambda device: free)
    decoder = decoding.Decoder(wide.cfg, wide.params, wide._hooks, None, limit)  # type: ignore[arg-type]
    assert decoder._lay_out(rows) is wide.params
    monkeypatch.setattr(decoding, "free_bytes", lambda device: 2**40)
    assert decoding.Decoder(wide.cfg, wide.params, wide._hooks, None, 50)._lay_out(4) is not wide.params  # type: ignore[arg-type]


def test_copies_live_as_long_as_their_weights() -> None:
    weight = jax.device_put(np.random.default_rng(0).standard_normal((512, 512), np.float32))
    gc.collect()  # what earlier tests left
    before = len(few_rows._kept)
    first, again = (transposed({"W_in": weight})["W_in_few_rows"] for _ in range(2))
    assert first is again
    assert len(few_rows._kept) == before + 1
    del weight
    gc.collect()
    assert len(few_rows._kept) == before
