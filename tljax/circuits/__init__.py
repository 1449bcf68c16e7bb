"""Circuits: the residual graph, scores of its edges, and circuits as masks ``[writer, reader]``."""

from tljax.circuits.graph import Reader, ResidualGraph, Writer
from tljax.circuits.picture import CircuitPicture, draw_circuit, plot_edge_matrix
from tljax.circuits.search.constants import optimal_constants
from tljax.circuits.search.learned import learn_circuit
from tljax.circuits.search.learned_circuit import LearnedCircuit, LearningSettings

__all__ = [
    "CircuitPicture",
    "LearnedCircuit",
    "LearningSettings",
    "Reader",
    "ResidualGraph",
    "Writer",
    "draw_circuit",
    "learn_circuit",
    "optimal_constants",
    "plot_edge_matrix",
]
