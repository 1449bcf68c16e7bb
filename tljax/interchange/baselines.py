"""Subspaces that are not trained: directions of the activations themselves, neurons, and random ones."""

from typing import Any, Literal, get_args

import numpy as np

from tljax.errors import InputError

Untrained = Literal["full", "mean_difference", "probe", "pca", "neuron", "random_neuron", "random"]
"""``"full"``: the whole vector. ``"mean_difference"``: the largest differences between the classes' means. ``"probe"``:
the directions of a ridge regression on the classes. ``"pca"``: principal components. ``"neuron"``: the coordinates
whose class means differ most. ``"random_neuron"``, ``"random"``: as many coordinates or dimensions, drawn at random."""

UNTRAINED = get_args(Untrained)
_RIDGE = 1e-2
"""The probe's penalty, as a share of the activations' mean variance."""


def untrained_subspace(
    name: str, activations: np.ndarray, targets: np.ndarray, rank: int, n: int, seed: int
) -> tuple[np.ndarray | None, np.ndarray]:
    """Computes a subspace from source activations.

    Args:
        name: which (:data:`Untrained`).
        activations: ``[pair, d]``.
        targets: the class of each, ``[pair]``.
        rank: number of dimensions, which ``"full"`` ignores. Where there are fewer, as between the means of ``c``
            classes (``c - 1``), fewer are open.
        n: number of columns, ``rank`` or more.
        seed: seed of random ones.

    Returns:
        Orthonormal columns ``[d, n]``, or ``None`` for the activation's own coordinates; and the gate, ``[n]`` or
        ``[d]``.
    """
    vectors = np.asarray(activations, np.float64)
    d = vectors.shape[1]
    if name == "full":
        return None, np.ones(d, np.float32)
    if name in ("neuron", "random_neuron"):
        order = np.random.default_rng(seed).permutation(d)
        if name == "neuron":
            order = np.argsort(-np.linalg.norm(_class_means(vectors, targets), axis=0), kind="stable")
        return None, np.isin(np.arange(d), order[:rank]).astype(np.float32)
    if name == "random":
        return random_columns(d, n, seed), _first(rank, n)
    made_of = {"mean_difference": _class_means, "probe": _probe, "pca": lambda x, _: x - x.mean(axis=0)}
    columns, sizes = principal(made_of[name](vectors, targets), n)
    return columns, _first(min(rank, int((sizes > 1e-9 * sizes.max(initial=0.0)).sum())), n)


def random_columns(d: int, n: int, seed: Any) -> np.ndarray:
    """Returns orthonormal columns in random directions, ``[d, n]``."""
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, d)).T)[0].astype(np.float32)


def featurizer_columns(featurizer: Any, activations: np.ndarray, d: int) -> np.ndarray | None:
    """Returns the coordinates that a mask is learned over, orthonormal columns ``[d, n]``; ``None`` for the own ones.

    Args:
        featurizer: ``"identity"`` (neurons, or the axes of the stream), ``"pca"``, ``"svd"`` (singular vectors of the
            activations, which are not centred), or columns ``[d, n]``.
        activations: ``[pair, d]``.
        d: size of the activation's last axis.

    Raises:
        InputError: another name, or columns that are not orthonormal.
    """
    if not isinstance(featurizer, str):
        columns = np.asarray(featurizer, np.float64)
        if columns.ndim != 2 or columns.shape[0] != d or columns.shape[1] > d:
            raise InputError(f"featurizer needs columns [{d}, n] with n up to {d}; got shape {columns.shape}.")
        if not (error := np.abs(columns.T @ columns - np.eye(columns.shape[1])).max()) < 1e-4:
            raise InputError(
                f"The featurizer's columns are not orthonormal (off by {error:.2g}): pass np.linalg.qr(columns)[0]."
            )
        return columns.astype(np.float32)
    if featurizer == "identity":
        return None
    if featurizer not in ("pca", "svd"):
        raise InputError(f"featurizer={featurizer!r} is not one of 'identity', 'pca', 'svd', or an array of columns.")
    vectors = np.asarray(activations, np.float64)
    vectors = vectors - vectors.mean(axis=0) if featurizer == "pca" else vectors
    return principal(vectors, min(vectors.shape))[0]


def principal(rows: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first ``n`` right singular vectors of ``rows`` as columns ``[d, n]``, and their singular values."""
    _, sizes, directions = np.linalg.svd(rows, full_matrices=len(rows) < n)
    sizes = np.concatenate([sizes, np.zeros(max(0, n - len(sizes)))])[:n]
    return directions[:n].T.astype(np.float32), sizes


def _class_means(vectors: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns each class's mean less their mean, ``[class, d]``."""
    means = np.stack([vectors[targets == one].mean(axis=0) for one in np.unique(targets)])
    return means - means.mean(axis=0)


def _probe(vectors: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns a ridge regression's direction for each class, ``[class, d]``."""
    centred = vectors - vectors.mean(axis=0)
    labels = (targets[:, None] == np.unique(targets)).astype(np.float64)
    gram = centred.T @ centred
    penalty = max(_RIDGE * np.trace(gram) / len(gram), np.finfo(np.float64).tiny)
    return np.linalg.solve(gram + penalty * np.eye(len(gram)), centred.T @ (labels - labels.mean(axis=0))).T


def _first(rank: int, n: int) -> np.ndarray:
    return (np.arange(n) < rank).astype(np.float32)
