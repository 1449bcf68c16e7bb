"""Numbers that say how good a dictionary is."""

from tljax.dictionaries.evaluation.evaluation import DictionaryEvaluation, FeatureFigures
from tljax.dictionaries.evaluation.figures import Figures
from tljax.dictionaries.evaluation.running import evaluate_dictionary
from tljax.dictionaries.evaluation.weights import WeightFigures, weight_figures

__all__ = [
    "DictionaryEvaluation",
    "FeatureFigures",
    "Figures",
    "WeightFigures",
    "evaluate_dictionary",
    "weight_figures",
]
