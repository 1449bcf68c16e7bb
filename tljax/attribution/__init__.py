"""Estimates of patching effects from gradients: what ``sweep(..., method="attribution")`` is made of."""

from tljax.attribution.convention import Convention
from tljax.attribution.integrated import Completeness
from tljax.attribution.options import AtPStar, RelP, Verify
from tljax.attribution.verification import Verification

__all__ = ["AtPStar", "Completeness", "Convention", "RelP", "Verification", "Verify"]
