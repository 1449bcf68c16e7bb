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
from tljax.patching.sweep import NoEffectWarning as NoEffectWarning
from tljax.patching.sweep import sweep as sweep
from tljax.patching.transformerlens import generic_activation_patch as generic_activation_patch
from tljax.patching.transformerlens import (
    get_act_patch_attn_head_all_pos_every as get_act_patch_attn_head_all_pos_every,
)
from tljax.patching.transformerlens import get_act_patch_attn_head_by_pos_every as get_act_patch_attn_head_by_pos_every
from tljax.patching.transformerlens import get_act_patch_attn_head_k_all_pos as get_act_patch_attn_head_k_all_pos
from tljax.patching.transformerlens import get_act_patch_attn_head_k_by_pos as get_act_patch_attn_head_k_by_pos
from tljax.patching.transformerlens import get_act_patch_attn_head_out_all_pos as get_act_patch_attn_head_out_all_pos
from tljax.patching.transformerlens import get_act_patch_attn_head_out_by_pos as get_act_patch_attn_head_out_by_pos
from tljax.patching.transformerlens import (
    get_act_patch_attn_head_pattern_all_pos as get_act_patch_attn_head_pattern_all_pos,
)
from tljax.patching.transformerlens import (
    get_act_patch_attn_head_pattern_by_pos as get_act_patch_attn_head_pattern_by_pos,
)
from tljax.patching.transformerlens import (
    get_act_patch_attn_head_pattern_dest_src_pos as get_act_patch_attn_head_pattern_dest_src_pos,
)
from tljax.patching.transformerlens import get_act_patch_attn_head_q_all_pos as get_act_patch_attn_head_q_all_pos
from tljax.patching.transformerlens import get_act_patch_attn_head_q_by_pos as get_act_patch_attn_head_q_by_pos
from tljax.patching.transformerlens import get_act_patch_attn_head_v_all_pos as get_act_patch_attn_head_v_all_pos
from tljax.patching.transformerlens import get_act_patch_attn_head_v_by_pos as get_act_patch_attn_head_v_by_pos
from tljax.patching.transformerlens import get_act_patch_attn_out as get_act_patch_attn_out
from tljax.patching.transformerlens import get_act_patch_block_every as get_act_patch_block_every
from tljax.patching.transformerlens import get_act_patch_mlp_out as get_act_patch_mlp_out
from tljax.patching.transformerlens import get_act_patch_resid_mid as get_act_patch_resid_mid
from tljax.patching.transformerlens import get_act_patch_resid_pre as get_act_patch_resid_pre
from tljax.patching.transformerlens import (
    layer_head_dest_src_pos_pattern_patch_setter as layer_head_dest_src_pos_pattern_patch_setter,
)
from tljax.patching.transformerlens import layer_head_pattern_patch_setter as layer_head_pattern_patch_setter
from tljax.patching.transformerlens import layer_head_pos_pattern_patch_setter as layer_head_pos_pattern_patch_setter
from tljax.patching.transformerlens import layer_head_vector_patch_setter as layer_head_vector_patch_setter
from tljax.patching.transformerlens import layer_pos_head_vector_patch_setter as layer_pos_head_vector_patch_setter
from tljax.patching.transformerlens import layer_pos_patch_setter as layer_pos_patch_setter
from tljax.patching.transformerlens import make_df_from_ranges as make_df_from_ranges
