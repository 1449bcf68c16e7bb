"""Numbers that say how good a dictionary is."""
