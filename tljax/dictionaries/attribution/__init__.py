"""Effects of features on a metric, feature circuits, and directions of features in the logits."""

from tljax.dictionaries.attribution.circuit import CircuitNode, FeatureCircuit
from tljax.dictionaries.attribution.directions import stream_directions
from tljax.dictionaries.attribution.discovery import feature_circuit
from tljax.dictionaries.attribution.effects import feature_effects
from tljax.dictionaries.attribution.effects_result import FeatureEffect, FeatureEffects
from tljax.dictionaries.attribution.evaluation import (
    FeatureFaithfulness,
    feature_completeness,
    feature_faithfulness,
)
from tljax.dictionaries.attribution.feature_logits import (
    DirectFeatureAttribution,
    FeatureLogits,
    direct_feature_attribution,
    feature_logits,
)
from tljax.dictionaries.attribution.virtual_weights import similar_features, virtual_weights

__all__ = [
    "CircuitNode",
    "DirectFeatureAttribution",
    "FeatureCircuit",
    "FeatureEffect",
    "FeatureEffects",
    "FeatureFaithfulness",
    "FeatureLogits",
    "direct_feature_attribution",
    "feature_circuit",
    "feature_completeness",
    "feature_effects",
    "feature_faithfulness",
    "feature_logits",
    "similar_features",
    "stream_directions",
    "virtual_weights",
]
