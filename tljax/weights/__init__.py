"""Weight processing that preserves a model's function, circuits of heads, and factored matrices."""

from tljax.quantized_weight import QuantizedWeight
from tljax.weights.factored_matrix import FactoredMatrix, composition_scores
from tljax.weights.processing import process_weights
from tljax.weights.quantization import WeightBits

__all__ = [
    "FactoredMatrix",
    "QuantizedWeight",
    "WeightBits",
    "composition_scores",
    "process_weights",
]
