"""Scores of a residual graph's edges: from gradients, and how they are computed."""
