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
from tljax.circuits.picture import CircuitPicture, draw_circuit, plot_edge_matrix
from tljax.circuits.replacement import MeanActivations, mean_activations
from tljax.circuits.scores.convention import EdgeConvention
from tljax.circuits.scores.edge_scores import EdgeScores
from tljax.circuits.scores.edges import ZeroGapWarning, edge_scores
from tljax.circuits.scores.verification import verify_edges
from tljax.circuits.search.acdc import ACDCResult, acdc
from tljax.circuits.search.constants import optimal_constants
from tljax.circuits.search.learned import learn_circuit
from tljax.circuits.search.learned_circuit import LearnedCircuit, LearningSettings
from tljax.circuits.selection import select, top_nodes

__all__ = [
    "MIB_FRACTIONS",
    "ACDCResult",
    "Circuit",
    "CircuitPicture",
    "CircuitResult",
    "EdgeConvention",
    "EdgeScores",
    "LearnedCircuit",
    "LearningSettings",
    "MeanActivations",
    "Reader",
    "ResidualGraph",
    "Stability",
    "Writer",
    "ZeroGapWarning",
    "acdc",
    "completeness",
    "draw_circuit",
    "edge_scores",
    "faithfulness",
    "faithfulness_curve",
    "learn_circuit",
    "mean_activations",
    "minimality",
    "optimal_constants",
    "plot_edge_matrix",
    "select",
    "stability",
    "top_nodes",
    "verify_edges",
]
