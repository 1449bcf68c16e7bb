"""Activations of a run, and what is computed from them."""

from tljax.cache.activation_cache import ActivationCache
from tljax.cache.derivative_cache import DerivativeCache
from tljax.cache.memory import LargeCacheWarning

__all__ = [
    "ActivationCache",
    "DerivativeCache",
    "LargeCacheWarning",
]
