"""Attention by blocks equals attention by the whole matrix: every variant, padding, gradients, prefill, switching."""

import jax
import numpy as np
import pytest

from tljax import HookedTransformer, HookedTransformerConfig, Zero
from tljax.config import LayerKind
from tljax.modules import blockwise
from tljax.modules.blockwise import _bands, _seen

SIZES = {
    "d_model": 16, "n_layers": 2, "n_heads": 4, "d_head": 4, "d_mlp": 8, "n_ctx": 600, "d_vocab": 11, "act_fn": "gelu",
    "seed": 1, "initializer_range": 0.3,
}  # fmt: skip
LOCAL = {"use_local_attn": True, "window_size": 5, "attn_types": ["local"]}
VARIANTS = {
    "soft cap, sinks": {"attn_scores_soft_cap": 0.5, "use_attention_sinks": True},
    "alibi": {"positional_embedding_type": "alibi", "n_key_value_heads": 2},
    "alibi, rounded": {"positional_embedding_type": "alibi", "alibi_rounded": True},
    "window": LOCAL,
    "grouped": {"n_key_value_heads": 2, "positional_embedding_type": "rotary"},
    "both directions": {"attention_dir": "bidirectional"} | LOCAL,
    "shortformer": {"positional_embedding_type": "shortformer"},
    "divisor": {"scale_attn_by_inverse_layer_idx": True, "n_layers": 2},
    "latent": {
        "kv_lora_rank": 8, "q_lora_rank": 8, "positional_embedding_type": "rotary", "rotary_dim": 2, "d_value": 3,
    },
}  # fmt: skip
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 11, (3, 21)).astype(np.int32)
MASK = np.ones((3, 21), bool)
MASK[0, :6] = MASK[1, -9:] = False


def both_ways(**changes: object) -> tuple[HookedTransformer, HookedTransformer]:
    """A model with random sinks and biases, whose attention is materialised, and the same by blocks of few queries."""
    model = HookedTransformer(HookedTransformerConfig(**(SIZES | changes)))
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), model.params)
    model = model.replace(params=params, cfg=model.cfg.replace(attention_path="materialised"))
    return model, model.replace(cfg=model.cfg.replace(attention_path="blockwise", attention_block=9))


def logits_loss_and_gradients(model: HookedTransformer) -> list:
    """Of one batch: a prompt padded left, one padded right, one whole; several blocks and a rest."""

    def loss(model: HookedTransformer) -> object:
        logits, loss = model(TOKENS, return_type="both", attention_mask=MASK)
        return loss, logits

    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, has_aux=True))(model))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_loss_and_gradients(changes: dict) -> None:
    whole, blocks = map(logits_loss_and_gradients, both_ways(**{"n_layers": 1, **changes}))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=0), whole, blocks)


def test_all_heads_at_once(monkeypatch) -> None:
    """The form of GPUs and TPUs, here on whatever runs the tests: numbers and gradients; its blocks are smaller."""
    changes = {"n_key_value_heads": 2, "positional_embedding_type": "alibi", "n_ctx": 601, "n_layers": 1}
    models = both_ways(**changes, **VARIANTS["soft cap, sinks"], **LOCAL)
    whole, asked = logits_loss_and_gradients(models[0]), []
    monkeypatch.setattr(blockwise, "in_turns", lambda: bool(asked.append(1)))
    monkeypatch.setattr(blockwise, "WORKING_BYTES", 4 * 21 * 6 * 8)  # 21 keys, 6 pairs of prompt and key head
    blocks = logits_loss_and_gradients(models[1])
    assert asked
    assert blockwise._block_size(models[1].cfg, 2, 21, 6, False) == 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=0), whole, blocks)


def test_prefill_of_a_key_value_cache() -> None:
    models = both_ways(n_key_value_heads=2, positional_embedding_type="rotary")
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "attention_mask": MASK[::2]}
    whole, blocks = (model.generate(TOKENS[::2], stop_at_eos=False, **options) for model in models)
    np.testing.assert_array_equal(whole.sequences, blocks.sequences)
    np.testing.assert_allclose(whole.logits, blocks.logits, atol=1e-5, rtol=0)


def test_naming_the_matrix_switches_and_changes_nothing_else() -> None:
    whole, blocks = both_ways()
    logits, cache = blocks.run_with_cache(TOKENS, names_filter=[("pattern", 1), ("z", 0), ("z", 1)])
    np.testing.assert_allclose(logits, whole(TOKENS), atol=1e-5, rtol=0)
    assert cache["pattern", 1].shape == (3, 4, 21, 21)
    for name in ("pattern", "attn_scores"):
        hooks = [((name, 0), Zero(pos=3) if name == "pattern" else Zero(head=2))]
        hooked = [model.run_with_hooks(TOKENS, fwd_hooks=hooks) for model in (whole, blocks)]
        np.testing.assert_allclose(hooked[0], hooked[1], atol=1e-5, rtol=0)
        assert np.abs(hooked[0] - whole(TOKENS)).max() > 1e-3
    assert [path.name for path in blocks.attention_path(21, ("pattern", 1))] == ["blockwise", "materialised"]
    assert [path.name for path in blocks.with_hooks(hooks).attention_path(21)] == ["materialised", "blockwise"]


def test_long_texts_run_by_blocks_and_share_programs(compilations) -> None:
    model, _ = both_ways()
    model = model.replace(cfg=model.cfg.replace(attention_path="auto"))
    assert [path.name for path in model.attention_path(256)] == ["materialised"] * 2
    assert [path.name for path in model.attention_path(257)] == ["blockwise"] * 2
    tokens = RNG.integers(0, 11, (1, 600)).astype(np.int32)
    logits = model(tokens)
    text = str(jax.make_jaxpr(lambda model: model(tokens))(model))
    assert ",600,600]" not in text
    assert ",600,600]" in str(jax.make_jaxpr(lambda m: m.run_with_cache(tokens, names_filter=("pattern", 0)))(model))
    whole = model.replace(cfg=model.cfg.replace(attention_path="materialised"))(tokens)
    np.testing.assert_allclose(logits, whole, atol=1e-5, rtol=0)
    for layer, pos, head in ((0, 1, 2), (1, 300, 0)):
        hooks = [(("z", layer), Zero(pos=np.int32(pos), head=np.int32(head)))]
        before = compilations.count
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert compilations.count == before


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("local", [True, False])
def test_bands_hold_every_query_and_all_that_it_sees(direction: str, local: bool, in_order: bool) -> None:
    cfg = HookedTransformerConfig(**(SIZES | LOCAL | {"attention_dir": direction, "n_layers": 1}))
    for queries, block in ((21, 4), (40, 4), (100, 3), (3, 8)):
        bands, held = list(_bands(queries, block, in_order)), []
        assert len(bands) <= 9
        for band in bands:
            held += range(band.start, band.stop)
            seen = _seen(cfg, LayerKind(local=local), band, queries, in_order)
            for query in range(band.start, band.stop):
                last = query if direction == "causal" else queries - 1
                first = max(0, query - 4) if local else 0
                last = min(last, query + 4) if local else last
                assert seen.start <= first
                assert last < seen.stop
        assert held == list(range(queries))
