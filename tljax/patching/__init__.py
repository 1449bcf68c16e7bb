"""Activation patching."""

from tljax.patching.metrics import LogitDiff as LogitDiff
from tljax.patching.sweep import SweepResult as SweepResult
from tljax.patching.sweep import sweep as sweep
