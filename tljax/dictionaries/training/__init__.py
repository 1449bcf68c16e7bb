"""Training of dictionaries on harvested activations."""
