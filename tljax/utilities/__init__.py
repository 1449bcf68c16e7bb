"""The parts of :mod:`tljax.utils`."""
