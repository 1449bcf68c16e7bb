"""How well a dictionary recovers features that are known, as in toy models."""

import dataclasses
from typing import Any

import numpy as np

from tljax.checks import typed
from tljax.dictionaries.dictionary import Dictionary
from tljax.dictionaries.evaluation.sites import AnyDictionary
from tljax.dictionaries.evaluation.weights import decoder_rows
from tljax.errors import DictionaryError, InputError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GroundTruthScores:
    """Agreement of a dictionary's features with known ones.

    Attributes:
        mean_max_cosine: mean over known features of the largest cosine with any learned one (Sharkey et al. 2022).
        mcc: mean cosine under the best one-to-one assignment of learned to known features; known features that are left
            over count as 0.
        recovered: share of known features with a learned one at ``threshold`` or more.
        max_cosines: ``[known]``, each known feature's largest cosine.
        matches: ``[known]``, the learned feature assigned to each; -1 if none is left.
        unmatched: learned features that are assigned to none, or point at none (largest cosine below ``threshold``).
        f1: ``[known]``, how well the assigned feature's firing agrees with the known one's; ``None`` without codes.
        correlations: ``[known]``, Pearson correlation of their values; NaN where one is constant, ``None``
            without codes.
    """

    mean_max_cosine: float
    mcc: float
    recovered: float
    max_cosines: np.ndarray
    matches: np.ndarray
    unmatched: np.ndarray
    f1: np.ndarray | None
    correlations: np.ndarray | None


@typed
def ground_truth_scores(
    dictionary: AnyDictionary,
    directions: Any,
    *,
    activations: Any = None,
    codes: Any = None,
    threshold: float = 0.9,
) -> GroundTruthScores:
    """Compares a dictionary's decoder with known directions, and its features with known codes.

    The features of an ``abstopk`` dictionary have either sign, so that a direction and its opposite stand for the same
    feature: their cosines and correlations count without their common sign.

    Args:
        dictionary: the dictionary.
        directions: the known features' directions, ``[known, width]``.
        activations: what the dictionary encodes, ``[..., d_in]``, with ``codes``.
        codes: the known features' values for each activation, ``[..., known]``.
        threshold: cosine from which on a feature counts as recovered.

    Raises:
        DictionaryError: directions of another width.
        InputError: one of ``activations`` and ``codes`` without the other, or shapes that do not match.
    """
    from scipy.optimize import linear_sum_assignment

    known, rows = np.asarray(directions, np.float64), decoder_rows(dictionary)
    if known.ndim != 2 or known.shape[1] != rows.shape[1]:
        raise DictionaryError(
            f"directions has shape {known.shape}; the dictionary writes {rows.shape[1]} numbers, so it needs "
            f"[known, {rows.shape[1]}]."
        )
    if (activations is None) != (codes is None):
        raise InputError("activations= and codes= go together: what is encoded, and the known features' values for it.")
    cosines = _unit(known) @ _unit(rows).T
    signs = np.sign(cosines) if _has_signs(dictionary) else np.ones_like(cosines)
    cosines = signs * cosines
    assigned, learned = linear_sum_assignment(-cosines)
    matches = np.full(len(known), -1)
    matches[assigned] = learned
    largest = cosines.max(1)
    pointless = cosines.max(0) < threshold
    unassigned = np.isin(np.arange(len(rows)), learned, invert=True)
    f1 = correlations = None
    if codes is not None:
        f1, correlations = _agreement(dictionary, activations, codes, matches)
        correlations *= signs[np.arange(len(known)), matches]
    return GroundTruthScores(
        mean_max_cosine=float(largest.mean()),
        mcc=float(cosines[assigned, learned].sum() / len(known)),
        recovered=float((largest >= threshold).mean()),
        max_cosines=largest,
        matches=matches,
        unmatched=np.flatnonzero(pointless | unassigned),
        f1=f1,
        correlations=correlations,
    )


def _has_signs(dictionary: AnyDictionary) -> bool:
    return isinstance(dictionary, Dictionary) and dictionary.cfg.architecture == "abstopk"


def _agreement(dictionary: AnyDictionary, activations: Any, codes: Any, matches: np.ndarray) -> tuple[Any, Any]:
    """Returns F1 of firing and Pearson correlation of values for each known feature and the one assigned to it."""
    wanted = np.asarray(codes, np.float64)
    made = np.asarray(dictionary.encode(activations), np.float64)
    if wanted.shape[:-1] != made.shape[:-1] or wanted.shape[-1] != len(matches):
        raise InputError(
            f"codes has shape {wanted.shape}; activations of shape {np.shape(activations)} and {len(matches)} known "
            f"features need {(*made.shape[:-1], len(matches))}."
        )
    wanted, made = wanted.reshape(-1, wanted.shape[-1]), made.reshape(-1, made.shape[-1])
    f1, correlations = np.zeros(len(matches)), np.full(len(matches), np.nan)
    for index, feature in enumerate(matches.tolist()):
        if feature < 0:
            continue
        fires, should = made[:, feature] != 0, wanted[:, index] != 0
        total = fires.sum() + should.sum()
        f1[index] = 2 * (fires & should).sum() / total if total else np.nan
        if made[:, feature].std() > 0 and wanted[:, index].std() > 0:
            correlations[index] = np.corrcoef(made[:, feature], wanted[:, index])[0, 1]
    return f1, correlations


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(norms == 0, 1, norms)
