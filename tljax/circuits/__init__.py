"""Circuits: the residual graph, scores of its edges, and circuits as masks ``[writer, reader]``."""

from tljax.circuits.circuit import Circuit
from tljax.circuits.evaluation import (
    MIB_FRACTIONS,
    Stability,
    completeness,
    faithfulness,
    faithfulness_curve,
    minimality,
    stability,
)
from tljax.circuits.evaluation_result import CircuitResult
from tljax.circuits.graph import Reader, ResidualGraph, Writer
from tljax.circuits.replacement import MeanActivations, mean_activations
from tljax.circuits.scores.edge_scores import Convention, EdgeScores
from tljax.circuits.scores.edges import ZeroGapWarning, edge_scores
from tljax.circuits.selection import select, top_nodes

__all__ = [
    "MIB_FRACTIONS",
    "Circuit",
    "CircuitResult",
    "Convention",
    "EdgeScores",
    "MeanActivations",
    "Reader",
    "ResidualGraph",
    "Stability",
    "Writer",
    "ZeroGapWarning",
    "completeness",
    "edge_scores",
    "faithfulness",
    "faithfulness_curve",
    "mean_activations",
    "minimality",
    "select",
    "stability",
    "top_nodes",
]
