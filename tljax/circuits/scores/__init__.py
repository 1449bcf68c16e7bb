"""Scores of edges: estimates by gradients, and exact effects."""
