"""Metrics of a patched run, and how they are evaluated without computing logits that nothing reads."""

from tljax.patching.metrics.lazy_logits import LazyLogits
from tljax.patching.metrics.metrics import KL, Logit, LogitDiff, LogProb, Loss, Normalized
from tljax.patching.metrics.sets import ProbDiff

__all__ = [
    "KL",
    "LazyLogits",
    "LogProb",
    "Logit",
    "LogitDiff",
    "Loss",
    "Normalized",
    "ProbDiff",
]
