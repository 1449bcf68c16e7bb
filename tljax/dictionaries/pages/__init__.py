"""Pages of features: their examples, densities and logits."""
