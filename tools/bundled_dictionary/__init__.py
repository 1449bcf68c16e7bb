"""Makes the dictionary inside the package."""
