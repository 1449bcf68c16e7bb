"""Activation patching, path patching, ablation and steering, as whole sweeps."""

from tljax.patching.ablation import ablation_sweep as ablation_sweep
from tljax.patching.ablation import mean_source as mean_source
from tljax.patching.ablation import resample_source as resample_source
from tljax.patching.direct_paths import get_act_patch_direct_path as get_act_patch_direct_path
from tljax.patching.direct_paths import get_act_patch_direct_path_all_sources as get_act_patch_direct_path_all_sources
from tljax.patching.lazy_logits import LazyLogits as LazyLogits
from tljax.patching.metrics import KL as KL
from tljax.patching.metrics import Logit as Logit
from tljax.patching.metrics import LogitDiff as LogitDiff
from tljax.patching.metrics import LogProb as LogProb
from tljax.patching.metrics import Loss as Loss
from tljax.patching.metrics import Normalized as Normalized
from tljax.patching.paths import path_patch as path_patch
from tljax.patching.report import SweepReport as SweepReport
from tljax.patching.result import PatchingResult as PatchingResult
from tljax.patching.steering import steering_sweep as steering_sweep
from tljax.patching.sweep import sweep as sweep
