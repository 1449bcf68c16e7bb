"""Ready-made analyses: logit attribution, lenses, probes, head scores, evaluations."""

from tljax.analysis import evals
from tljax.analysis.direct_logit_attribution import DirectLogitAttribution, direct_logit_attribution
from tljax.analysis.evals import (
    IOIDataset,
    evaluate,
    evaluate_on_dataset,
    induction_loss,
    ioi_eval,
    make_data_loader,
    sanity_check,
)
from tljax.analysis.head_detector import (
    PatternValuesWarning,
    compute_head_attention_similarity_score,
    detect_head,
    get_duplicate_token_head_detection_pattern,
    get_induction_head_detection_pattern,
    get_previous_token_head_detection_pattern,
    get_supported_heads,
)
from tljax.analysis.head_scores import HeadScores, duplicate_token_scores, head_scores, previous_token_scores
from tljax.analysis.induction import heads_above, induction_scores, repeated_random_tokens
from tljax.analysis.jacobian_lens import JacobianLens, ShortPromptWarning
from tljax.analysis.logit_lens import LensReadout, StreamLens, logit_lens, readout
from tljax.analysis.patchscopes import identity_prompt, patchscope, patchscope_generate
from tljax.analysis.probes import LinearProbe, logistic_probe, ridge_probe, sparse_probe
from tljax.analysis.svd_interpreter import SVDInterpreter
from tljax.analysis.tuned_lens import TunedLens, lens_divergence

__all__ = [
    "DirectLogitAttribution",
    "HeadScores",
    "IOIDataset",
    "JacobianLens",
    "LensReadout",
    "LinearProbe",
    "PatternValuesWarning",
    "SVDInterpreter",
    "ShortPromptWarning",
    "StreamLens",
    "TunedLens",
    "compute_head_attention_similarity_score",
    "detect_head",
    "direct_logit_attribution",
    "duplicate_token_scores",
    "evals",
    "evaluate",
    "evaluate_on_dataset",
    "get_duplicate_token_head_detection_pattern",
    "get_induction_head_detection_pattern",
    "get_previous_token_head_detection_pattern",
    "get_supported_heads",
    "head_scores",
    "heads_above",
    "identity_prompt",
    "induction_loss",
    "induction_scores",
    "ioi_eval",
    "lens_divergence",
    "logistic_probe",
    "logit_lens",
    "make_data_loader",
    "patchscope",
    "patchscope_generate",
    "previous_token_scores",
    "readout",
    "repeated_random_tokens",
    "ridge_probe",
    "sanity_check",
    "sparse_probe",
]
