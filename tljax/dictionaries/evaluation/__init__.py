"""Numbers that say how good a dictionary is."""

from tljax.dictionaries.evaluation.evaluation import DictionaryEvaluation, FeatureFigures
from tljax.dictionaries.evaluation.figures import Figures
from tljax.dictionaries.evaluation.ground_truth import GroundTruthScores, ground_truth_scores
from tljax.dictionaries.evaluation.pooling import PooledFeatures, pool_features
from tljax.dictionaries.evaluation.probing import (
    SparseProbing,
    SpuriousRemoval,
    TargetedPerturbation,
    sparse_probing,
    spurious_correlation_removal,
    targeted_probe_perturbation,
)
from tljax.dictionaries.evaluation.ravel import RavelScores, ravel_scores
from tljax.dictionaries.evaluation.running import evaluate_dictionary
from tljax.dictionaries.evaluation.weights import WeightFigures, weight_figures

__all__ = [
    "DictionaryEvaluation",
    "FeatureFigures",
    "Figures",
    "GroundTruthScores",
    "PooledFeatures",
    "RavelScores",
    "SparseProbing",
    "SpuriousRemoval",
    "TargetedPerturbation",
    "WeightFigures",
    "evaluate_dictionary",
    "ground_truth_scores",
    "pool_features",
    "ravel_scores",
    "sparse_probing",
    "spurious_correlation_removal",
    "targeted_probe_perturbation",
    "weight_figures",
]
