"""Activations of many prompts, to disk or to a buffer, and readers that shuffle them."""
