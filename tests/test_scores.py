"""From query-key products to patterns: ALiBi's slopes and bias, softmax with sinks and fully masked rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import HookedTransformer, HookedTransformerConfig
from tljax.modules.scores import alibi_slopes, softmax


@pytest.mark.parametrize("n_heads", [1, 2, 3, 6, 8, 12, 20])
@pytest.mark.parametrize("bias_max", [8.0, 4.0])
def test_alibi_slopes_are_those_of_transformers(n_heads: int, bias_max: float) -> None:
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    expected = -build_mpt_alibi_tensor(n_heads, 2, bias_max)[:, 0, 0].numpy()
    np.testing.assert_allclose(alibi_slopes(n_heads, bias_max), expected, rtol=1e-6)


def test_scores_fall_by_the_slope_with_every_key_further_back() -> None:
    cfg = HookedTransformerConfig(
        d_model=8, n_heads=2, n_layers=1, n_ctx=6, d_vocab=5, positional_embedding_type="alibi", alibi_bias_max=4.0
    )
    model = HookedTransformer(cfg)
    _, cache = model.run_with_cache(jnp.zeros((1, 6), jnp.int32))
    last = np.asarray(cache["attn_scores", 0])[0, :, -1]  # equal tokens: only the distance differs
    np.testing.assert_allclose(np.diff(last, axis=-1), np.array([[2.0**-2] * 5, [2.0**-4] * 5]), atol=1e-6)


def test_a_sink_is_one_more_key_without_a_value() -> None:
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.standard_normal((2, 3, 4, 4)), jnp.float32)
    sinks = jnp.asarray([-1.0, 0.5, 30.0], jnp.float32)
    column = jnp.broadcast_to(sinks[None, :, None, None], (2, 3, 4, 1))
    expected = jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]
    np.testing.assert_allclose(softmax(scores, sinks), expected, atol=1e-6)


@pytest.mark.parametrize("sinks", [None, [0.3]])
def test_a_fully_masked_row_is_zero_and_has_a_zero_gradient(sinks: list[float] | None) -> None:
    scores = jnp.asarray([[[[0.0, -jnp.inf], [-jnp.inf, -jnp.inf]]]])
    extra = None if sinks is None else jnp.asarray(sinks)

    def first(values: jax.Array) -> jax.Array:
        return softmax(values, extra)[0, 0, :, 0].sum()

    assert not np.any(np.asarray(softmax(scores, extra))[0, 0, 1])
    assert np.isfinite(np.asarray(jax.grad(first)(scores))).all()


def test_sinks_take_weight_from_every_key() -> None:
    cfg = HookedTransformerConfig(
        d_model=8, n_heads=2, n_layers=1, n_ctx=6, d_vocab=5, use_attention_sinks=True, positional_embedding_type="none"
    )
    model = HookedTransformer(cfg)
    _, cache = model.run_with_cache(jnp.asarray([[1, 2, 3]]))
    assert (np.asarray(cache["pattern", 0]).sum(axis=-1) < 1).all()
