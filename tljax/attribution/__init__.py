"""Estimates of patching effects from gradients: what ``sweep(..., method="attribution")`` is made of."""

# Rooms of tljax.patching import modules of this one. Loaded first, they find them whole whichever is imported first.
import tljax.patching.engine  # noqa: F401  # isort: skip

from tljax.attribution.convention import Convention
from tljax.attribution.integrated import Completeness
from tljax.attribution.options import AtPStar, RelP, Verify
from tljax.attribution.verification import Verification

__all__ = ["AtPStar", "Completeness", "Convention", "RelP", "Verification", "Verify"]
