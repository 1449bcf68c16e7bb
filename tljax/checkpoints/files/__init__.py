"""Checkpoint files: finding them by name, downloading, reading lazily, and replacing them."""
