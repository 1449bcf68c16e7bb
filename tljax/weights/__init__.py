"""Weights as objects of study: processing that preserves the function."""

from tljax.weights.processing import process_weights as process_weights
