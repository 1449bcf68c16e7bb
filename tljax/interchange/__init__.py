"""Interchange interventions: which subspace carries a variable, and the controls of the claim."""

from tljax.hooks.interchanges import (
    BoundlessInterchange,
    Interchange,
    MaskedInterchange,
    NormMatchedPlacebo,
    RotatedInterchange,
)
from tljax.interchange.controls import reader_matrix, reinitialized, split_by_reader
from tljax.interchange.das import DASResult, InterchangeScores, fit_das, score_interchange
from tljax.interchange.grid import train_interchange
from tljax.interchange.pairs import InterchangePairs, arbitrary_targets
from tljax.interchange.result import InterchangeResult

__all__ = [
    "BoundlessInterchange",
    "DASResult",
    "Interchange",
    "InterchangePairs",
    "InterchangeResult",
    "InterchangeScores",
    "MaskedInterchange",
    "NormMatchedPlacebo",
    "RotatedInterchange",
    "arbitrary_targets",
    "fit_das",
    "reader_matrix",
    "reinitialized",
    "score_interchange",
    "split_by_reader",
    "train_interchange",
]
