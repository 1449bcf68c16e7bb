"""Probes on features, and scores against known features, on data whose answer is known."""

import numpy as np
import pytest
from made_dictionaries import standard

from tljax import HookedTransformer, Replace, tasks
from tljax.dictionaries import Dictionary, DictionaryConfig
from tljax.dictionaries.evaluation import (
    PooledFeatures,
    ground_truth_scores,
    pool_features,
    ravel_scores,
    sparse_probing,
    spurious_correlation_removal,
    targeted_probe_perturbation,
)
from tljax.errors import InputError


def planted(labels: np.ndarray, n_features: int = 12, seed: int = 0) -> PooledFeatures:
    """Features along orthogonal directions; feature ``3 + column`` carries that column of the labels, with noise."""
    g = np.random.default_rng(seed)
    directions = np.linalg.qr(g.normal(size=(16, n_features)))[0].T
    features = np.maximum(g.normal(size=(len(labels), n_features)), 0)
    for column in range(labels.shape[1]):
        features[:, 3 + column] = 3 * labels[:, column] + 0.1 * g.random(len(labels))
    noise = 0.05 * g.normal(size=(len(labels), 16))
    return PooledFeatures(
        activations=features @ directions + noise, features=features, written=features, directions=directions
    )


def test_one_feature_is_enough_where_one_carries_the_label() -> None:
    label = np.random.default_rng(1).integers(0, 2, 120)
    got = sparse_probing(planted(label[:, None]), label, k=(1, 2))
    assert (got.classes, got.k) == ((1,), (1, 2))
    assert got.features[0, 0] == 3
    assert got.accuracy.tolist() == [[1, 1]]
    assert got.neurons[0, 0] < got.full[0] == 1
    shuffled = sparse_probing(planted(label[:, None]), np.random.default_rng(2).permutation(label), k=(1,))
    assert shuffled.accuracy[0, 0] < 0.75


def test_taking_out_a_labels_feature_hits_its_probe_alone() -> None:
    label = np.random.default_rng(1).integers(0, 3, 240)
    pooled = planted(np.eye(3)[label])
    got = targeted_probe_perturbation(pooled, [f"class {one}" for one in label], k=(1, 12))
    assert got.classes == ("class 0", "class 1", "class 2")
    assert got.before.min() > 0.95
    assert got.intended[0] > 0.4
    assert got.unintended[0] < 0.1
    assert got.score[0] > 0.3 > got.score[1]  # taking out everything hits all
    np.testing.assert_allclose(got.score, got.intended - got.unintended)
    nothing = PooledFeatures(**{**vars(pooled), "written": 0 * pooled.written})
    assert targeted_probe_perturbation(nothing, label, k=(1,)).score.tolist() == [0]


def test_a_spurious_feature_is_removed() -> None:
    g = np.random.default_rng(3)
    wanted, other = g.integers(0, 2, 400), g.integers(0, 2, 400)
    pooled = planted(np.stack([0.5 * wanted, other], 1))
    got = spurious_correlation_removal(pooled, wanted, other, k=(1,), ablation="mean")
    assert got.biased < 0.9 * got.oracle
    assert got.after[0] > got.biased
    assert got.score[0] == pytest.approx((got.after[0] - got.biased) / (got.oracle - got.biased))
    assert got.score[0] > 0.5


def test_pooling_is_the_mean_or_one_token(model: HookedTransformer) -> None:
    d = model.cfg.d_model
    sae = standard(np.eye(d), np.eye(d), np.ones(d), reads="blocks.1.hook_resid_pre")
    rows = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
    mean = pool_features(model, sae, rows, exclude_tokens=[1], batch_size=2, progress=False)
    last = pool_features(model, sae, rows, pos=-1, batch_size=2, progress=False)
    for row, tokens in enumerate(rows):
        _, cache = model.run_with_cache(np.asarray([tokens]), names_filter="blocks.1.hook_resid_pre")
        x = np.asarray(cache["blocks.1.hook_resid_pre"][0])
        kept = x[np.asarray(tokens) != 1]
        np.testing.assert_allclose(mean.activations[row], kept.mean(0), atol=1e-5)
        np.testing.assert_allclose(mean.features[row], np.maximum(kept + 1, 0).mean(0), atol=1e-5)
        np.testing.assert_allclose(last.activations[row], x[-1], atol=1e-5)
    np.testing.assert_allclose(mean.without([2])[:, 2], mean.activations[:, 2] - mean.features[:, 2], atol=1e-6)
    with pytest.raises(InputError, match="tokens in prompt 1"):
        pool_features(model, sae, rows, pos=3, progress=False)


def test_known_features_are_found() -> None:
    g = np.random.default_rng(0)
    known = np.linalg.qr(g.normal(size=(8, 4)))[0].T
    codes = np.maximum(g.normal(size=(500, 4)), 0)
    learned = np.concatenate([2 * known[[2, 0, 3]], np.linalg.qr(g.normal(size=(8, 8)))[0][:1] * 0.1])
    sae = standard((known[[2, 0, 3]].T @ np.eye(3, 4)) / 2, learned, np.full(4, -1e-4), reads="x")
    got = ground_truth_scores(sae, known, activations=(codes @ known).astype(np.float32), codes=codes)
    assert got.matches[[0, 2, 3]].tolist() == [1, 0, 2]
    np.testing.assert_allclose(got.max_cosines[[0, 2, 3]], 1)
    assert got.recovered == 0.75
    assert got.mcc == pytest.approx((3 + float(known[1] @ learned[3]) * 10) / 4)
    assert got.unmatched.tolist() == [3]
    assert got.f1 is not None
    assert got.correlations is not None
    np.testing.assert_allclose(got.f1[[0, 2, 3]], 1, atol=0.02)
    np.testing.assert_allclose(got.correlations[[0, 2, 3]], 1, atol=1e-4)
    few = ground_truth_scores(standard(np.zeros((8, 2)), known[:2], reads="x"), known)
    assert (few.mcc, few.matches.tolist()) == (pytest.approx(0.5), [0, 1, -1, -1])


def test_signed_features_are_found_with_either_sign() -> None:
    g = np.random.default_rng(0)
    known = np.linalg.qr(g.normal(size=(8, 4)))[0].T
    codes = g.normal(size=(500, 4)) * (g.random((500, 4)) < 0.25)
    rows = np.array([[1.0], [-1.0], [-1.0], [1.0]]) * known
    cfg = DictionaryConfig(architecture="abstopk", d_in=8, d_sae=4, k=4, apply_b_dec_to_input=False)
    params = {"W_enc": rows.T, "b_enc": np.zeros(4), "W_dec": rows, "b_dec": np.zeros(8)}
    signed = Dictionary({name: value.astype(np.float32) for name, value in params.items()}, cfg)
    got = ground_truth_scores(signed, known, activations=(codes @ known).astype(np.float32), codes=codes)
    assert (got.recovered, got.unmatched.tolist()) == (1, [])
    np.testing.assert_allclose(got.correlations, 1, atol=1e-4)
    unsigned = ground_truth_scores(signed.replace(cfg=cfg.replace(architecture="topk")), known)
    assert unsigned.recovered == 0.5


def test_features_exchanged_between_entities(tiny: HookedTransformer) -> None:
    """All features of an identity exchange the whole stream at the entity; none exchange nothing."""
    pairs = [("John", "Mary", "Tom"), ("Dan", "Tom", "Mary"), ("Mary", "James", "Dan")]
    texts = [f"When {a} and {b} went to the store, {a} gave a drink to" for a, b, _ in pairs]
    others = [f"When {a} and {c} went to the store, {a} gave a drink to" for a, _, c in pairs]
    task = tasks.from_prompts(
        tiny, texts, others, [f" {b}" for _, b, _ in pairs], [f" {c}" for _, _, c in pairs],
        parts={"entity": [b for _, b, _ in pairs]},
        corrupted_parts={"entity": [c for _, _, c in pairs]},
    )  # fmt: skip
    point, asks = "blocks.0.hook_resid_post", [True, True, False]
    both = np.concatenate([np.eye(64), -np.eye(64)])
    sae = standard(both.T, both, reads=point)
    none = ravel_scores(tiny, sae, task, [], asks, batch_size=2)
    assert (none.unpatched, none.cause, none.isolate) == (1, 0, 1)
    got = ravel_scores(tiny, sae, task, range(128), asks, batch_size=2)
    for index in range(3):
        _, source = tiny.run_with_cache(task.corrupted.row(index)[None], names_filter=point)
        new = source[point][0, task.pos("entity", corrupted=True)[index]]
        at = int(task.pos("entity")[index])
        patched = [(point, Replace(new, pos=at))]
        logits = tiny.run_with_hooks(task.clean.row(index)[None], fwd_hooks=patched)
        right, wrong = np.asarray(logits)[0, -1, [task.answer[index], task.wrong[index]]].ravel()
        assert got.moved[index] == (wrong > right)
    assert got.moved.any()
    assert (got.cause, got.isolate) == (got.moved[:2].mean(), 1 - got.moved[2])
    with pytest.raises(InputError, match="prompts of both kinds"):
        ravel_scores(tiny, sae, task, [0], [True] * 3)
