"""What dictionaries compute: their configs, and pure functions of arrays."""
