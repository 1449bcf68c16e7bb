"""Circuits: the residual graph, scores of its edges, and circuits as masks ``[writer, reader]``."""

from tljax.circuits.graph import Reader, ResidualGraph, Writer
from tljax.circuits.replacement import MeanActivations, mean_activations
from tljax.circuits.scores.edge_scores import Convention, EdgeScores
from tljax.circuits.scores.edges import ZeroGapWarning, edge_scores

__all__ = [
    "Convention",
    "EdgeScores",
    "MeanActivations",
    "Reader",
    "ResidualGraph",
    "Writer",
    "ZeroGapWarning",
    "edge_scores",
    "mean_activations",
]
