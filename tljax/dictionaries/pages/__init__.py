"""Pages of features: examples, densities, logits."""

from tljax.dictionaries.pages.activations import FeatureActivations, collect_activations
from tljax.dictionaries.pages.effects import logit_effects
from tljax.dictionaries.pages.examples import Example, ExampleGroup
from tljax.dictionaries.pages.page import draw_features, feature_activations, feature_dashboard, feature_page
from tljax.dictionaries.pages.summary import FeatureSummary, Histogram, summarise_features

__all__ = [
    "Example",
    "ExampleGroup",
    "FeatureActivations",
    "FeatureSummary",
    "Histogram",
    "collect_activations",
    "draw_features",
    "feature_activations",
    "feature_dashboard",
    "feature_page",
    "logit_effects",
    "summarise_features",
]
