"""Induction scores on the bundled model, and on patterns whose score is known."""

import numpy as np
import pytest

from tljax import HookedTransformer
from tljax.analysis.induction import heads_above, induction_scores, repeated_random_tokens
from tljax.errors import InputError


def test_bundled_model_has_induction_heads(tiny: HookedTransformer) -> None:
    scores = induction_scores(tiny, length=20, batch_size=8)
    assert scores.shape == (tiny.cfg.n_layers, tiny.cfg.n_heads)
    assert float(scores.max()) >= 0.5
    heads = heads_above(scores, threshold=0.5)
    assert heads
    assert heads[0][2] == pytest.approx(float(scores.max()))


def test_score_is_the_attention_to_what_followed(tiny: HookedTransformer) -> None:
    tokens = repeated_random_tokens(tiny, length=6, batch_size=2, seed=4)
    _, cache = tiny.run_with_cache(tokens)
    layer, head = 1, 2
    rows = [cache["pattern", layer][b, head, q, q - 5] for b in range(2) for q in range(7, 13)]
    scores = induction_scores(tiny, length=6, tokens=tokens)
    assert float(scores[layer, head]) == pytest.approx(float(np.mean(rows)), abs=1e-6)


def test_tokens_repeat_and_avoid_special_ones(tiny: HookedTransformer) -> None:
    tokens = repeated_random_tokens(tiny, length=9, batch_size=3)
    np.testing.assert_array_equal(tokens[:, 1:10], tokens[:, 10:])
    assert (tokens[:, 0] == tiny.tokenizer.bos_token_id).all()
    assert (tokens[:, 1:] != tiny.tokenizer.bos_token_id).all()


def test_too_long(tiny: HookedTransformer) -> None:
    with pytest.raises(InputError, match="need 129 positions; the model has n_ctx=128"):
        repeated_random_tokens(tiny, length=64, batch_size=1)
