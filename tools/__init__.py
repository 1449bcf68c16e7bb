"""What made the files inside the package. Not installed with it."""
