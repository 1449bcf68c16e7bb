"""Circuits: the residual graph, scores of its edges, and circuits as masks ``[writer, reader]``."""

from tljax.circuits.graph import Reader, ResidualGraph, Writer

__all__ = ["Reader", "ResidualGraph", "Writer"]
