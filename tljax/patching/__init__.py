"""Activation patching."""

from tljax.patching.metrics import KL as KL
from tljax.patching.metrics import Logit as Logit
from tljax.patching.metrics import LogitDiff as LogitDiff
from tljax.patching.metrics import LogProb as LogProb
from tljax.patching.metrics import Loss as Loss
from tljax.patching.metrics import Normalized as Normalized
from tljax.patching.result import PatchingResult as PatchingResult
from tljax.patching.sweep import sweep as sweep
