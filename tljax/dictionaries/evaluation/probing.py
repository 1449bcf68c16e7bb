"""What probes say of features: sparse probing, targeted probe perturbation, removal of spurious correlations.

The parts of SAEBench (Karvonen et al. 2025) that need labelled prompts and no download.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from tljax.analysis.probes import LinearProbe, logistic_probe, sparse_probe
from tljax.checks import typed, whole
from tljax.dictionaries.evaluation.pooling import Ablation, PooledFeatures
from tljax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SparseProbing:
    """How well a few features tell labels apart, on prompts held out. Accuracies are means over the two answers.

    Attributes:
        classes: the labels, each against all others (of two, the second alone).
        k: numbers of features.
        accuracy: ``[class, k]``, of a logistic probe on the ``k`` best features.
        features: for each class, the largest ``k`` features, best first, ``[class, max(k)]``.
        neurons: ``[class, k]``, the same with coordinates of the activations in place of features.
        full: ``[class]``, of a probe on whole activations.
    """

    classes: tuple[Any, ...]
    k: tuple[int, ...]
    accuracy: np.ndarray
    features: np.ndarray
    neurons: np.ndarray
    full: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TargetedPerturbation:
    """What taking out a label's features does to probes of that label and of the others.

    Attributes:
        classes: the labels.
        k: numbers of features taken out.
        score: ``[k]``, ``intended - unintended``; 1 would be the best.
        intended: ``[k]``, mean fall of a label's own probe when its features are taken out.
        unintended: ``[k]``, mean fall of the other labels' probes.
        before: ``[class]``, accuracy of each label's probe.
        after: ``[k, class taken out, class of the probe]``.
    """

    classes: tuple[Any, ...]
    k: tuple[int, ...]
    score: np.ndarray
    intended: np.ndarray
    unintended: np.ndarray
    before: np.ndarray
    after: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SpuriousRemoval:
    """Whether taking out features of a spurious label repairs a probe that learned it.

    Attributes:
        k: numbers of features taken out.
        score: ``[k]``, ``(after - biased) / (oracle - biased)``; 1 where the probe is as good as one trained without
            the correlation, NaN where there was nothing to repair.
        biased: accuracy, on balanced prompts, of the probe trained on prompts where the two labels agree.
        oracle: that of a probe trained on balanced prompts.
        after: ``[k]``, that of the biased probe with the features taken out.
    """

    k: tuple[int, ...]
    score: np.ndarray
    biased: float
    oracle: float
    after: np.ndarray


@typed
def sparse_probing(
    pooled: PooledFeatures,
    labels: Sequence[Any] | np.ndarray,
    *,
    k: Sequence[int] = (1, 2, 5),
    test_share: float = 0.25,
    l2: float = 1e-2,
    seed: int = 0,
) -> SparseProbing:
    """Fits probes on the features whose means differ most between a label and the others (Gurnee et al. 2023).

    Args:
        pooled: from :func:`pool_features`.
        labels: one for each prompt.
        k: numbers of features.
        test_share: share of each label's prompts that are held out; accuracies are theirs.
        l2: the probes' penalty.
        seed: where the split starts.

    Raises:
        InputError: other than one label a prompt, one label alone, or too few prompts of one to split.
    """
    values, classes = _labels(labels, pooled)
    sizes = _sizes(k, min(pooled.features.shape[1], pooled.activations.shape[1]))
    train, test = _split(values, test_share, seed)
    shown = classes[1:] if len(classes) == 2 else classes
    accuracy, neurons = (np.zeros((len(shown), len(sizes))) for _ in range(2))
    best = np.zeros((len(shown), max(sizes)), int)
    full = np.zeros(len(shown))
    for row, own in enumerate(shown):
        wanted = values == own
        for table, x in ((accuracy, pooled.features), (neurons, pooled.activations)):
            for column, size in enumerate(sizes):
                probe = sparse_probe(x[train], wanted[train], size, l2=l2)
                table[row, column] = _accuracy(probe, x[test], wanted[test])
                if table is accuracy and size == max(sizes):
                    best[row] = np.asarray(probe.neurons)
        probe = logistic_probe(pooled.activations[train], wanted[train], l2=l2)
        full[row] = _accuracy(probe, pooled.activations[test], wanted[test])
    return SparseProbing(classes=tuple(shown), k=sizes, accuracy=accuracy, features=best, neurons=neurons, full=full)


@typed
def targeted_probe_perturbation(
    pooled: PooledFeatures,
    labels: Sequence[Any] | np.ndarray,
    *,
    k: Sequence[int] = (2, 5, 10, 20, 50),
    ablation: Ablation = "zero",
    test_share: float = 0.25,
    l2: float = 1e-2,
    seed: int = 0,
) -> TargetedPerturbation:
    """Takes out the features that a label's probe reads most, and measures all labels' probes (SAEBench's TPP).

    A feature counts for a label by the difference of its means times its direction's dot product with the label's
    probe; the ``k`` with the largest products are taken out of the activations, and the dictionary's error stays.

    Args:
        pooled, labels, test_share, l2, seed: as for :func:`sparse_probing`; at least two labels.
        k: numbers of features to take out.
        ablation: what takes their place: zero, as in SAEBench, or their mean over all prompts, which does not shift a
            probe's answers.
    """
    values, classes = _labels(labels, pooled)
    sizes = _sizes(k, pooled.features.shape[1])
    train, test = _split(values, test_share, seed)
    probes = [logistic_probe(pooled.activations[train], (values == own)[train], l2=l2) for own in classes]
    before = np.asarray([
        _accuracy(probe, pooled.activations[test], (values == own)[test])
        for probe, own in zip(probes, classes, strict=True)
    ])  # fmt: skip
    after = np.zeros((len(sizes), len(classes), len(classes)))
    for row, (own, probe) in enumerate(zip(classes, probes, strict=True)):
        order = _most_read(pooled, train, values == own, probe)
        for number, size in enumerate(sizes):
            left = pooled.without(order[:size], ablation)[test]
            after[number, row] = [
                _accuracy(other, left, (values == one)[test]) for one, other in zip(classes, probes, strict=True)
            ]
    falls = before - after
    same = np.eye(len(classes), dtype=bool)
    intended = falls[:, same].mean(-1)
    unintended = falls[:, ~same].mean(-1)
    return TargetedPerturbation(
        classes=tuple(classes), k=sizes, score=intended - unintended, intended=intended, unintended=unintended,
        before=before, after=after,
    )  # fmt: skip


@typed
def spurious_correlation_removal(
    pooled: PooledFeatures,
    labels: Sequence[Any] | np.ndarray,
    spurious: Sequence[Any] | np.ndarray,
    *,
    k: Sequence[int] = (2, 5, 10, 20, 50),
    ablation: Ablation = "zero",
    test_share: float = 0.25,
    l2: float = 1e-2,
    seed: int = 0,
) -> SpuriousRemoval:
    """Takes the features of a spurious label out of a probe that learned it with the wanted one (SAEBench's SCR).

    The biased probe is trained on prompts whose two labels agree (first with first, second with second), the oracle on
    as many of each of the four combinations; both are scored on as many of each.

    Args:
        pooled: from :func:`pool_features`.
        labels: the wanted label of each prompt, of two values.
        spurious: the other label of each prompt, of two values.
        k, ablation, test_share, l2, seed: as for :func:`targeted_probe_perturbation`.

    Raises:
        InputError: labels of other than two values, or a combination without enough prompts.
    """
    wanted, other = (_binary(given, pooled, name) for name, given in (("labels", labels), ("spurious", spurious)))
    sizes = _sizes(k, pooled.features.shape[1])
    cells = wanted * 2 + other
    if len(np.unique(cells)) < 4:
        raise InputError("labels and spurious must occur in all four combinations, or nothing tells them apart.")
    balanced = _as_many_of_each(cells, seed)
    train, test = (balanced[part] for part in _split(cells[balanced], test_share, seed))
    agree = np.setdiff1d(np.flatnonzero(wanted == other), test)
    x = pooled.activations

    def fit(rows: np.ndarray, answers: np.ndarray) -> LinearProbe:
        return logistic_probe(x[rows], answers[rows], l2=l2)

    biased, oracle, spurious_probe = fit(agree, wanted), fit(train, wanted), fit(train, other)
    order = _most_read(pooled, train, other == 1, spurious_probe)
    low, high = (_accuracy(probe, x[test], wanted[test]) for probe in (biased, oracle))
    after = np.asarray(
        [_accuracy(biased, pooled.without(order[:size], ablation)[test], wanted[test]) for size in sizes]
    )
    score = (after - low) / (high - low) if high != low else np.full(len(sizes), np.nan)
    return SpuriousRemoval(k=sizes, score=score, biased=low, oracle=high, after=after)


def _most_read(pooled: PooledFeatures, rows: np.ndarray, wanted: np.ndarray, probe: LinearProbe) -> np.ndarray:
    """Returns features by what they add to a probe's answer, most first."""
    chosen = np.isin(np.arange(len(wanted)), rows)
    difference = pooled.written[chosen & wanted].mean(0) - pooled.written[chosen & ~wanted].mean(0)
    return np.argsort(-difference * (pooled.directions @ np.asarray(probe.weights, np.float64)), kind="stable")


def _accuracy(probe: LinearProbe, activations: np.ndarray, wanted: np.ndarray) -> float:
    return probe.evaluate(activations, wanted)["balanced_accuracy"]


def _labels(labels: Any, pooled: PooledFeatures) -> tuple[np.ndarray, list[Any]]:
    """Returns the labels as an array, and the different ones in order."""
    values = np.asarray(labels)
    if values.shape != (len(pooled.features),):
        raise InputError(f"labels has shape {values.shape}; give one for each of the {len(pooled.features)} prompts.")
    classes = np.unique(values).tolist()
    if len(classes) < 2:
        raise InputError(f"All prompts have the label {classes[0]!r}; a probe needs prompts of two labels at least.")
    return values, classes


def _binary(labels: Any, pooled: PooledFeatures, name: str) -> np.ndarray:
    values, classes = _labels(labels, pooled)
    if len(classes) != 2:
        raise InputError(f"{name} has {len(classes)} different values, {classes[:5]}; it must have two.")
    return (values == classes[1]).astype(int)


def _sizes(k: Any, most: int) -> tuple[int, ...]:
    sizes = tuple(whole(one, "k", 1, most) for one in k)
    if not sizes:
        raise InputError("k= is empty: give at least one number of features.")
    return sizes


def _split(values: np.ndarray, test_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows to train on and to test on, in the same shares of each label."""
    if not 0 < test_share < 1:
        raise InputError(f"test_share={test_share} must lie between 0 and 1.")
    generator = np.random.default_rng(seed)
    train, test = [], []
    for own in np.unique(values):
        rows = generator.permutation(np.flatnonzero(values == own))
        held = max(1, round(test_share * len(rows)))
        if held >= len(rows):
            raise InputError(f"Only {len(rows)} prompt has the label {own!r}; two are needed, to train and to test.")
        test.append(rows[:held])
        train.append(rows[held:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def _as_many_of_each(values: np.ndarray, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    rows = [generator.permutation(np.flatnonzero(values == own)) for own in np.unique(values)]
    fewest = min(map(len, rows))
    return np.sort(np.concatenate([one[:fewest] for one in rows]))
