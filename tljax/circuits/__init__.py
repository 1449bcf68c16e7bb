"""Circuits: the residual graph, scores of its edges, and circuits as masks ``[writer, reader]``."""

from tljax.circuits.graph import Reader, ResidualGraph, Writer
from tljax.circuits.replacement import MeanActivations, mean_activations

__all__ = ["MeanActivations", "Reader", "ResidualGraph", "Writer", "mean_activations"]
