"""Weight processing that preserves a model's function, circuits of heads, and factored matrices."""

from tljax.weights.factored_matrix import FactoredMatrix, composition_scores
from tljax.weights.processing import process_weights

__all__ = [
    "FactoredMatrix",
    "composition_scores",
    "process_weights",
]
