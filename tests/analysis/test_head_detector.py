"""Detectors find the bundled model's heads, and refuse what they cannot read."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import build

from tljax import ActivationCache, HookedTransformer
from tljax.analysis.head_detector import (
    compute_head_attention_similarity_score,
    detect_head,
    get_duplicate_token_head_detection_pattern,
    get_induction_head_detection_pattern,
    get_previous_token_head_detection_pattern,
    get_supported_heads,
)
from tljax.analysis.head_scores import duplicate_token_scores, head_scores, previous_token_scores
from tljax.analysis.induction import heads_above, induction_scores, repeated_random_tokens
from tljax.errors import InputError, TokenizerError

PREVIOUS, INDUCTION = {(0, 0), (0, 3)}, {(1, 0), (1, 1), (1, 2), (1, 3)}
TEXT = "The red car is near the park. The red car is near the park."


def heads(scores: jax.Array, threshold: float) -> set[tuple[int, int]]:
    return {(layer, head) for layer, head, _ in heads_above(scores, threshold)}


def test_all_heads_of_the_bundled_model_at_once(tiny: HookedTransformer) -> None:
    scores = head_scores(tiny)
    assert heads(scores.previous_token, 0.5) == PREVIOUS
    assert heads(scores.induction, 0.5) == INDUCTION
    assert heads(scores.duplicate_token, 0.3) == set()
    np.testing.assert_allclose(scores.induction, induction_scores(tiny), atol=1e-6)
    np.testing.assert_allclose(scores.previous_token, previous_token_scores(tiny), atol=1e-6)
    np.testing.assert_allclose(scores.duplicate_token, duplicate_token_scores(tiny), atol=1e-6)


def test_composition_confirms_them(tiny: HookedTransformer) -> None:
    scores = np.asarray(tiny.all_composition_scores("K"))
    strongest = np.argsort(-scores.ravel())[: len(PREVIOUS) * len(INDUCTION)]
    pairs = {tuple(map(int, np.unravel_index(index, scores.shape))) for index in strongest}
    assert pairs == {(*first, *later) for first in PREVIOUS for later in INDUCTION}


def test_scores_mean_what_they_say(tiny: HookedTransformer) -> None:
    tokens = repeated_random_tokens(tiny, length=5, batch_size=2, seed=3)
    _, cache = tiny.run_with_cache(tokens)
    scores = head_scores(tiny, length=5, tokens=tokens)
    pattern = np.asarray(cache["pattern", 2][:, 1])
    previous = np.mean([pattern[b, q, q - 1] for b in range(2) for q in range(2, 11)])
    duplicate = np.mean([pattern[b, q, q - 5] for b in range(2) for q in range(6, 11)])
    assert float(scores.previous_token[2, 1]) == pytest.approx(previous, abs=1e-6)
    assert float(scores.duplicate_token[2, 1]) == pytest.approx(duplicate, abs=1e-6)


def test_one_reduction_is_compiled(tiny: HookedTransformer, compilations: Any) -> None:
    head_scores(tiny, length=7, batch_size=3, seed=0)
    before = compilations.count
    head_scores(tiny, length=7, batch_size=3, seed=5)
    assert compilations.count == before


def test_detects_the_bundled_models_heads(tiny: HookedTransformer) -> None:
    assert heads(detect_head(tiny, TEXT, "previous_token_head"), 0.5) == PREVIOUS
    assert heads(detect_head(tiny, TEXT, "previous_token_head", error_measure="abs"), 0.5) == PREVIOUS
    tokens = repeated_random_tokens(tiny, length=20, batch_size=4)
    found = detect_head(tiny, tokens, "induction_head", exclude_bos=True, exclude_current_token=True)
    assert heads(found, 0.3) == INDUCTION
    np.testing.assert_allclose(
        found, np.mean([detect_head(tiny, row, "induction_head", exclude_bos=True, exclude_current_token=True)
                        for row in tokens], axis=0), atol=1e-6,
    )  # fmt: skip


def test_prompts_of_several_lengths_are_averaged(tiny: HookedTransformer) -> None:
    texts = [TEXT, "John gave Mary a book.", TEXT]
    alone = [detect_head(tiny, text, "duplicate_token_head") for text in texts]
    np.testing.assert_allclose(detect_head(tiny, texts, "duplicate_token_head"), np.mean(alone, axis=0), atol=1e-6)


def test_a_cache_serves_with_and_without_its_batch_axis(tiny: HookedTransformer) -> None:
    expected = detect_head(tiny, TEXT, "induction_head")
    _, cache = tiny.run_with_cache(TEXT)
    before = cache["pattern", 0]
    for own in (cache, cache.remove_batch_dim()):
        np.testing.assert_allclose(detect_head(tiny, TEXT, "induction_head", cache=own), expected, atol=1e-6)
        detect_head(tiny, TEXT, "induction_head", cache=own, exclude_bos=True)
    np.testing.assert_array_equal(cache["pattern", 0], before)


def test_heads_that_were_not_asked_for(tiny: HookedTransformer) -> None:
    every = np.asarray(detect_head(tiny, TEXT, "previous_token_head"))
    for chosen in ([(0, 3), (2, 1)], {0: [3], 2: [1]}):
        some = np.asarray(detect_head(tiny, TEXT, "previous_token_head", heads=chosen))
        assert (some == -1).sum() == some.size - 2
        assert some[0, 3] == every[0, 3]


def test_patterns() -> None:
    tokens = np.array([[7, 5, 6, 5, 5]])
    np.testing.assert_array_equal(get_previous_token_head_detection_pattern(tokens), np.eye(5, k=-1))
    duplicate, induction = np.zeros((5, 5)), np.zeros((5, 5))
    for query, keys in {3: (1,), 4: (1, 3)}.items():
        for key in keys:
            duplicate[query, key] = 1
            induction[query, key + 1] = 1
    np.testing.assert_array_equal(get_duplicate_token_head_detection_pattern(tokens[0]), duplicate)
    np.testing.assert_array_equal(get_induction_head_detection_pattern(jnp.asarray(tokens)), induction)


def test_names_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    get_supported_heads()
    assert "'previous_token_head', 'duplicate_token_head', 'induction_head'" in capsys.readouterr().out


def test_similarity_of_one_pattern() -> None:
    attention = np.array([[1.0, 0, 0], [0.25, 0.75, 0], [0.5, 0.25, 0.25]])
    options: Any = {"exclude_bos": False, "exclude_current_token": False}
    perfect = compute_head_attention_similarity_score(attention, attention, error_measure="abs", **options)
    assert float(perfect) == 1
    wanted = np.eye(3, k=-1)
    share = compute_head_attention_similarity_score(attention, wanted, error_measure="mul", **options)
    assert float(share) == pytest.approx(0.5 / 3)
    options["exclude_bos"] = True
    share = compute_head_attention_similarity_score(attention, wanted, error_measure="mul", **options)
    assert float(share) == pytest.approx(0.25 / 1.25)
    nothing = np.zeros((3, 3))
    nothing[:, 0] = 1
    assert float(compute_head_attention_similarity_score(nothing, wanted, error_measure="mul", **options)) == 0


def shares(size: int) -> np.ndarray:
    return np.tril(np.ones((size, size)))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((TEXT, "previous_tokens_head"), {}, "Did you mean 'previous_token_head'"),
        ((TEXT, "x"), {}, "'x' is not a detection pattern. The names are 'previous_token_head'"),
        ((TEXT, shares(4)), {}, r"\[pos, pos\] = \[17, 17\].*BOS among them\); got shape \(4, 4\)"),
        ((TEXT, np.ones((17, 3))), {}, r"got shape \(17, 3\)"),
        ((TEXT, np.ones((17, 17))), {}, r"must be lower triangular.*entry \[0, 1\] is 1. Use np.tril"),
        ((TEXT, "induction_head"), {"error_measure": "mull"}, "'mul' or 'abs'; got 'mull'. Did you mean 'mul'"),
        ((TEXT, "induction_head"), {"heads": [(0, 4)]}, r"no head \(0, 4\): layers are 0 to 3, heads 0 to 3"),
        (([], "induction_head"), {}, "needs a prompt; got none"),
        ((np.array([5]), "induction_head"), {}, "has 1 token: attention patterns need two or more"),
    ],
)  # fmt: skip
def test_refusals(tiny: HookedTransformer, arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        detect_head(tiny, *arguments, **options)


def test_caches_that_do_not_fit(tiny: HookedTransformer) -> None:
    cache: ActivationCache = tiny.run_with_cache("John gave Mary a book.")[1]
    with pytest.raises(InputError, match="One cache holds one prompt, and these are 2"):
        detect_head(tiny, [TEXT, TEXT], "induction_head", cache=cache)
    with pytest.raises(InputError, match="the prompt has 17 tokens: pass the cache of a run of this one prompt"):
        detect_head(tiny, TEXT, "induction_head", cache=cache)


def test_text_without_a_tokenizer() -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\. Attach one"):
        detect_head(build("gpt2"), TEXT, "induction_head")
    assert detect_head(build("gpt2"), [3, 4, 3, 4], "induction_head").shape == (2, 4)


def test_tokens_that_do_not_repeat(tiny: HookedTransformer) -> None:
    with pytest.raises(InputError, match="do not repeat the 4 before them"):
        head_scores(tiny, length=4, tokens=np.arange(9)[None])
    with pytest.raises(InputError, match=r"Two copies of length=6.*\(1, 9\)"):
        induction_scores(tiny, length=6, tokens=np.arange(9)[None])
    with pytest.raises(InputError, match="three tokens or more"):
        previous_token_scores(tiny, tokens=np.array([[1, 2]]))


def test_square_patterns_only() -> None:
    with pytest.raises(InputError, match=r"square, \[..., pos, pos\]; got shape \(3, 4\)"):
        compute_head_attention_similarity_score(
            np.ones((3, 4)), np.eye(3), exclude_bos=False, exclude_current_token=False, error_measure="mul"
        )
